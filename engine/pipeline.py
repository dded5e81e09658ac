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
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import sample
from engine.errors import Cancelled, MissingPackage, ModelFileError, NonFinite, UsageError
from engine.model import UniViGU
from engine.result import Clock, Result
from engine.text import TextEncoder
from engine.weights import load_model

FRAME_STRIDE, PIXEL_STRIDE = 4, 16  # the VAE's 4 x 8 x 8 and the 2 x 2 patch


@dataclass(frozen=True)
class PipelineConfig:
    """What a folder says about itself in pipeline.json; the defaults are Wan2.1's.

    latent_space: "normalized" (the model works on (z - mean) / std) or "raw". context_rows: rows of
    the prompt. text_rows: rows of the text stream; 0 where the model has no trained text branch.
    """

    latent_space: str = "normalized"
    context_rows: int = 512
    text_rows: int = 256
    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16


def nearest_valid(what: str, value: int, stride: int, offset: int) -> None:
    """Raises UsageError with the two nearest of stride * k + offset."""
    if value < 1 or (value - offset) % stride:
        low = (value - offset) // stride * stride + offset
        rule = f"{stride}k+1" if offset else f"a multiple of {stride}"
        near = [v for v in (low, low + stride) if v > 0]
        raise UsageError(
            f"size: {what} must be {rule}; got {value}. Nearest: {' or '.join(map(str, near))}."
        )


def check_size(num_frames: int, height: int, width: int) -> None:
    nearest_valid("num_frames", num_frames, FRAME_STRIDE, 1)
    nearest_valid("height", height, PIXEL_STRIDE, 0)
    nearest_valid("width", width, PIXEL_STRIDE, 0)


def _read_config(path: Path) -> PipelineConfig:
    file = path / "pipeline.json"
    if not file.exists():
        return PipelineConfig(text_rows=0)
    try:
        record = json.loads(file.read_text())
        unknown = set(record) - {f.name for f in fields(PipelineConfig)}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        return PipelineConfig(**record)
    except (ValueError, TypeError) as error:
        raise ModelFileError(
            f"pipeline: {file} must be a pipeline configuration; got {error}."
        ) from None


