"""Flags that the commands which run models share: which model, on what, and how it samples."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.cli import checks
from engine.cli.flags import (
    Grid,
    Guidance,
    Lora,
    ModelPath,
    Precision,
    Size,
    TransformerPath,
    own,
)
from engine.config import EMBEDDED, MeshConfig, find_few_steps, read_pipeline_config
from engine.errors import UsageError

OWN_SIZE = ("num_frames", "height", "width", "text_rows")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, and on what it runs."""

    model_path: ModelPath = None
    """A pipeline folder (transformer, vae, text_encoder, tokenizer), or a model's id in Hugging
    Face's cache."""
    transformer_path: TransformerPath = None
    """Another transformer for the same VAE and text encoder."""
    few_steps: bool = False
    """Take the model of few steps in the folder, which the embedded one has."""
    kernels: str = "auto"
    """auto, a backend, or op=backend,... as `univigu env` lists them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products; norms stay in float32."""
    precision: Precision = None
    """fp8: feed-forward layers multiply 8-bit numbers. bf16: nothing is quantised."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:INDEX."""
    eager: bool = False
    """Run every step kernel by kernel, without CUDA graphs."""

    def folder(self) -> Path:
        """The pipeline folder; --model-path may be the id of a model in Hugging Face's cache."""
        path = self.model_path or EMBEDDED
        if path.is_dir():
            return path
        from engine.media.parts import find_folder  # imports torch

        return find_folder(path)

    def transformer(self) -> Path | None:
        """What takes the place of the folder's own transformer."""
        if not self.few_steps:
            return self.transformer_path
        return find_few_steps(self.folder(), self.transformer_path)

    def place(self):
        """The device and the dtype, when the kernels can be bound for them."""
        import torch

        device, dtype = checks.find_device(self.device), getattr(torch, self.dtype)
        checks.check_kernels(self.kernels, device, dtype, self.precision or "bf16")
        return device, dtype

    def shape_of_model(self, case: dict[str, int]):
        """The model without numbers, on the meta device, with the kernels of the device that is
        asked for; no weights are read. case: as `PipelineConfig.case`."""
        from engine import fp8
        from engine.model import UniViGU
        from engine.weights import read_transformer
        from univigu_kernels import bind

        device, dtype = self.place()
        cfg, stored = read_transformer(self.transformer() or self.model_path or EMBEDDED)
        precision = self.precision or stored
        ops = bind(self.kernels, device, dtype, precision, case | cfg.case)
        model = UniViGU(cfg, "meta", dtype, ops).eval()
        return fp8.quantize(model) if precision == "fp8" else model


