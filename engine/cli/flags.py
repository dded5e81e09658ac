"""Types of flags that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg


def own(metavar: str, hint: str):
    """A flag that may be left out: what the help shows as its value and as its default."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {hint})")


ModelPath = Annotated[Path | None, own("PATH", "the model that comes with the package")]

TransformerPath = Annotated[Path | None, own("PATH", "the folder's own")]

Size = Annotated[int | None, own("INT", "the model's")]

Precision = Annotated[Literal["bf16", "fp8"] | None, own("{bf16,fp8}", "as in the file")]

Guidance = Annotated[float | None, own("FLOAT", "the model's, else 5")]

Grid = Annotated[tuple[float, ...], own("FLOAT [FLOAT ...]", "none")]

Lora = Annotated[tuple[str, ...], own("PATH[:SCALE] [PATH[:SCALE] ...]", "none")]