def _load_vae(path: Path, device):
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise MissingPackage(
            f"pipeline: diffusers must be installed; got {error}. Install the extra models."
        ) from error
    if not (path / "vae" / "config.json").is_file():
        raise ModelFileError(
            f"pipeline: {path} must hold vae/config.json; got none. Give a pipeline folder."
        )
    try:
        vae = AutoencoderKLWan.from_pretrained(
            path / "vae",
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelFileError(
            f"pipeline: {path / 'vae'} must hold an AutoencoderKLWan; got {error}."
        ) from None
    return vae.to(device).eval().requires_grad_(False)


EMBEDDED = Path(__file__).parent / "assets" / "tiny"  # the model that comes with the package


class Pipeline:
    """`from_pretrained`, `generate`, `caption`; and `encode_video`, `decode_video`,
    `encode_prompts` for data work."""

    def __init__(self, model: UniViGU | None, vae, text: TextEncoder, config: PipelineConfig):
        self.model, self.vae, self.text, self.config = model, vae, text, config
        self.device = device = next(vae.parameters()).device
        shape = (1, -1, 1, 1, 1)
        normalized = config.latent_space == "normalized"
        mean, std = vae.config.latents_mean, vae.config.latents_std
        self.mean = torch.tensor(mean if normalized else 0.0, device=device).view(shape)
        self.std = torch.tensor(std if normalized else 1.0, device=device).view(shape)

    @classmethod
    def from_pretrained(
        cls,
        path,
        device="cpu",
        dtype=torch.float32,
        kernels: str = "auto",
        precision: str = "bf16",
        transformer_path=None,
    ) -> "Pipeline":
        """path: a pipeline folder; transformer_path: another model for its VAE and text encoder.
        The VAE runs in fp32, the text encoder in `dtype`. Errors: ModelFileError."""
        pipe = cls.without_model(path, device, dtype)
        model = load_model(transformer_path or path, device, dtype, kernels, precision)
        pipe.model = model.eval()
        return pipe

    @classmethod
    def without_model(cls, path, device="cpu", dtype=torch.float32) -> "Pipeline":
        """VAE, text encoder and configuration alone, as `preprocess` needs them."""
        path = Path(path)
        if not path.is_dir():
            raise ModelFileError(
                f"pipeline: {path} must be a folder; got none there. Check --model-path."
            )
        vae = _load_vae(path, device)
        return cls(None, vae, TextEncoder.from_pretrained(path, device, dtype), _read_config(path))

    def save_config(self, path: str | Path) -> None:
        (Path(path) / "pipeline.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """uint8 [B,N,H,W,3] -> latents fp32 [B,16,F,H/8,W/8], the posterior's mode, in the model's
        latent space."""
        pixels = frames.to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return (self.vae.encode(pixels).latent_dist.mode() - self.mean) / self.std

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> np.ndarray:
        """latents fp32 [B,16,F,Y,X] -> uint8 [B,N,H,W,3]. Errors: NonFinite."""
        pixels = self.vae.decode(latents.float() * self.std + self.mean).sample
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
        return self.text.encode(prompts, self.config.context_rows, allow_empty=True).context

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
        callback_on_step_end: Callable | None = None,
        cancel: threading.Event | None = None,
        progress: bool = True,
    ) -> Result | list[Result]:
        """Prompt to video ("t2v") or to video and caption ("t2vt"). A list of prompts gives a list
        of results.

        Sizes default to the folder's own. seed: one per prompt, or one from which prompt i takes
        seed + i; a batch of N equals N singles. text_rows: rows of the text stream (t2v: 0 leaves
        it out). callback_on_step_end(pipe, step, time, {"latents", "tokens"}) may return a dict
        with "latents" to replace them. cancel: an Event, checked each step; set, it raises
        Cancelled. In t2v the prompt enters twice, as context and as clean text rows, and the
        guidance null keeps the rows. Errors: UsageError, NonFinite (step and block named, nothing
        decoded).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = {"mode": mode, "num_inference_steps": num_inference_steps,
                    "guidance_scale": guidance_scale, "flow_shift": flow_shift,
                    "solver": solver, "sampler": sampler}  # fmt: skip
        rows = self.config.text_rows if text_rows is None else text_rows
        self._check(mode, ("t2v", "t2vt"), solver, sampler, num_inference_steps, rows)
        shape, seeds = self._shape(num_frames, height, width), self._seeds(seed, len(prompts))
        clock = Clock()
        context = self.text.encode(prompts, self.config.context_rows).context
        guided = guidance_scale > 1
        null = self.encode_prompts([negative_prompt] * len(prompts)) if guided else None
        latents = sample.video_noise(shape, seeds, self.device)
        if mode == "t2v":
            tokens, lengths = self._prompt_rows(prompts, rows)
        else:
            tokens, lengths = sample.text_source(self.model, rows, seeds), None
        clock.lap("encode")
        plan = sample.schedule(mode, num_inference_steps, flow_shift, solver, sampler)
        run = sample.Run(
            self.model, plan, latents, tokens, context, null, guidance_scale, lengths, seeds
        )
        self._loop(run, progress, callback_on_step_end, cancel)
        clock.lap("denoise")
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
        callback_on_step_end: Callable | None = None,
        cancel: threading.Event | None = None,
        progress: bool = True,
    ) -> Result | list[Result]:
        """Video to caption. video: a path, uint8 frames [N,H,W,3], or a batch [B,N,H,W,3] (gives a
        list of results).

        The condition is zeros. video_cache: "exact" evaluates all rows in every step; nothing else
        is built yet. Errors: UsageError, ModelFileError (unreadable video), NonFinite.
        """
        if video_cache != "exact":
            raise UsageError(
                f"caption: video_cache must be exact in this version; got {video_cache!r}."
            )
        rows = self.config.text_rows if text_rows is None else text_rows
        self._check("v2t", ("v2t",), "euler", sampler, num_inference_steps, rows)
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
        plan = sample.schedule("v2t", num_inference_steps, 1.0, "euler", sampler)
        run = sample.Run(self.model, plan, latents, tokens, context, seeds=seeds)
        self._loop(run, progress, callback_on_step_end, cancel)
        captions = self._captions(run)
        clock.lap("denoise")
        settings = {"mode": "v2t", "num_inference_steps": num_inference_steps, "sampler": sampler}
        results = self._results(frames, captions, seeds, [None] * len(seeds), clock, settings)
        return results[0] if single else results

    def _check(self, mode, modes, solver, sampler, steps, rows) -> None:
        if mode not in modes:
            raise UsageError(
                f"generate: mode must be one of {', '.join(modes)}; got {mode!r}. "
                "v2t is pipe.caption."
            )
        sample.check_choices(mode, solver, sampler, self.model.cfg)
        if steps < 1:
            raise UsageError(f"sample: num_inference_steps must be at least 1; got {steps}.")
        if rows < (mode != "t2v"):
            raise UsageError(
                f"sample: text_rows must be at least 1 for {mode}; got {rows}. Give text_rows."
            )

    def _shape(self, num_frames, height, width) -> tuple[int, int, int, int]:
        """Latents of one sample; None takes the folder's own size."""
        own = self.config
        frames = own.num_frames if num_frames is None else num_frames
        height, width = (
            (own.height if height is None else height),
            (own.width if width is None else width),
        )
        check_size(frames, height, width)
        return 16, (frames - 1) // FRAME_STRIDE + 1, height // 8, width // 8

    def _seeds(self, seed: int | list[int], count: int) -> list[int]:
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise UsageError(
                f"sample: seed must be one number or {count} of them; got {len(seeds)}."
            )
        return seeds

    def _prompt_rows(self, prompts: list[str], rows: int) -> tuple[Tensor, Tensor | None]:
        """Prompts as clean text rows and their lengths; the embedding flow takes the tokens'
        vectors."""
        if rows == 0:
            empty = (
                (len(prompts), 0, self.model.cfg.dim)
                if self.model.cfg.text_flow == "embedding"
                else (len(prompts), 0)
            )
            return torch.zeros(
                empty, dtype=torch.float32 if len(empty) == 3 else torch.int64, device=self.device
            ), None
        encoded = [self.text.encode_rows(p, rows) for p in prompts]
        ids = torch.stack([i for i, _ in encoded]).to(self.device)
        if self.model.cfg.text_flow == "embedding":
            ids = sample.flow.token_vectors(self.model.vocab_embed.weight, ids)
        return ids, torch.tensor([n for _, n in encoded], device=self.device)

    def _frames(self, video) -> tuple[np.ndarray, bool]:
        if isinstance(video, str | Path):
            from engine.video import read_video

            return read_video(video).frames[None], True
        frames = np.asarray(video)
        if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3:
            got = f"{frames.dtype} {list(frames.shape)}"
            raise UsageError(
                f"caption: video must be a path or uint8 [N,H,W,3] or [B,N,H,W,3]; got {got}."
            )
        return (frames[None], True) if frames.ndim == 4 else (frames, False)

    def _loop(self, run: sample.Run, progress: bool, callback, cancel) -> None:
        times = run.schedule.video_times
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for i in tqdm(run.steps(), total=len(times), disable=not progress, leave=False):
            if callback is not None:
                changed = (
                    callback(self, i, times[i], {"latents": run.latents, "tokens": run.tokens})
                    or {}
                )
                run.latents = changed.get("latents", run.latents)
            if cancel is not None and cancel.is_set():
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
