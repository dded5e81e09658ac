"""Pixels and strings in, pixels and strings out: VAE, text encoder and tokenizer around the
sampler.

A pipeline folder holds transformer/, vae/, text_encoder/, tokenizer/ and, where it is ours,
pipeline.json. diffusers' Wan folders are read as they are. Legend: B samples, N frames, H,W pixels,
C context rows, T text rows.
"""

import json
import resource
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import sample, schedule
from engine.config import FRAME_STRIDE, PipelineConfig, check_size, read_pipeline_config
from engine.errors import Cancelled, ModelFileError, NonFinite, UsageError
from engine.graphs import Ahead, Graphs, warm_up
from engine.media import TextEncoder, read_video
from engine.media.vae import decode, encode, latent_scale, load_vae
from engine.model import UniViGU
from engine.parallel import Ranks
from engine.planning import memory
from engine.result import Clock, Result
from engine.weights import load_model, read_around, read_transformer

EMBEDDED = Path(__file__).parent / "assets" / "tiny"  # the model that comes with the package


class Pipeline:
    """`from_pretrained`, `generate`, `caption`; and `encode_video`, `decode_video`,
    `encode_prompts` for data work."""

    def __init__(self, model: UniViGU | None, vae, text: TextEncoder, config: PipelineConfig):
        self.model, self.vae, self.text, self.config = model, vae, text, config
        self.graphs: Graphs | None = None
        self.ahead = None if model is None else Ahead(model)
        self.ranks: Ranks | None = None
        self.first = True  # of the ranks: it has the results
        self.device = next(vae.parameters()).device
        self.mean, self.std = latent_scale(vae, config.latent_space)

    @classmethod
    def from_pretrained(
        cls,
        path,
        device="cpu",
        dtype=torch.float32,
        kernels: str = "auto",
        precision: str | None = None,
        transformer_path=None,
        cuda_graphs: bool | None = None,
        offload: str = "none",
        vae_tiling: bool = False,
        world=None,
    ) -> "Pipeline":
        """path: a pipeline folder; transformer_path: another model for its VAE and text encoder.
        precision: "bf16" (not quantised), "fp8", or None: as in the file. cuda_graphs: capture the
        steps and replay them; None: on a CUDA device. The VAE runs in fp32, the text encoder in
        `dtype`. offload: "text_encoder" keeps it on the CPU and copies it to the device for
        encoding alone. vae_tiling: the VAE works on 256 x 256 pixels at a time, blended where they
        meet. world: the `engine.parallel.World` whose ranks make every sample together, by its
        dimensions sp and cfg, each on its own device and with the same calls; rank 0 gets the
        results, the others None. Errors: UsageError, ModelFileError, OutOfMemory."""
        device = device if world is None else world.device
        capturable = torch.device(device).type == "cuda" and world is None
        if cuda_graphs and not capturable:
            where = device if world is None else "several ranks"
            raise UsageError(
                f"pipeline: cuda_graphs must be left out on {where}; got True. Leave it out."
            )

        def job() -> dict:
            cfg, stored = read_transformer(transformer_path or path)
            known = {"dtype": dtype, "precision": precision or stored, "offload": offload}
            return known | {"cfg": cfg, "around": read_around(path), "device": str(device)}

        with memory.stage(memory.LOADING, job):
            pipe = cls.without_model(path, device, dtype, offload, vae_tiling)
            source, once = transformer_path or path, world and world.once
            model = load_model(source, device, dtype, kernels, precision, pipe.config.case, once)
        pipe.model, pipe.ahead = model.eval(), Ahead(model)
        pipe.graphs = Graphs() if capturable and cuda_graphs is not False else None
        if world is not None:
            pipe.ranks, pipe.first = Ranks(world, pipe.model), world.rank == 0
        return pipe

    @classmethod
    def without_model(
        cls, path, device="cpu", dtype=torch.float32, offload="none", vae_tiling=False
    ) -> "Pipeline":
        """VAE, text encoder and configuration alone, as `preprocess` needs them."""
        if offload not in ("none", "text_encoder"):
            raise UsageError(f"pipeline: offload must be none or text_encoder; got {offload!r}.")
        path = Path(path)
        if not path.is_dir():
            raise ModelFileError(
                f"pipeline: {path} must be a folder; got none there. Check --model-path."
            )
        vae = load_vae(path, device, vae_tiling)
        text = TextEncoder.from_pretrained(path, device, dtype, offload == "text_encoder")
        return cls(None, vae, text, read_pipeline_config(path))

    def save_config(self, path: str | Path) -> None:
        (Path(path) / "pipeline.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    def job_of(self, shape: tuple[int, ...], **job) -> dict:
        """What `memory.stage` asks, of work on latents of `shape` [B,16,F,Y,X]; job: more fields of
        `memory.Job`."""
        batch, _, frames, height, width = shape
        fields = {
            "batch": batch,
            "num_frames": 4 * frames - 3,
            "height": 8 * height,
            "width": 8 * width,
            "context_rows": self.config.context_rows,
            "text_rows": self.config.text_rows,
            "device": self.device.type,
            "offload": "text_encoder" if self.text.offloaded else "none",
            "vae_tiling": self.vae.use_tiling,
        }
        parts, vae = (self.text.encoder, self.vae), self.vae.config
        counts = (sum(p.numel() for p in part.parameters()) for part in parts)
        around = memory.Around(*counts, vae.base_dim, vae.patch_size or 1)
        if self.model is not None:
            fields |= {"cfg": self.model.cfg, "dtype": self.model.dtype}
        return fields | {"around": around} | job

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [B,N,H,W,3] -> latents fp32 [B,16,F,H/8,W/8], the posterior's mode, in the model's
        latent space."""
        B, N, height, width, _ = frames.shape
        shape = B, 16, (N - 1) // FRAME_STRIDE + 1, height // 8, width // 8
        with memory.stage(memory.ENCODING, partial(self.job_of, shape)):
            return encode(self.vae, frames, self.mean, self.std)

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> np.ndarray:
        """latents fp32 [B,16,F,Y,X] -> uint8 [B,N,H,W,3]. Errors: NonFinite."""
        self._make_room(latents.shape)
        with memory.stage(memory.DECODING, partial(self.job_of, latents.shape)):
            pixels = decode(self.vae, latents, self.mean, self.std)
            if not pixels.isfinite().all():
                raise NonFinite(
                    "pipeline: decoded pixels must be finite; got NaN or Inf in the VAE. "
                    "No video was written."
                )
            pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
            return (pixels * 255).round().to(torch.uint8).cpu().numpy()

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """-> context [B, C, text_dim]; rows after a prompt's last token are zeros. "" is guidance's
        null."""
        return self._encode(prompts, allow_empty=True)

    def _encode(self, prompts: list[str], allow_empty: bool = False) -> Tensor:
        shape = len(prompts), *self.config.shape()
        with memory.stage(memory.TEXT, partial(self.job_of, shape)):
            return self.text.encode(prompts, self.config.context_rows, allow_empty).context

    def warm_up(self, mode: str = "t2v", **settings) -> int:
        """Compiles, in parallel, what `generate` ("t2v", "t2vt") or `caption` ("v2t") of these
        settings would launch on a CUDA device and what was never compiled there: once, for Triton
        keeps it on disk. Both do the same before their first step. -> how many kernels that were;
        0 on a CPU.

        settings, with the defaults of `generate` and `caption`: batch (1), num_frames, height,
        width, text_rows, guidance_scale, video_cache, num_inference_steps, solver, sampler,
        text_steps, temperature, commit, progress; prompt_tokens, of t2v: lengths of prompts, of
        which multiples of 16 have kernels of their own ((20, 32)). Errors: UsageError."""
        return warm_up(self.ahead, self.config, mode, **settings)

    def generate(
        self,
        prompt: str | list[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        flow_shift: float = 3.0,
        seed: int | list[int] = 0,
        mode: str = "t2v",
        negative_prompt: str = "",
        solver: str = "unipc",
        sampler: str = "exact",
        text_rows: int | None = None,
        text_steps: int | None = None,
        temperature: float = 1.0,
        commit: str = "jump",
        callback_on_step_end: Callable | None = None,
        cancel: threading.Event | None = None,
        progress: bool = True,
    ) -> Result | list[Result] | None:
        """Prompt to video ("t2v") or to video and caption ("t2vt"). A list of prompts gives a list
        of results.

        Sizes default to the folder's own. seed: one per prompt, or one from which prompt i takes
        seed + i; a batch of N equals N singles. text_rows: rows of the text stream (t2v: 0 leaves
        it out). text_steps: of t2vt's text, on its own grid; None: as many as the video's. commit:
        "jump" (each token by itself, as the flow says) or "confidence" (as many as are due, the
        surest first, and they stay). temperature: of their draw; 0 takes the most probable.
        callback_on_step_end(pipe, step, time, {"latents", "tokens"}) may return a dict with
        "latents" to replace them. cancel: an Event, checked each step; set, it raises Cancelled. In
        t2v the prompt enters twice, as context and as clean text rows; the guidance null keeps the
        rows. Errors: UsageError, OutOfMemory, NonFinite (step and block named)."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = {
            "mode": mode,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "flow_shift": flow_shift,
            "solver": solver,
            "sampler": sampler,
            "text_steps": text_steps,
            "temperature": temperature,
            "commit": commit,
        }
        choices = solver, sampler, num_inference_steps, text_steps, temperature, commit
        rows = self._check(mode, ("t2v", "t2vt"), text_rows, *choices)
        shape, seeds = self.config.shape(num_frames, height, width), self._seeds(seed, len(prompts))
        clock = Clock()
        context = self._encode(prompts)
        null = self.encode_prompts([negative_prompt] * len(prompts)) if guidance_scale > 1 else None
        latents = sample.video_noise(shape, seeds, self.device)
        tokens, lengths = sample.text_source(self.model, rows, seeds), None
        if mode == "t2v":
            tokens, lengths = self._prompt_rows(prompts, rows)
        clock.lap("encode")
        plan = schedule.schedule(mode, num_inference_steps, flow_shift, solver, sampler, text_steps)
        inputs = plan, latents, tokens, context, null, guidance_scale, lengths, seeds, temperature
        run = self._denoise(clock, (progress, callback_on_step_end, cancel), *inputs, commit)
        if not self.first:
            return None
        frames = self.decode_video(run.latents)
        captions = self._captions(run) if mode == "t2vt" else [None] * len(prompts)
        clock.lap("decode")
        results = self._results(frames, captions, seeds, prompts, clock, settings)
        return results[0] if isinstance(prompt, str) else results

    def caption(
        self,
        video,
        num_inference_steps: int = 50,
        video_cache: str | int = "exact",
        seed: int | list[int] = 0,
        sampler: str = "exact",
        text_rows: int | None = None,
        temperature: float = 1.0,
        commit: str = "jump",
        report_drift: bool = False,
        callback_on_step_end: Callable | None = None,
        cancel: threading.Event | None = None,
        progress: bool = True,
    ) -> Result | list[Result] | None:
        """Video to caption. video: a path, uint8 frames [N,H,W,3], or a batch [B,N,H,W,3] (gives a
        list of results).

        The condition is zeros. video_cache: "exact" computes every video row in every step;
        "frozen" in the first step alone, after which text rows attend to the K and V kept from it;
        a number k in every k-th step. Both are exact for a model with video_sees_text=False and an
        approximation for others. report_drift: run the exact path too; Result.drift then has the
        share of tokens equal to those of exact and jump, and the relative change of the kept K and
        V by the end. commit and temperature as in `generate`. Errors: UsageError, ModelFileError
        (unreadable video), OutOfMemory, NonFinite.
        """
        choices = "euler", sampler, num_inference_steps, None, temperature, commit
        rows = self._check("v2t", ("v2t",), text_rows, *choices)
        refresh_every = schedule.refresh_every(video_cache, num_inference_steps)
        clock = Clock()
        frames, single = self._frames(video)
        check_size(*frames.shape[1:4])
        seeds = self._seeds(seed, len(frames))
        latents = self.encode_video(torch.from_numpy(frames))
        context = torch.zeros(
            len(frames), self.config.context_rows, self.model.cfg.text_dim, device=self.device
        )
        tokens = sample.text_source(self.model, rows, seeds)
        clock.lap("encode")
        plan = schedule.schedule("v2t", num_inference_steps, 1.0, "euler", sampler)
        inputs = plan, latents, tokens, context, None, 1.0, None, seeds, temperature
        loop = progress, callback_on_step_end, cancel
        run = self._denoise(clock, loop, *inputs, commit, refresh_every)
        captions, drift = self._captions(run), [None] * len(frames)
        if report_drift:
            found, change = run.tokens, run.cache_change()
            exact = self._denoise(Clock(), (progress, None, cancel), *inputs)
            drift = sample.drift(exact.tokens, found, change)
            clock.lap("drift")
        if not self.first:
            return None
        settings = {
            "mode": "v2t",
            "num_inference_steps": num_inference_steps,
            "sampler": sampler,
            "video_cache": video_cache,
            "temperature": temperature,
            "commit": commit,
        }
        results = self._results(frames, captions, seeds, [None] * len(seeds), clock, settings)
        for result, measured in zip(results, drift, strict=True):
            result.drift = measured
        return results[0] if single else results

    def _check(self, mode, modes, text_rows: int | None, *choices) -> int:
        """-> rows of the text stream."""
        rows = self.config.text_rows if text_rows is None else text_rows
        if mode not in modes:
            raise UsageError(
                f"generate: mode must be one of {', '.join(modes)}; got {mode!r}. "
                "v2t is pipe.caption."
            )
        schedule.check_choices(self.model.cfg, mode, *choices)
        if rows < (mode != "t2v"):
            raise UsageError(
                f"sample: text_rows must be at least 1 for {mode}; got {rows}. Give text_rows."
            )
        return rows

    def _seeds(self, seed: int | list[int], count: int) -> list[int]:
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise UsageError(
                f"sample: seed must be one number or {count} of them; got {len(seeds)}."
            )
        return seeds

    def _prompt_rows(self, prompts: list[str], rows: int) -> tuple[Tensor, list[int] | None]:
        """Prompts as clean text rows and their lengths; the embedding flow takes the tokens'
        vectors."""
        if rows == 0:
            return sample.text_source(self.model, 0, [0] * len(prompts)), None
        encoded = [self.text.encode_rows(p, rows) for p in prompts]
        ids = torch.stack([i for i, _ in encoded]).to(self.device)
        if self.model.cfg.text_flow == "embedding":
            ids = sample.flow.unit_vectors(self.model.vocab_embed(ids))
        return ids, [n for _, n in encoded]

    def _frames(self, video) -> tuple[np.ndarray, bool]:
        if isinstance(video, str | Path):
            return read_video(video).frames[None], True
        frames = np.asarray(video)
        if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3:
            got = f"{frames.dtype} {list(frames.shape)}"
            raise UsageError(
                f"caption: video must be a path or uint8 [N,H,W,3] or [B,N,H,W,3]; got {got}."
            )
        return (frames[None], True) if frames.ndim == 4 else (frames, False)

    def _denoise(self, clock: Clock, loop: tuple, plan, latents, *inputs) -> sample.Run:
        """A finished run. inputs: of `sample.Run`; loop: progress, callback, cancel."""
        tokens, _, null = inputs[:3]
        job = partial(
            self.job_of,
            latents.shape,
            mode="v2t" if plan.coefficients is None else "t2vt",
            guided=null is not None,
            steps=len(plan),
            text_rows=tokens.shape[1],
            precision=self.model.ops.precision,
        )
        if self.ranks is None and self.ahead(plan, latents, *inputs, progress=loop[0]):
            clock.lap("compile")
        captured = 0 if self.graphs is None else len(self.graphs.reports)
        with memory.stage(memory.DENOISING, job):
            how = {"graphs": self.graphs, "ranks": self.ranks}
            run = sample.Run(self.model, plan, latents, *inputs, **how)
            self._loop(run, *loop)
        clock.lap("denoise")
        if self.graphs is not None:
            captures = self.graphs.reports[captured:]
            clock.laps["of which capture"] = round(sum(report.seconds for report in captures), 4)
        return run

    def _make_room(self, shape: tuple[int, ...]) -> None:
        """Gives captured steps back where decoding would not fit beside them."""
        if self.graphs is None:
            return
        job = self.job_of(shape)
        job.pop("cfg", None)
        around = job.pop("around")
        needed = memory.vae_peak(memory.Job(**job), around, memory.DECODER_UNITS)
        if needed > torch.cuda.mem_get_info(self.device)[0]:
            self.graphs.release()

    def _loop(self, run: sample.Run, progress: bool, callback, cancel) -> None:
        times = run.schedule.video_times
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        hidden = not (progress and self.first)
        for i in tqdm(run.steps(), total=len(times), disable=hidden, leave=False):
            if callback is not None:
                state = {"latents": run.latents, "tokens": run.tokens}
                changed = callback(self, i, times[i], state) or {}
                run.latents = changed.get("latents", run.latents)
            if cancel is not None and run.step.share.any(cancel.is_set()):
                raise Cancelled(f"sample: cancelled after step {i} of {len(times)}.")

    def _captions(self, run: sample.Run) -> list[str]:
        return [self.text.decode_rows(ids) for ids in sample.decode_tokens(self.model, run.tokens)]

    def _results(self, frames, captions, seeds, prompts, clock, settings) -> list[Result]:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        backends = {choice.op: choice.backend for choice in self.model.ops.table}
        run = (clock.laps, backends, peak)
        return [
            Result(frame, caption, seed, *run, prompt, self.config.fps, settings)
            for frame, caption, seed, prompt in zip(frames, captions, seeds, prompts, strict=True)
        ]
