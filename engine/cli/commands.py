"""The commands of `univigu`, one dataclass each: fields are flags, `run` does the work.

Torch is imported inside the methods, so that `--help` answers at once. What can be checked without
a model is checked before one is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from engine.cli import checks
from engine.cli.bench import Bench
from engine.cli.bulk import CaptionDataset, GenerateDataset
from engine.cli.convert import Convert
from engine.cli.flags import ModelPath, Precision, TransformerPath, own
from engine.cli.preprocess import Preprocess
from engine.cli.run import Caption, Generate, Profile
from engine.cli.serve import Serve
from engine.cli.train import Train
from engine.cli.trajectories import Trajectories
from engine.cli.verify import Verify
from engine.cli.warm import Warm
from engine.config import EMBEDDED


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Make clips with captions, caption clips, and grade both, with the model of the package."""

    output_path: Path = Path("demo-out")
    """Folder for clips, captions and a contact sheet."""
    model_path: ModelPath = None
    """A pipeline folder trained on the same scenes."""
    verify: bool = False
    """Compare all bytes of the model with the SHA-256 beside them first."""

    def run(self) -> None:
        checks.check_folder(self.output_path)
        from engine.toy import demo

        demo.run(self.output_path, self.model_path or EMBEDDED, verify=self.verify)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Grade a model on held-out scenes of the synthetic set, in all three modes."""

    model_path: ModelPath = None
    """A pipeline folder trained on the same scenes."""
    transformer_path: TransformerPath = None
    """Another transformer for the same VAE and text encoder."""
    few_steps: bool = False
    """Grade the model of few steps in the folder."""
    cases: int = 200
    """Scenes per mode."""
    num_inference_steps: Annotated[
        int | None, own("INT", "the model's, else 24 and 32 in t2vt")
    ] = None
    """Evaluations of the model (twice as many with guidance)."""
    seed: int = 1000
    """Seed of the scenes and of the noise."""
    sampler: Literal["exact", "legacy"] = "exact"
    """Sampler of the text; legacy repeats the official code."""
    solver: Annotated[
        Literal["unipc", "euler", "lcm"] | None, own("{unipc,euler,lcm}", "the model's, else unipc")
    ] = None
    """Solver of the video's steps."""
    guidance_scale: Annotated[float | None, own("FLOAT", "the model's, else 3")] = None
    """Weight of the prompt; at most 1 turns guidance off."""
    captions: Literal["detailed", "prompt"] = "detailed"
    """prompt: grade captions on what prompts tell, for a model of stage recall alone."""
    video_cache: Annotated[str, arg(metavar="exact|frozen|INT")] = "exact"
    """In v2t, how often the video's rows are computed: see univigu caption --help."""
    precision: Precision = None
    """fp8: feed-forward layers multiply 8-bit numbers. bf16: nothing is quantised."""
    output_path: Annotated[Path | None, own("PATH", "none")] = None
    """.json for the table."""
    verify: bool = False
    """Compare all bytes of the model with the SHA-256 beside them first."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        checks.check_count("--cases", self.cases)
        if self.num_inference_steps is not None:
            checks.check_count("--num-inference-steps", self.num_inference_steps)
        checks.check_seed(self.seed)
        cache = checks.video_cache(self.video_cache)
        checks.check_json_output(self.output_path)
        from engine.toy import evaluation

        names = """transformer_path few_steps cases num_inference_steps seed sampler solver
        guidance_scale captions precision verify""".split()
        settings = {name: getattr(self, name) for name in names} | {"video_cache": cache}
        path = self.model_path or EMBEDDED
        table = evaluation.evaluate(model_path=path, progress=not self.quiet, **settings)
        print(evaluation.format_table(table))
        if self.output_path is not None:
            from engine.media import write_sidecar

            write_sidecar(self.output_path, table)


@dataclass(frozen=True, kw_only=True)
class Env:
    """Show what the engine finds on this machine, and which kernels it chooses."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from engine.cli.environment import collect, format_report

        report = collect()
        print(json.dumps(report, indent=2) if self.json else format_report(report))


COMMANDS = (
    Demo
    | Generate
    | Caption
    | CaptionDataset
    | GenerateDataset
    | Serve
    | Train
    | Preprocess
    | Trajectories
    | Convert
    | Verify
    | Evaluate
    | Bench
    | Profile
    | Warm
    | Env
)
