"""The commands of `univigu`, one dataclass each: fields are flags, `run` does the work.

Torch is imported inside the methods, so that `--help` answers at once. What can be checked without
a model is checked before one is loaded.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from engine import preflight
from engine.commands_train import Convert, Preprocess, Train, own
from engine.errors import ModelFileError, UsageError

ModelPath = Annotated[Path | None, own("PATH", "the model that comes with the package")]
TransformerPath = Annotated[Path | None, own("PATH", "the folder's own")]
Mode = Annotated[Literal["t2v", "t2vt"], arg(aliases=("--task",))]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model is run."""

    model_path: ModelPath = None
    """A pipeline folder: transformer, vae, text_encoder, tokenizer."""
    transformer_path: TransformerPath = None
    """Another transformer for the same VAE and text encoder."""
    num_inference_steps: int = 50
    """Evaluations of the model (twice as many with guidance)."""
    seed: int = 0
    """The same seed gives the same result."""
    sampler: Literal["exact", "legacy"] = "exact"
    """Of the text; legacy repeats the official code."""
    text_rows: Annotated[int | None, own("INT", "the model's")] = None
    """Rows of the text stream."""
    kernels: str = "auto"
    """auto, a backend, or op=backend,... as `univigu env` lists them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; norms and the VAE stay in float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:INDEX."""
    quiet: bool = False
    """No progress; print the result alone."""

    def check(self) -> None:
        preflight.check_count("--num-inference-steps", self.num_inference_steps)
        preflight.check_seed(self.seed)

    def pipeline(self):
        import torch

        from engine.pipeline import EMBEDDED, Pipeline

        device, dtype = preflight.find_device(self.device), getattr(torch, self.dtype)
        preflight.check_kernels(self.kernels, device, dtype)
        preflight.quiet_libraries()
        return Pipeline.from_pretrained(
            self.model_path or EMBEDDED,
            device,
            dtype,
            self.kernels,
            transformer_path=self.transformer_path,
        )

    def choices(self) -> dict:
        """What `Pipeline.generate` and `Pipeline.caption` both take."""
        names = ("num_inference_steps", "seed", "sampler", "text_rows")
        return {name: getattr(self, name) for name in names} | {"progress": not self.quiet}

    def report(self, result) -> None:
        if not self.quiet:
            print(f"seed: {result.seed}\n{result.stages()}")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Make clips with captions, caption clips, and grade both, with the model of the package."""

    output_path: Path = Path("demo-out")
    """Folder for clips, captions and a contact sheet."""
    model_path: ModelPath = None
    """A pipeline folder trained on the same scenes."""

    def run(self) -> None:
        preflight.check_folder(self.output_path)
        from engine import demo
        from engine.pipeline import EMBEDDED

        preflight.quiet_libraries()
        demo.run(self.output_path, self.model_path or EMBEDDED)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make a video, or a video and its caption, from a prompt."""

    prompt: str
    """What the video shows."""
    mode: Mode = "t2v"
    """t2v: video. t2vt: video and caption."""
    num_frames: Annotated[int | None, own("INT", "the model's")] = None
    """4k+1 frames."""
    height: Annotated[int | None, own("INT", "the model's")] = None
    """Pixels, a multiple of 16."""
    width: Annotated[int | None, own("INT", "the model's")] = None
    """Pixels, a multiple of 16."""
    guidance_scale: float = 5.0
    """Weight of the prompt; at most 1 turns guidance off and halves the time."""
    flow_shift: float = 3.0
    """More puts more steps at high noise: 3 for 480p, 5 for 720p."""
    negative_prompt: str = ""
    """What the video should not show."""
    solver: Literal["unipc", "euler"] = "unipc"
    """Of the video."""
    output_path: Path = Path("out.mp4")
    """.mp4 or .gif; the settings go beside it as .json."""
    sampling: OmitArgPrefixes[Sampling] = Sampling()

    def check(self) -> None:
        self.sampling.check()
        if not self.prompt.strip():
            raise UsageError("generate: --prompt must not be empty. Say what the video shows.")
        if not math.isfinite(self.guidance_scale):
            raise UsageError(
                f"generate: --guidance-scale must be finite; got {self.guidance_scale}."
            )
        if not 0 < self.flow_shift < math.inf:
            raise UsageError(f"generate: --flow-shift must be positive; got {self.flow_shift}.")
        from engine.pipeline import check_size

        sizes = (self.num_frames, 1), (self.height, 16), (self.width, 16)
        frames, height, width = (least if size is None else size for size, least in sizes)
        check_size(frames, height, width)
        preflight.check_video_output(self.output_path, height, width)

    def run(self) -> None:
        self.check()
        names = "mode num_frames height width guidance_scale flow_shift negative_prompt solver"
        settings = {name: getattr(self, name) for name in names.split()}
        result = self.sampling.pipeline().generate(
            self.prompt, **settings, **self.sampling.choices()
        )
        result.save(self.output_path)
        print(self.output_path)
        if result.caption is not None:
            print(f"caption: {result.caption}")
        self.sampling.report(result)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Say what videos show."""

    video: tuple[Path, ...]
    """One file or several, each of 4k+1 frames and sides that are multiples of 16."""
    video_cache: str = "exact"
    """exact: evaluate all rows in every step."""
    output_path: Annotated[Path | None, own("PATH", "none")] = None
    """.json for captions, settings and timings."""
    sampling: OmitArgPrefixes[Sampling] = Sampling()

    def check(self) -> None:
        self.sampling.check()
        preflight.check_json_output(self.output_path)
        if not self.video:
            raise UsageError("caption: --video must name at least one file; got none.")
        for path in self.video:
            if not path.is_file():
                raise ModelFileError(f"caption: --video must be a file; got {path}. Check it.")

    def run(self) -> None:
        self.check()
        pipe, records = self.sampling.pipeline(), []
        for path in self.video:
            result = pipe.caption(path, video_cache=self.video_cache, **self.sampling.choices())
            print(result.caption if len(self.video) == 1 else f"{path}: {result.caption}")
            self.sampling.report(result)
            kept = {k: v for k, v in vars(result).items() if k not in ("frames", "prompt", "fps")}
            records.append({"video": str(path)} | kept)
        if self.output_path is not None:
            from engine.result import versions
            from engine.video import write_sidecar

            write_sidecar(self.output_path, {"captions": records, "versions": versions()})


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Grade a model on held-out scenes of the synthetic set, in all three modes."""

    model_path: ModelPath = None
    """A pipeline folder trained on the same scenes."""
    transformer_path: TransformerPath = None
    """Another transformer for the same VAE and text encoder."""
    cases: int = 200
    """Scenes per mode."""
    num_inference_steps: Annotated[int | None, own("INT", "24; 32 in t2vt")] = None
    """Evaluations of the model (twice as many with guidance)."""
    seed: int = 1000
    """Of scenes and noise."""
    sampler: Literal["exact", "legacy"] = "exact"
    """Of the text; legacy repeats the official code."""
    solver: Literal["unipc", "euler"] = "unipc"
    """Of the video."""
    guidance_scale: float = 3.0
    """Weight of the prompt; at most 1 turns guidance off."""
    captions: Literal["detailed", "prompt"] = "detailed"
    """prompt: grade captions on what prompts tell, for a model of stage recall alone."""
    output_path: Annotated[Path | None, own("PATH", "none")] = None
    """.json for the table."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        preflight.check_count("--cases", self.cases)
        if self.num_inference_steps is not None:
            preflight.check_count("--num-inference-steps", self.num_inference_steps)
        preflight.check_seed(self.seed)
        preflight.check_json_output(self.output_path)
        from engine import demo
        from engine.pipeline import EMBEDDED

        preflight.quiet_libraries()
        names = """transformer_path cases num_inference_steps seed sampler solver guidance_scale
        captions""".split()
        settings = {name: getattr(self, name) for name in names}
        path = self.model_path or EMBEDDED
        table = demo.evaluate(model_path=path, progress=not self.quiet, **settings)
        print(demo.format_table(table))
        if self.output_path is not None:
            from engine.video import write_sidecar

            write_sidecar(self.output_path, table)


@dataclass(frozen=True, kw_only=True)
class Env:
    """Show what the engine finds on this machine, and which kernels it chooses."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from engine.environment import collect, format_report

        report = collect()
        print(json.dumps(report, indent=2) if self.json else format_report(report))


COMMANDS = Demo | Generate | Caption | Train | Preprocess | Convert | Evaluate | Env
