"""The command serve. See `engine.cli.commands`."""

from dataclasses import dataclass
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
    ray: Annotated[str | None, own("local|auto|HOST:PORT", "this process")] = None
    """Serve by Ray: on this machine, or on a cluster whose machines share --database and
    --results."""
    replicas: Annotated[str | None, own("N|MIN-MAX", "one for each GPU, else one")] = None
    """With --ray, runners that work at a time; between two numbers, as many as there are jobs."""
    settings: OmitArgPrefixes[Settings] = Settings()
    loading: OmitArgPrefixes[Loading] = Loading()

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
        from engine.serve import serve, serve_on_ray

        if self.replicas is not None and self.ray is None:
            raise UsageError(
                f"usage: --replicas must go with --ray; got {self.replicas}. Add --ray local."
            )
        if self.ray is None:
            serve(self.settings, self.source())
        else:
            serve_on_ray(self.settings, self.source(), self.ray, self.replicas or "")
