"""The command serve. See `engine.cli.commands`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from engine.cli import checks
from engine.cli.flags import own
from engine.cli.sampling import Loading
from engine.errors import UsageError
from engine.serve import Settings

Names = Annotated[tuple[str, ...], own("NAME=PATH [NAME=PATH ...]", "none")]


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve videos and captions over HTTP, as the OpenAI clients ask for them."""

    host: str = "127.0.0.1"
    """Where to listen; anything but this machine wants --api-key-file."""
    port: int = 8000
    """0: a free one."""
    data: Path = Path("univigu-data")
    """Folder of results, uploads and the table of jobs."""
    database: str = ""
    """URL of the jobs' PostgreSQL database, postgresql+psycopg://...; none: SQLite in --data."""
    api_key_file: Annotated[Path | None, own("PATH", "none")] = None
    """A file whose first line is the key that requests must bring."""
    allow_folder: tuple[Path, ...] = ()
    """Folders whose videos requests may name by file:// URLs."""
    queue_limit: int = 256
    """Jobs that may wait; one more is answered with 429."""
    most_frames: int = 161
    """Frames of a video, at most."""
    most_pixels: int = 1280 * 720
    """Pixels of a frame, at most."""
    most_steps: int = 100
    """Steps of a job, at most."""
    most_prompt: int = 4000
    """Characters of a prompt, at most."""
    upload_mb: float = 256
    """Megabytes of a request, at most."""
    uploads_gb: float = 10
    """Gigabytes of all uploads; the oldest go first."""
    memory_gb: float = 0
    """Refuse a job whose estimate is above this; 0: what the device has."""
    attempts: int = 2
    """Times a job is begun, if the runner dies under it."""
    stall_seconds: float = 600
    """End the runner when its job shows no sign of life for so long."""
    drain_seconds: float = 30
    """At SIGTERM, time for the job that runs; then it waits for the next start."""
    keep_days: float = 0
    """Delete results after so many days; 0: never."""
    keep_gb: float = 0
    """Delete the oldest results above so many gigabytes; 0: never."""
    caption_batch: int = 8
    """Captions that run as one batch, at most."""
    caption_window_ms: float = 5
    """How long the first of a batch waits for others."""
    interleave: bool = False
    """Captions may run between two steps of a video."""
    model_name: Annotated[str | None, own("NAME", "the folder's name")] = None
    """The model's id in /v1/models."""
    lora: Names = ()
    """Adapters that requests may name."""
    offload: Literal["none", "text-encoder"] = "none"
    """text-encoder: keep it on the CPU and copy it to the device for encoding alone."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: half of the VAE's memory; pixels differ a little."""
    vae_tiling: bool = False
    """Run the VAE on 256 x 256 pixels at a time, blended where they meet."""
    decoder_path: Annotated[Path | None, own("PATH", "the VAE")] = None
    """A tiny decoder, taew2_1 as .safetensors or .pth."""
    verify: bool = False
    """Compare all bytes of the model with the SHA-256 beside them first."""
    loading: OmitArgPrefixes[Loading] = Loading()

    def settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def source(self):
        """The model, as the runner's process is told of it."""
        from engine.serve.loading import ModelSource

        checks.check_decoder(self.decoder_path)
        path, other = self.loading.folder(), self.loading.transformer()
        device = self.loading.device
        device = None if device == "auto" else str(checks.find_device(device))
        plain = {"kernels": self.loading.kernels, "precision": self.loading.precision}
        plain |= {"cuda_graphs": False if self.loading.eager else None, "verify": self.verify}
        plain |= {"dtype": self.loading.dtype, "vae_dtype": self.vae_dtype}
        return ModelSource(
            name=self.model_name or (self.loading.transformer_path or path).name,
            path=str(path.absolute()),
            transformer_path=other and str(other.absolute()),
            device=device,
            offload=self.offload.replace("-", "_"),
            vae_tiling=self.vae_tiling,
            decoder_path=self.decoder_path and str(self.decoder_path.absolute()),
            lora=self.adapters(),
            **plain,
        )

    def adapters(self) -> dict[str, str]:
        """Files by name. Errors: UsageError."""
        found: dict[str, str] = {}
        for said in self.lora:
            name, equals, path = said.partition("=")
            if not equals or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise UsageError(f"serve: --lora must be NAME=PATH; got {said!r}.")
            if name in found:
                raise UsageError(f"serve: --lora must name each adapter once; got {name} twice.")
            found[name] = str(Path(path).absolute())
        return found

    def run(self) -> None:
        settings = self.settings()
        from engine.serve import serve

        serve(settings, self.source())
