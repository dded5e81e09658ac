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
from engine.config import PRESETS, ModelConfig, TrainConfig
from engine.errors import ModelFileError, UsageError


def own(metavar: str, hint: str):
    """A flag that may be left out: what the help shows as its value and as its default."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {hint})")


ModelPath = Annotated[Path | None, own("PATH", "the model that comes with the package")]
Mode = Annotated[Literal["t2v", "t2vt"], arg(aliases=("--task",))]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model is run."""

    model_path: ModelPath = None
    """A pipeline folder: transformer, vae, text_encoder, tokenizer."""
    num_inference_steps: int = 50
    """Evaluations of the model (twice as many with guidance)."""
    seed: int = 0
    """The same seed gives the same result."""
    sampler: Literal["exact", "legacy"] = "exact"
    """Of the text; legacy repeats the official code."""
    text_rows: Annotated[int | None, own("INT", "the model's")] = None
    """Rows of the text stream."""
    kernels: str = "auto"
    """auto, reference, or op=backend,... as `univigu env` lists them."""
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
        return Pipeline.from_pretrained(self.model_path or EMBEDDED, device, dtype, self.kernels)

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
class Train:
    """Train a model on a latent shard, or a VAE or text encoder on the synthetic set."""

    output_path: Path
    """Folder of the run: checkpoint, metrics.jsonl, and the averaged model at the end."""
    part: Literal["model", "vae", "text-encoder"] = "model"
    """vae and text-encoder are fixed recipes: of the other flags they take --seed alone."""
    data: Annotated[Path | None, own("PATH", "none")] = None
    """A latent shard from `univigu preprocess`."""
    preset: Annotated[str | None, own("{" + ",".join(PRESETS) + "}", "none")] = None
    """Start from random weights of this size."""
    init_from: Annotated[Path | None, own("PATH", "none")] = None
    """Start from this model: stage refine starts from the model that recall saved."""
    resume: bool = False
    """Continue from the run's checkpoint."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model saved at the end."""
    kernels: str = "auto"
    """auto, reference, or op=backend,... as `univigu env` lists them."""
    quiet: bool = False
    """No progress bar."""
    settings: OmitArgPrefixes[TrainConfig] = TrainConfig()

    def run(self) -> None:
        preflight.check_folder(self.output_path)
        preflight.check_seed(self.settings.seed)
        if self.part == "model":
            self.train_model()
            return
        plain = TrainConfig(seed=self.settings.seed)
        if self != Train(part=self.part, output_path=self.output_path, settings=plain):
            raise UsageError(
                f"train: flags with --part {self.part} must be --output-path and --seed alone; "
                "got others. Leave them out."
            )
        from engine import recipe

        preflight.quiet_libraries()
        if self.part == "vae":
            recipe.train_vae(self.output_path, seed=self.settings.seed)
        else:
            recipe.train_text_encoder(self.output_path, seed=self.settings.seed)
        print(self.output_path)

    def check(self) -> None:
        preflight.check_count("--save-every", self.save_every)
        if self.data is None:
            raise UsageError(
                "train: --data must name a latent shard; got none. Run univigu preprocess."
            )
        if (self.preset is None) == (self.init_from is None):
            got = "neither" if self.preset is None else "both"
            raise UsageError(f"train: one of --preset and --init-from must be given; got {got}.")
        if self.preset is not None:
            ModelConfig.preset(self.preset)
        left = [self.output_path / name for name in ("checkpoint", "checkpoint.old")]
        if not self.resume and any(path.exists() for path in left):
            raise UsageError(
                f"train: --output-path must hold no checkpoint; got one in {self.output_path}. "
                "Add --resume, or choose another folder."
            )

    def train_model(self) -> None:
        self.check()
        import torch

        from engine import checkpoint, train
        from engine.data import LatentSet
        from engine.model import UniViGU
        from engine.weights import load_model, save_pretrained

        preflight.check_kernels(self.kernels, "cpu", torch.float32)
        data = LatentSet(self.data)
        torch.manual_seed(self.settings.seed)
        if self.init_from is None:
            model = UniViGU(ModelConfig.preset(self.preset), kernels=self.kernels)
        else:
            model = load_model(self.init_from, kernels=self.kernels)
        preflight.check_shard(data, model.cfg, self.settings)
        state = train.TrainState.create(model, self.settings)
        if self.resume:
            checkpoint.load(state, self.output_path / "checkpoint")
        train.fit(state, data, self.output_path, self.save_every, progress=not self.quiet)
        target = self.output_path / "model"
        save_pretrained(state.ema_model(), target, dtype=getattr(torch, self.save_dtype))
        print(target)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Encode training clips and captions of the synthetic set into a latent shard."""

    model_path: Path
    """A folder with vae, text_encoder and tokenizer, and pipeline.json where it is ours."""
    synthetic: int
    """How many clips to render and encode."""
    output_path: Path
    """The .safetensors shard."""
    seed: int = 0
    """Of the scenes."""
    text_rows: Annotated[int | None, own("INT", "the folder's")] = None
    """Rows of prompts and captions, the end mark included."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        preflight.check_count("--synthetic", self.synthetic)
        preflight.check_seed(self.seed)
        if self.output_path.suffix != ".safetensors" or self.output_path.is_dir():
            name = self.output_path.name
            raise UsageError(f"preprocess: --output-path must end in .safetensors; got {name!r}.")
        from tqdm import tqdm

        from engine.data import preprocess_scenes
        from engine.pipeline import Pipeline

        preflight.quiet_libraries()
        parts = Pipeline.without_model(self.model_path)
        rows = parts.config.text_rows if self.text_rows is None else self.text_rows
        preflight.check_count("--text-rows", rows)

        def progress(batches):
            return tqdm(batches, desc="clips, 32 at a time", disable=self.quiet)

        preprocess_scenes(parts, self.output_path, self.synthetic, self.seed, rows, progress)
        print(self.output_path)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write any supported model (Uni-ViGU, diffusers Wan, original Wan) as a folder of ours."""

    model_path: Path
    """A folder, or one .safetensors or .pth file."""
    output_path: Path
    """A new folder, or one that holds a model of ours, which is replaced."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Of the weights written; keep: as in the file."""

    def run(self) -> None:
        import torch

        from engine.weights import convert

        dtype = None if self.dtype == "keep" else getattr(torch, self.dtype)
        convert(self.model_path, self.output_path, dtype)
        print(self.output_path)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Grade a model on held-out scenes of the synthetic set, in all three modes."""

    model_path: ModelPath = None
    """A pipeline folder trained on the same scenes."""
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
        names = "cases num_inference_steps seed sampler solver guidance_scale captions".split()
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
