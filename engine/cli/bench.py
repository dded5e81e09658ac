"""`univigu bench`. The benchmarks are files of the repository, not of the package: the command
starts them as a process of their own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from engine.cli import checks
from engine.cli.flags import own
from engine.errors import MissingPackage, UsageError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the engine beside its peers in the same run, or compare two results.

    ops: every operation. infer: a forward and guided t2v runs. caption: v2t. train: a training
    step. around: VAE decoding and the text encoder. scale: time against rows, frames, resolution,
    batch and text length. labs: every backend of attention and FFN in turns; one that hangs is left
    out. compare A B: what is slower or faster in B beyond noise. Exit code 8: something is slower,
    or gone; 9: nothing was measured, or an implementation of the engine was wrong.
    """

    what: Positional[
        Literal["ops", "infer", "caption", "train", "around", "scale", "labs", "compare"]
    ]
    results: Positional[Annotated[tuple[Path, ...], arg(metavar="[A.json B.json]")]] = ()
    """The two results that compare sets side by side, the older one first."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:INDEX."""
    only: Annotated[tuple[str, ...], arg(metavar="[CASE ...]")] = ()
    """Cases: operations, forward, rows, ... (none: all of them)."""
    repeats: Annotated[int | None, own("INT", "4; 1 with --quick")] = None
    """Fresh processes of each case; intervals come from what differs between them."""
    quick: bool = False
    """Tiny shapes: shows in a minute that everything runs."""
    time_limit: Annotated[float | None, own("SECONDS", "none")] = None
    """What is not done by then is left out, with a line that says so."""
    output_path: Annotated[Path | None, own("PATH", "none")] = None
    """Without suffix: PATH.json, PATH.md and pictures PATH-*.png."""

    def run(self) -> None:
        if self.what == "compare":
            if len(self.results) != 2:
                raise UsageError(
                    f"bench: compare must have two results; got {len(self.results)}. "
                    "Pass A.json B.json."
                )
            arguments = ["compare", *map(str, self.results)]
        else:
            if self.results:
                raise UsageError(
                    f"bench: results go with compare alone; got {self.results[0]} with "
                    f"{self.what}. Write to a file with --output-path."
                )
            arguments = ["run", json.dumps(self._asked())]

        program = ROOT / "bench" / "__main__.py"
        if not program.is_file():
            raise MissingPackage(
                f"bench: the folder bench/ of the repository must be beside the package; got none "
                f"in {ROOT}. Clone the repository and install it with pip install -e ."
            )

        under = ["under", str(os.getpid())]  # it ends when this process does
        code = subprocess.call([sys.executable, str(program), *under, *arguments])
        if code:
            sys.exit(code)

    def _asked(self) -> dict:
        if self.repeats is not None:
            checks.check_count("--repeats", self.repeats)
        if self.output_path is not None:
            checks.check_folder(self.output_path.parent)
        limit = {} if self.time_limit is None else {"limit": self.time_limit}
        return limit | {
            "bench": self.what,
            "device": str(checks.find_device(self.device)),
            "quick": self.quick,
            "repeats": self.repeats,
            "only": self.only,
            "output": self.output_path and str(self.output_path),
        }