@dataclass(frozen=True, kw_only=True)
class Sampling(Loading):
    """How the model is run."""

    num_inference_steps: Annotated[int | None, own("INT", "the model's, else 50")] = None
    """Evaluations of the model (twice as many with guidance)."""
    seed: int = 0
    """The same seed gives the same result."""
    sampler: Literal["exact", "legacy"] = "exact"
    """Sampler of the text; legacy repeats the official code."""
    text_rows: Size = None
    """Tokens of the text stream, its end mark included."""
    temperature: float = 1.0
    """Temperature at which tokens are drawn; 0 takes the most probable."""
    commit: Literal["jump", "confidence"] = "jump"
    """jump: each token by itself. confidence: the number that is due, the surest first, and they
    stay; an approximation."""
    offload: Literal["none", "text-encoder"] = "none"
    """text-encoder: keep it on the CPU and copy it to the device for encoding alone."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: half of the VAE's memory; pixels differ a little."""
    vae_tiling: bool = False
    """Run the VAE on 256 x 256 pixels at a time, blended where they meet."""
    sp: int = 1
    """Under torchrun: ranks that share each sample's rows (sequence parallel)."""
    cfg_parallel: bool = False
    """Under torchrun: half of the ranks for the prompt, half for its null. Captions have no
    guidance: there it saves nothing."""
    estimate: bool = False
    """Print what the run would need of a GPU's memory (of this machine's with --device cpu), and
    run nothing."""
    lora: Lora = ()
    """Adapters to add to the model, each with its scale; see docs/lora.md."""
    verify: bool = False
    """Compare all bytes of the model and its adapters with the SHA-256 beside them first."""
    quiet: bool = False
    """No progress; print the result alone."""

    def check(self) -> None:
        if self.num_inference_steps is not None:
            checks.check_count("--num-inference-steps", self.num_inference_steps)
        checks.check_seed(self.seed)
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"usage: --temperature must be at least 0 and finite; got {self.temperature}."
            )
        checks.adapters(self.lora)
        checks.check_count("--sp", self.sp)
        if self.sp * (1 + self.cfg_parallel) > 1:
            self.check_processes(self.sp * (1 + self.cfg_parallel))

    def check_processes(self, count: int) -> None:
        from torch.distributed import is_torchelastic_launched

        if self.estimate:
            raise UsageError(
                f"usage: --estimate must be for one process; got {count}. "
                "Leave out --sp and --cfg-parallel."
            )
        if not is_torchelastic_launched():
            raise UsageError(
                f"usage: --sp and --cfg-parallel must have {count} processes; got 1. Write "
                f"torchrun --nproc-per-node {count} -m engine where you wrote univigu."
            )

    def world(self, device):
        """The processes that torchrun started; None where this is the only one."""
        from torch.distributed import is_torchelastic_launched

        if not is_torchelastic_launched():
            return None
        from engine.parallel import World

        if device.index is not None:
            raise UsageError(
                f"device: --device must be cpu or cuda under torchrun; got {self.device!r}. "
                "Each process takes its own GPU."
            )
        return World.start(MeshConfig(1, 1, self.sp, 1 + self.cfg_parallel), device.type)

    @contextmanager
    def pipeline(self, decoder_path: Path | None = None) -> Iterator:
        """The loaded `Pipeline`; after it, the processes part. decoder_path: see `Generate`."""
        import torch

        from engine.files.hashes import check_hashes
        from engine.pipeline import Pipeline

        checks.check_decoder(decoder_path)
        device, dtype = self.place()
        world = self.world(device)
        pipe = Pipeline.from_pretrained(
            self.model_path or EMBEDDED,
            device,
            dtype,
            self.kernels,
            self.precision,
            self.transformer(),
            cuda_graphs=False if self.eager else None,
            offload=self.offload.replace("-", "_"),
            vae_tiling=self.vae_tiling,
            vae_dtype=getattr(torch, self.vae_dtype),
            world=world,
            verify=self.verify,
        )
        if self.verify:
            paths = [path for path, _ in checks.adapters(self.lora)]
            check_hashes(paths, world and world.on_each_node)
        for path, scale in checks.adapters(self.lora):
            pipe.load_lora_weights(path, scale=scale)
        if decoder_path is not None:
            pipe.load_decoder(decoder_path)
        yield pipe
        if world is not None:
            world.stop()

    def choices(self) -> dict:
        """What `Pipeline.generate` and `Pipeline.caption` both take."""
        names = ("num_inference_steps", "seed", "sampler", "text_rows", "temperature", "commit")
        return {name: getattr(self, name) for name in names} | {"progress": not self.quiet}

    def job_of(self, asked: dict | None = None) -> dict:
        """Fields of a `memory.Job` for a run of `generate`, of which `schedule.settle` takes what
        is asked; for None, of `caption`. Reads no weights."""
        from engine import schedule
        from engine.weights.adapters import read_sampling
        from engine.weights.index import read_index, sampled_as

        lora = checks.adapters(self.lora)[::-1]
        records = [(path.stem, read_sampling(path)) for path, scale in lora if scale]
        records = [(name, said) for name, said in records if said is not None]
        folder = self.folder()
        records += schedule.said_by(sampled_as(read_pipeline_config(folder), self.transformer()))
        if asked is None:
            steps, _ = schedule.caption_steps(self.num_inference_steps, records)
            return {"mode": "v2t", "steps": steps}

        index = read_index(folder, self.transformer() is not None)
        settings = schedule.settle(asked, records, index.flow_shift, index.solver)
        plan = schedule.settled(settings)
        job = {"mode": asked["mode"], "steps": len(plan), "noise_count": plan.noise_count}
        return job | {"guided": settings["guidance_scale"] > 1}

    def estimated(self, **job) -> str:
        """The table for the run that `job` describes; sizes of None are the folder's own. No
        weights are loaded."""
        from engine.planning import memory
        from engine.weights import read_codecs, read_transformer

        path = self.folder()
        cfg, stored = read_transformer(self.transformer() or path)
        folder = read_pipeline_config(path)
        job |= {"text_rows": self.text_rows}
        job |= {name: getattr(folder, name) for name in OWN_SIZE if job.get(name) is None}
        job |= {
            "context_rows": folder.context_rows,
            "dtype": self.dtype,
            "precision": self.precision or stored,
            "device": "cpu" if self.device == "cpu" else "cuda",
            "offload": self.offload.replace("-", "_"),
            "vae_tiling": self.vae_tiling,
            "vae_dtype": self.vae_dtype,
        }
        job = memory.Job(**job)
        parts = memory.estimate(cfg, job, read_codecs(path))
        title = f"{job.mode}, {job.num_frames} frames of {job.height} x {job.width}, {job.dtype}"
        return f"{title}\n{memory.format_estimate(parts)}"

    def report(self, result) -> None:
        if not self.quiet:
            print(f"seed: {result.seed}\n{result.stages()}")


@dataclass(frozen=True, kw_only=True)
class VideoSteps:
    """How a video is sampled."""

    guidance_scale: Guidance = None
    """Weight of the prompt; at most 1 turns guidance off and halves the time."""
    flow_shift: Annotated[float | None, own("FLOAT", "the folder's, else 3")] = None
    """More puts more steps at high noise: 3 for 480p, 5 for 720p."""
    solver: Annotated[
        Literal["unipc", "euler", "lcm"] | None,
        own("{unipc,euler,lcm}", "the model's, else unipc"),
    ] = None
    """Solver of the video's steps; lcm is for distilled models."""
    sigmas: Grid = ()
    """In place of --num-inference-steps, where the video's steps begin: falling numbers, at most 1,
    before --flow-shift."""
    timesteps: Grid = ()
    """In place of either, the network's own times, from at most 1000, after the shift."""
    text_steps: Annotated[int | None, own("INT", "the video's")] = None
    """Steps of the caption in t2vt, on a grid of its own."""

    def settings(self, mode: str, sampling: Sampling) -> dict:
        """What `schedule.settle` takes."""
        names = "guidance_scale flow_shift solver text_steps".split()
        grids = {"sigmas": self.sigmas or None, "timesteps": self.timesteps or None}
        common = {name: getattr(sampling, name) for name in ("num_inference_steps", "sampler")}
        return {"mode": mode} | {name: getattr(self, name) for name in names} | grids | common
