"""When each modality moves, and by how much: the constants of a sampling run."""

import math
from dataclasses import dataclass
from numbers import Integral

import torch

from engine import flow
from engine.config import GUIDANCE, MOST_ROWS, NOT_NEGATIVE, STEPS, Range, checked
from engine.errors import UsageError

MODES, SOLVERS, SAMPLERS = ("t2v", "t2vt", "v2t"), ("euler", "unipc"), ("exact", "legacy")
COMMITS = ("jump", "confidence")
TEXT_ROWS = Range(0, MOST_ROWS)


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

    def __len__(self) -> int:
        return len(self.video_times)


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
) -> Schedule:
    """Computes the constants of a run.

    mode: "t2v", "t2vt" or "v2t".
    steps: of the video; in v2t, of the text.
    shift: of the video's times towards noise.
    solver: of the video, "euler" or "unipc".
    sampler: of the text. "exact": on its own grid t_j = j/text_steps with the exact jump
        probability. "legacy", for parity with the official code: in v2t the probability
        1 - exp(-h kappa'/(1 - kappa)); in t2vt the text clock follows the video's shifted one and
        tokens are replaced with probability i/(steps - 1).
    text_steps: of t2vt's text, more or fewer than the video's (None: the same number): the longer
        grid sets the evaluations, the other modality moves in some of them.
    exponent: of the text's kappa(t) = t ** exponent.
    """
    moves_video, moves_text = mode != "v2t", mode != "t2v"
    text_steps = steps if text_steps is None else text_steps
    evaluations = max(steps, text_steps) if mode == "t2vt" else steps
    video_step, video_moves = _spread(steps, evaluations)
    text_step, text_moves = _spread(text_steps, evaluations)

    still = [0.0] * evaluations
    times, table = flow.video_schedule(solver, steps, shift)
    plan = {
        "video_times": times[video_step].tolist() if moves_video else still,
        "coefficients": table[video_step].tolist() if moves_video else None,
        "video_moves": video_moves if moves_video else [False] * evaluations,
        "text_times": still,
        "text_moves": text_moves if moves_text else [False] * evaluations,
    }
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
