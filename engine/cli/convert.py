"""The command that writes models: convert. See `engine.cli.commands`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.cli import checks
from engine.cli.flags import Lora, own
from engine.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write any supported model (Uni-ViGU, diffusers Wan, original Wan, a run's checkpoint) as a
    folder of ours."""

    model_path: Path
    """A folder, its id in Hugging Face's cache, a file (.safetensors, .pth, .bin), or a run's
    checkpoint folder, of which the newest is taken."""
    output_path: Path
    """A new folder, or one that holds a model of ours, which is replaced."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Number format of the weights written; keep: as in the file, and float32 for scaled fp8 of
    others."""
    precision: Annotated[Literal["bf16", "fp8"] | None, own("{bf16,fp8}", "as in the file")] = None
    """fp8: the feed-forward layers' weights in 8 bits, with a scale for each output channel."""
    base: Annotated[Path | None, own("PATH", "where it was")] = None
    """The model that a run with adapters or frozen layers began with, if it was moved since."""
    lora: Lora = ()
    """Adapters to add to the weights, each with its scale; see docs/lora.md."""
    verify: bool = False
    """Compare all bytes of the model and its adapters with the SHA-256 beside them first."""

    def run(self) -> None:
        import torch

        from engine.weights import convert
        from engine.weights.checkpoints import is_partial

        source, partial_run = self.model_path, is_partial(self.model_path)
        if self.base is not None and not partial_run:
            raise UsageError(
                f"convert: --base must go with the checkpoint of a run that trained a part of a "
                f"model; got {self.model_path}. Leave it out."
            )
        if partial_run:
            from engine.train.export import trained_model

            source = trained_model(self.model_path, self.base, self.verify)
        dtype = None if self.dtype == "keep" else getattr(torch, self.dtype)
        lora = checks.adapters(self.lora)
        convert(source, self.output_path, dtype, self.precision, lora, self.verify)
        print(self.output_path)
