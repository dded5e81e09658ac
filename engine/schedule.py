"""When each modality moves, and by how much: the constants of a sampling run."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from engine import flow
from engine.config import (
    GRIDS,
    GUIDANCE,
    HIGHEST,
    MOST_ROWS,
    NOT_NEGATIVE,
    SHIFT,
    SOLVERS,
    STEPS,
    PipelineConfig,
    Range,
    SamplingConfig,
    check_grid,
    checked,
    one_grid,
)
from engine.errors import UsageError

MODES, SAMPLERS, COMMITS = ("t2v", "t2vt", "v2t"), ("exact", "legacy"), ("jump", "confidence")
TEXT_ROWS = Range(0, MOST_ROWS)
NOISE_STREAM = 0xF2E5  # keeps the noise that solver "lcm" adds apart from a seed's first noise
USUAL = {"num_inference_steps": 50, "guidance_scale": 5.0}  # where nobody says another
FLOW_SHIFT, SOLVER = 3.0, "unipc"


@dataclass(frozen=True)
class Schedule:
    """One entry per evaluation of the network. A modality that does not move has no entries.

    video_times, text_times: the network's clock [0, 1000].
    video_moves, text_moves: whether this evaluation moves it.
    coefficients: rows of `flow_step`.
    probabilities: of a token's jump.
    text_deltas: t' - t.
    data_shares: share of data tokens after the evaluation, kappa(t').
    last_argmax: after the loop, one more evaluation at times 0 whose argmax is the text (official
        t2vt).
    noises: which fresh noise is added to the video after the evaluation.
    noise_scales: times which number; 0 after the last step. Of solver "lcm" with several steps.
    """

    video_times: list[float]
    text_times: list[float]
    video_moves: list[bool]
    text_moves: list[bool]
    coefficients: list[list[float]] | None = None
    probabilities: list[float] | None = None
    text_deltas: list[float] | None = None
    data_shares: list[float] | None = None
    last_argmax: bool = False
    noises: list[int] | None = None
    noise_scales: list[float] | None = None

    def __len__(self) -> int:
        return len(self.video_times)

    @property
    def noise_count(self) -> int:
        """Fresh noises of a sample: one between two steps of solver "lcm"."""
        return 0 if self.noises is None else max(self.noises) + 1


def _spread(steps: int, evaluations: int) -> tuple[list[int], list[bool]]:
    """The step that each evaluation belongs to, and whether it is the one that takes it."""
    step = [i * steps // evaluations for i in range(evaluations + 1)]
    return step[:-1], [a < b for a, b in zip(step, step[1:], strict=False)]


def schedule(
    mode: str,
    steps: int,
    shift: float,
    solver: str,
    sampler: str,
    text_steps: int | None = None,
    exponent: float = 1.0,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> Schedule:
    """Computes the constants of a run.

    mode: "t2v", "t2vt" or "v2t".
    steps: of the video; in v2t, of the text.
    shift: of the video's times towards noise; not read where timesteps are given.
    solver: of the video, "euler", "unipc" or "lcm".
    sampler: of the text. "exact": on its own grid t_j = j/text_steps with the exact jump
        probability. "legacy", for parity with the official code: in v2t the probability
        1 - exp(-h kappa'/(1 - kappa)); in t2vt the text clock follows the video's shifted one and
        tokens are replaced with probability i/(steps - 1).
    text_steps: of t2vt's text, more or fewer than the video's (None: the same number): the longer
        grid sets the evaluations, the other modality moves in some of them.
    exponent: of the text's kappa(t) = t ** exponent.
    sigmas, timesteps: where the video's steps begin, as in `flow.video_schedule`; as many as steps.
    """
    moves_video, moves_text = mode != "v2t", mode != "t2v"
    text_steps = steps if text_steps is None else text_steps
    evaluations = max(steps, text_steps) if mode == "t2vt" else steps
    video_step, video_moves = _spread(steps, evaluations)
    text_step, text_moves = _spread(text_steps, evaluations)

    still = [0.0] * evaluations
    times, table = flow.video_schedule(solver, steps, shift, sigmas, timesteps)
    plan = {
        "video_times": times[video_step].tolist() if moves_video else still,
        "coefficients": table[video_step].tolist() if moves_video else None,
        "video_moves": video_moves if moves_video else [False] * evaluations,
        "text_times": still,
        "text_moves": text_moves if moves_text else [False] * evaluations,
    }
    if moves_video and solver == "lcm" and steps > 1:
        plan["noises"] = [min(step, steps - 2) for step in video_step]
        plan["noise_scales"] = flow.fresh_noise_scales(table)[video_step].tolist()
    if not moves_text:
        return Schedule(**plan)

    grid = [j / text_steps for j in range(text_steps + 1)]
    jumps = [flow.jump_probability(a, b, exponent) for a, b in zip(grid, grid[1:], strict=False)]
    plan["text_times"] = flow.text_time(torch.tensor(grid)[text_step]).tolist()
    plan["text_deltas"] = [1 / text_steps] * evaluations
    plan["data_shares"] = [grid[j + 1] ** exponent for j in text_step]

    if sampler == "legacy" and mode == "t2vt":
        plan["text_times"], plan["last_argmax"] = plan["video_times"], True
        jumps = [flow.legacy_probability(i, steps) for i in range(steps)]
    elif sampler == "legacy":
        jumps = [1 - math.exp(-1 / (steps - i)) for i in range(steps - 1)] + [1.0]
    return Schedule(probabilities=[jumps[j] for j in text_step], **plan)


def said_by(config: PipelineConfig) -> list[tuple[str, SamplingConfig]]:
    """What a folder's pipeline.json says of sampling, for `settle`."""
    return [] if config.sampling is None else [("pipeline.json", config.sampling)]


def settle(
    asked: dict,
    records: Sequence[tuple[str, SamplingConfig]] = (),
    flow_shift: float = FLOW_SHIFT,
    solver: str = SOLVER,
) -> dict:
    """The settings of a run of `Pipeline.generate`: what is asked for and, where that is None, what
    the model says of itself, else the default.

    asked: mode, sampler, the GRIDS, flow_shift, solver, guidance_scale, text_steps; others stay.
    records: who says something, and what; the first that says a setting decides it.
    flow_shift, solver: where no record says them.

    Returns the same names, with num_inference_steps always a number, and sigmas or timesteps where
    they are in force; under "sampling" who decided which setting, if a record did.

    Errors: UsageError. Warns of guidance for a model that asks for none.
    """
    one_grid(asked)
    settings, sources = dict(asked), {}
    own_text = asked["mode"] == "t2vt" and asked["sampler"] == "exact"
    for source, record in records:
        for name, value in vars(record).items():
            rivals = GRIDS if name in GRIDS else (name,)
            free = name in asked and all(settings[rival] is None for rival in rivals)
            if value is not None and free and (own_text or name != "text_steps"):
                settings[name], sources[name] = value, source

    for name in HIGHEST:
        if settings[name] is None:
            del settings[name]
        else:
            settings[name] = list(check_grid(name, settings[name]))
            settings["num_inference_steps"] = len(settings[name])

    _check_shift(asked["flow_shift"], settings)
    _warn_of_guidance(asked["guidance_scale"], records)
    defaults = USUAL | {"solver": solver}
    if "timesteps" in settings:
        settings["flow_shift"] = None
        sources.pop("flow_shift", None)
    else:
        defaults["flow_shift"] = flow_shift
    settings |= {name: value for name, value in defaults.items() if settings[name] is None}
    return settings | ({"sampling": sources} if sources else {})


def _check_shift(flow_shift: float | None, settings: dict) -> None:
    if flow_shift is None:
        return
    checked("generate: flow_shift", flow_shift, float, SHIFT, None)
    if "timesteps" in settings:
        raise UsageError(
            "generate: flow_shift must be left out with timesteps, which are the network's own; "
            f"got {flow_shift} and {settings['timesteps']}. Give sigmas, which are shifted."
        )


def _warn_of_guidance(scale: float | None, records: Sequence[tuple[str, SamplingConfig]]) -> None:
    own = next((x for x in records if x[1].guidance_scale is not None), None)
    if scale is not None and own is not None and own[1].guidance_scale <= 1 < scale:
        warnings.warn(
            f"generate: guidance_scale {scale} is used, which takes twice the evaluations; "
            f"{own[0]} asks for {own[1].guidance_scale}. Leave guidance_scale out.",
            stacklevel=6,
        )


def choices(settings: dict) -> tuple:
    """Those of what `settle` returned that `check_choices` takes, in its order."""
    names = ("solver", "sampler", "num_inference_steps", "text_steps", "temperature", "commit")
    return *(settings[name] for name in names), settings["guidance_scale"]


def settled(settings: dict) -> Schedule:
    """The schedule of what `settle` returned."""
    names = ("mode", "num_inference_steps", "flow_shift", "solver", "sampler", "text_steps")
    given = {name: settings.get(name) for name in ("sigmas", "timesteps")}
    return schedule(*(settings[name] for name in names), **given)


def caption_steps(
    asked: int | None, records: Sequence[tuple[str, SamplingConfig]]
) -> tuple[int, dict]:
    """num_inference_steps of a run of `Pipeline.caption`, as `settle` finds it, and the setting
    "sampling" where a record decided."""
    if asked is not None:
        return asked, {}
    for source, record in records:
        if record.caption_steps is not None:
            return record.caption_steps, {"sampling": {"num_inference_steps": source}}
    return USUAL["num_inference_steps"], {}


class FreshNoise(NamedTuple):
    """What solver "lcm" adds to the latents after each evaluation; for others, three None.

    noise: fp32 [N,B,...], N different ones.
    numbers: int64 [E], which of them each evaluation adds.
    scales: fp32 [E], times what; 0 after the last step.
    """

    noise: Tensor | None = None
    numbers: Tensor | None = None
    scales: Tensor | None = None

    @classmethod
    def draw(cls, plan: Schedule, latents: Tensor, seeds: Sequence[int]) -> "FreshNoise":
        """Draws on the CPU from a stream for each seed: a batch equals its singles. Errors:
        UsageError."""
        if plan.noises is None:
            return cls()
        if len(seeds) != len(latents):
            raise UsageError(
                f"sample: seeds must be {len(latents)}, one per sample; got {len(seeds)}."
            )

        shape, device = (plan.noise_count, *latents.shape[1:]), latents.device
        generators = [torch.Generator().manual_seed(seed ^ NOISE_STREAM) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators], 1)
        return cls(
            noise.to(device),
            torch.tensor(plan.noises, device=device),
            torch.tensor(plan.noise_scales, dtype=torch.float32, device=device),
        )

    def add_to(self, latents: Tensor, index_1: Tensor) -> None:
        """Adds an evaluation's noise in place. index_1: its number, on the device."""
        if self.noise is not None:
            noise = self.noise.index_select(0, self.numbers.index_select(0, index_1))[0]
            latents.add_(noise * self.scales.index_select(0, index_1))


def refresh_every(video_cache: str | int, steps: int) -> int:
    """Steps after which captioning computes the video's rows again. video_cache: "exact" (1),
    "frozen" (`steps`) or a number. Errors: UsageError."""
    if video_cache in ("exact", "frozen"):
        return 1 if video_cache == "exact" else steps
    if not isinstance(video_cache, Integral) or isinstance(video_cache, bool) or video_cache < 1:
        raise UsageError(
            f"caption: video_cache must be exact, frozen or a number of steps; got {video_cache!r}."
        )
    return video_cache


def check_run(cfg, mode: str, modes: tuple[str, ...], text_rows: int, *choices) -> None:
    """Errors: UsageError, for a mode that is not among `modes`, text rows that it cannot have, and
    what `check_choices` says of the other choices."""
    if mode not in modes:
        raise UsageError(
            f"generate: mode must be one of {', '.join(modes)}; got {mode!r}. v2t is pipe.caption."
        )
    check_choices(cfg, mode, *choices)
    checked("sample: text_rows", text_rows, int, TEXT_ROWS, None)
    if text_rows < (mode != "t2v"):
        raise UsageError(
            f"sample: text_rows must be at least 1 for {mode}; got {text_rows}. Give text_rows."
        )


def check_choices(
    cfg,
    mode: str,
    solver: str,
    sampler: str,
    steps: int = 1,
    text_steps: int | None = None,
    temperature: float = 1.0,
    commit: str = "jump",
    guidance_scale: float = 1.0,
) -> None:
    """Errors: UsageError, for choices that are unknown or do not go together."""
    for name, value, known in (
        ("mode", mode, MODES),
        ("solver", solver, SOLVERS),
        ("sampler", sampler, SAMPLERS),
        ("commit", commit, COMMITS),
    ):
        if value not in known:
            raise UsageError(f"sample: {name} must be one of {', '.join(known)}; got {value!r}.")

    checked("sample: num_inference_steps", steps, int, STEPS, None)
    if text_steps is not None:
        checked("sample: text_steps", text_steps, int, STEPS, None)
    checked("sample: temperature", temperature, float, NOT_NEGATIVE, None)
    checked("sample: guidance_scale", guidance_scale, float, GUIDANCE, None)

    if text_steps is not None and (mode != "t2vt" or sampler == "legacy"):
        raise UsageError(
            f"sample: text_steps applies only to t2vt with sampler=exact; got {text_steps}. "
            "Leave it out."
        )

    for name, value, plain in (("sampler", sampler, "exact"), ("commit", commit, "jump")):
        if value != plain and cfg.text_flow == "embedding":
            raise UsageError(
                f"sample: {name} must be {plain} with text_flow=embedding; got {value!r}."
            )
    if commit != "jump" and sampler == "legacy":
        raise UsageError(f"sample: commit must be jump with sampler=legacy; got {commit!r}.")
