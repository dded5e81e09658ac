"""Sampling: t2v, t2vt and v2t are three corners of one square of (video time, text time), so one
step serves all.

A `Run` moves the video, the text or both; what does not move is clean, at time 0. Guidance runs the
prompt and its null as one batch of 2B. The null pass keeps the text rows, as the official model
does: guidance removes the cross-attention path alone. Legend: B samples, T text rows, C context
rows, N steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import flow
from engine.errors import NonFinite, UsageError
from engine.model import UniViGU
from univigu_kernels.flow_step import SolverState, TextUpdate, VideoUpdate

SAMPLERS = ("exact", "legacy")
TEXT_STREAM = 0x7E57  # keeps a seed's text noise apart from its video noise


@dataclass(frozen=True)
class Schedule:
    """Constants of a run, one entry per step. coefficients or probabilities None: that modality
    stands still.

    video_times, text_times: the network's clock [0, 1000]. text_flow: t in [0, 1], N + 1 entries.
    last_argmax: after the loop, one more evaluation at times 0 whose argmax is the text (official
    t2vt).
    """

    video_times: list[float]
    text_times: list[float]
    coefficients: list[list[float]] | None = None
    text_flow: list[float] | None = None
    probabilities: list[float] | None = None
    last_argmax: bool = False


def schedule(
    mode: str, steps: int, shift: float, solver: str, sampler: str, exponent: float = 1.0
) -> Schedule:
    """mode "t2v", "t2vt" or "v2t"; solver "euler" or "unipc" for the video; sampler "exact" or
    "legacy" for the text.

    exact: text on its own grid t_i = i/steps with the exact jump probability. legacy, for parity
    with the official code: in v2t the probability 1 - exp(-h kappa'/(1 - kappa)); in t2vt the text
    clock follows the video's shifted one and tokens are replaced with probability i/(steps - 1).
    """
    still = [0.0] * steps
    grid = [i / steps for i in range(steps + 1)]
    times, table = flow.video_schedule(solver, steps, shift)
    video = {"video_times": times.tolist(), "coefficients": table.tolist()}
    if mode == "t2v":
        return Schedule(text_times=still, **video)
    text_times = flow.text_time(torch.tensor(grid[:-1])).tolist()
    jumps = [flow.jump_probability(a, b, exponent) for a, b in zip(grid, grid[1:], strict=False)]
    if sampler == "legacy":
        if mode == "t2vt":
            heuristic = [flow.legacy_probability(i, steps) for i in range(steps)]
            return Schedule(
                text_times=times.tolist(),
                text_flow=grid,
                probabilities=heuristic,
                last_argmax=True,
                **video,
            )
        jumps = [1 - math.exp(-1 / (steps - i)) for i in range(steps - 1)] + [1.0]
    if mode == "v2t":
        video = {"video_times": still}
    return Schedule(text_times=text_times, text_flow=grid, probabilities=jumps, **video)


def video_noise(shape: tuple[int, ...], seeds: list[int], device) -> Tensor:
    """Standard normal fp32 [len(seeds), *shape], drawn on the CPU one sample per seed: a batch
    equals its singles."""
    draws = [
        torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.cat(draws).to(device)


def text_source(model: UniViGU, rows: int, seeds: list[int]) -> Tensor:
    """The text at t = 0, one generator per seed: ids [B,T] (uniform, or the mask id), or Gaussian
    vectors [B,T,D]."""
    cfg, device = model.cfg, model.vocab_embed.weight.device
    if cfg.mask_source:
        return torch.full((len(seeds), rows), cfg.vocab, device=device)
    generators = [torch.Generator().manual_seed(seed ^ TEXT_STREAM) for seed in seeds]
    if cfg.text_flow == "embedding":
        return torch.stack([torch.randn(rows, cfg.dim, generator=g) for g in generators]).to(device)
    return torch.stack([torch.randint(cfg.vocab, (rows,), generator=g) for g in generators]).to(
        device
    )


class Run:
    """One sampling run. `steps()` advances it; between two steps `latents` and `tokens` may be read
    or replaced.

    latents [B,16,F,Y,X] fp32, noise or clean; tokens [B,T] ids or [B,T,D] vectors, source or clean;
    text_lengths [B] or None; context [B,C,text_dim]; null_context the same or None (no guidance);
    seeds: one per sample.
    """

    def __init__(self, model, schedule, latents, tokens, context, null_context=None, guidance=1.0,
                 text_lengths=None, seeds=(0,), temperature=1.0):  # fmt: skip
        self.model, self.schedule, self.temperature = model, schedule, temperature
        self.guidance, self.guided = (
            guidance,
            null_context is not None and schedule.coefficients is not None,
        )
        self.video = SolverState(latents, latents, latents, latents)
        self.tokens, self.text_lengths = tokens, text_lengths
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=latents.device)
        self.copies = 2 if self.guided else 1
        with torch.no_grad():
            self.context = model.encode_context(
                torch.cat([context, null_context]) if self.guided else context
            )

    @property
    def latents(self) -> Tensor:
        return self.video.x

    @latents.setter
    def latents(self, value: Tensor) -> None:
        self.video = self.video._replace(x=value)

    @torch.no_grad()
    def steps(self) -> Iterator[int]:
        """Runs the loop, yielding the index of each finished step."""
        for i in range(len(self.schedule.video_times)):
            self._step(i)
            yield i
        if self.schedule.last_argmax:
            h_BTD = self._features(0.0, 0.0)[: len(self.tokens), -self.tokens.shape[1] :]
            self.tokens = self.model.text_head.linear(h_BTD).argmax(-1)

    def _inputs(self, time_video: float, time_text: float):
        repeat = (self.copies,)
        B = len(self.latents) * self.copies
        video = self.latents.repeat(*repeat, 1, 1, 1, 1)
        tokens = self.tokens.repeat(*repeat, *[1] * (self.tokens.ndim - 1))
        lengths = None if self.text_lengths is None else self.text_lengths.repeat(*repeat)
        times = [
            torch.full((B,), t, dtype=torch.float32, device=video.device)
            for t in (time_video, time_text)
        ]
        return video, tokens, *times, self.context, lengths

    def _features(self, time_video: float, time_text: float) -> Tensor:
        return self.model.features(*self._inputs(time_video, time_text))

    def _step(self, i: int) -> None:
        """One uni-flow step: one evaluation of the model, then one update of all that moves."""
        plan, model, B, T = self.schedule, self.model, len(self.latents), self.tokens.shape[1]
        h_BLD = self._features(plan.video_times[i], plan.text_times[i])
        video = text = None
        if plan.coefficients is not None:
            velocity, *null = model.velocity(h_BLD, (len(h_BLD), *self.latents.shape[1:])).split(B)
            if not (velocity.isfinite().all() and all(n.isfinite().all() for n in null)):
                self._fail(i)
            row = plan.coefficients[i]
            video = VideoUpdate(self.video, velocity, null[0] if null else None, self.guidance, row)
        if plan.probabilities is not None:
            head, h_BTD = model.text_head.linear, h_BLD[:B, h_BLD.shape[1] - T :]
            if not h_BTD.isfinite().all():
                self._fail(i)
            if model.cfg.text_flow == "embedding":
                self.tokens = (
                    self.tokens + (plan.text_flow[i + 1] - plan.text_flow[i]) * head(h_BTD).float()
                )
            else:
                draw, _ = model.ops.vocab_sample(
                    h_BTD, head.weight, head.bias, self.seeds, i, self.temperature
                )
                text = TextUpdate(self.tokens, draw, plan.probabilities[i], self.seeds, i)
        state, tokens = model.ops.flow_step(video, text)
        self.video = self.video if state is None else state
        self.tokens = self.tokens if tokens is None else tokens

    def _fail(self, i: int) -> None:
        """Evaluates the step once more to name the first block that is not finite."""
        first = []
        hooks = [
            block.register_forward_hook(
                lambda _, __, out, n=n: (
                    None if out[0].isfinite().all() else first.append(f"block {n}")
                )
            )
            for n, block in enumerate(self.model.blocks)
        ]
        try:
            self._features(self.schedule.video_times[i], self.schedule.text_times[i])
        finally:
            for hook in hooks:
                hook.remove()
        where = (
            "the input latents"
            if not self.latents.isfinite().all()
            else (first or ["the heads"])[0]
        )
        raise NonFinite(
            f"sample: the model's output must be finite; "
            f"got NaN or Inf in step {i}, first in {where}. "
            f"Try kernels=reference or dtype float32."
        )


def decode_tokens(model: UniViGU, tokens: Tensor) -> Tensor:
    """Text rows -> token ids [B,T]: themselves, or the nearest rows of the embedding matrix."""
    if model.cfg.text_flow == "embedding":
        return flow.nearest_tokens(model.vocab_embed.weight, tokens)
    return tokens


def check_choices(mode: str, solver: str, sampler: str, cfg) -> None:
    for name, value, known in (
        ("mode", mode, ("t2v", "t2vt", "v2t")),
        ("solver", solver, ("euler", "unipc")),
        ("sampler", sampler, SAMPLERS),
    ):
        if value not in known:
            raise UsageError(f"sample: {name} must be one of {', '.join(known)}; got {value!r}.")
    if sampler == "legacy" and cfg.text_flow == "embedding":
        raise UsageError("sample: sampler must be exact with text_flow=embedding; got 'legacy'.")
