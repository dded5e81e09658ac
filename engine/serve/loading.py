"""The model of a server, as the command line describes it to the runner's process."""

from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What `Pipeline.from_pretrained` is given, in JSON's types.

    name: the id in /v1/models.
    path: a pipeline folder, or the id of a model in Hugging Face's cache.
    lora: files by the names that requests give them.
    decoder_path: of `Pipeline.load_decoder`.
    The others: as in `Pipeline.from_pretrained`.
    """

    name: str
    path: str
    transformer_path: str | None = None
    device: str | None = None
    dtype: str = "float32"
    kernels: str = "auto"
    precision: str | None = None
    cuda_graphs: bool | None = None
    offload: str = "none"
    vae_tiling: bool = False
    vae_dtype: str = "float32"
    verify: bool = False
    decoder_path: str | None = None
    lora: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict:
        return asdict(self)

    def load(self):
        """The `Pipeline`; no adapter acts. Errors: as `Pipeline.from_pretrained`."""
        import torch

        from engine.files.hashes import check_hashes
        from engine.pipeline import Pipeline

        pipe = Pipeline.from_pretrained(
            self.path,
            self.device,
            getattr(torch, self.dtype),
            self.kernels,
            self.precision,
            self.transformer_path,
            cuda_graphs=self.cuda_graphs,
            offload=self.offload,
            vae_tiling=self.vae_tiling,
            vae_dtype=getattr(torch, self.vae_dtype),
            verify=self.verify,
        )
        if self.verify:
            check_hashes([Path(path) for path in self.lora.values()], None)
        for name, path in self.lora.items():
            pipe.load_lora_weights(path, adapter_name=name)
        if self.lora:
            pipe.set_adapters([])
        if self.decoder_path is not None:
            pipe.load_decoder(self.decoder_path)
        return pipe
