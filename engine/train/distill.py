"""Stage distill: a student of few steps without guidance learns what its teacher does in many
guided ones, in all three modes at once.

Each training step makes new runs of the teacher, by UniPC with guidance, and cuts them where the
student steps. Between two cuts the student has one evaluation: by Euler's rule it must lead from
the teacher's latents at the one to those at the other. Then the teacher captions the clips that it
ended with, and from every cut the student's text must lead to that caption: video and text of one
noise agree. Where asked for, the student's own clips must have the teacher's distribution too, see
`engine.train.matching`.

t2v, t2vt and v2t are samples of one batch. The first hold the clean prompt as text, at text time 0;
the last hold a clean video, at video time 0, which nothing moves.

Legend: B samples, T text rows, K steps of the student.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import flow
from engine.config import ModelConfig, TrainConfig
from engine.data import LatentSet
from engine.errors import UsageError
from engine.files import replacing
from engine.model import UniViGU
from engine.planning import forward_flops, train_flops
from engine.train import lora, trajectories
from engine.train.cast import Cast, Runs, cast_of, draw_runs, text_time
from engine.train.matching import Matching, score_of
from engine.train.objective import IGNORE, moved, part_of, weighted
from engine.train.trajectories import Taught, Trajectories
from engine.weights import load_model
from engine.weights.checkpoints import SCORE
from univigu_kernels.flow_step import SolverState, TextUpdate, VideoUpdate


class Grid(NamedTuple):
    """When the teacher steps: sigmas of the video and flow times of the text, of the ends of its
    steps, and their coefficients as `flow_step` takes them."""

    sigmas: list[float]
    ts: list[float]
    rows: list[list[float]]


@lru_cache
def grid_of(steps: int, shift: float) -> Grid:
    """The grid of so many steps, which holds those of its divisors."""
    sigmas = flow.euler_sigmas(steps, shift)
    finite = [1 - 1e-6, *sigmas[1:]]  # UniPC takes its log-SNR
    return Grid(sigmas, [i / steps for i in range(steps + 1)], flow.unipc_table(finite).tolist())


@torch.no_grad()
def teach(teacher: UniViGU, cast: Cast, x: Tensor, tokens: Tensor, seeds_B, grid: Grid, scale):
    """Runs the teacher from latents and tokens to its end, with guidance `scale`; returns its
    latents at the ends of all its steps, where they start among them."""
    ops, head, T = teacher.ops, teacher.text_head.linear, tokens.shape[1]
    context = teacher.encode_context(torch.cat([cast.context, cast.null_context]))
    state, lengths, path = SolverState(x, x, x, x), cast.lengths_B.repeat(2), [x]

    for i, row in enumerate(grid.rows):
        given = state.x.repeat(2, 1, 1, 1, 1), tokens.repeat(2, 1)
        times = (t.repeat(2) for t in cast.times(grid.sigmas[i], grid.ts[i]))
        h_BLD = teacher.features(*given, teacher.conditions(*times), context, lengths)
        velocity, null = teacher.velocity(h_BLD, given[0].shape).chunk(2)
        h_BTD = h_BLD[: len(x), h_BLD.shape[1] - T :]
        draw, _ = ops.vocab_sample(h_BTD, head.weight, head.bias, seeds_B, i, 1.0)

        probability = flow.jump_probability(*grid.ts[i : i + 2])
        video = VideoUpdate(state, velocity, null, scale, row)
        text = TextUpdate(tokens, draw, probability, seeds_B, i)
        state, said = ops.flow_step(video, text)
        state = state._replace(x=cast.moved(state.x, x))
        tokens = cast.said(said, tokens)
        path.append(state.x)
    return path


@torch.no_grad()
def tell(teacher: UniViGU, clip: Tensor, source: Tensor, seeds_B: Tensor, grid: Grid) -> Tensor:
    """The teacher's captions of clips, without a prompt, made of its most probable tokens."""
    head, tokens, zero_B = teacher.text_head.linear, source, torch.zeros_like(seeds_B).float()
    context = teacher.encode_context(clip.new_zeros(len(clip), 1, teacher.cfg.text_dim))
    for i, ends in enumerate(pairwise(grid.ts)):
        conditions = teacher.conditions(zero_B, zero_B + text_time(ends[0]))
        h_BTD = teacher.features(clip, tokens, conditions, context, keep="text")
        draw, _ = teacher.ops.vocab_sample(h_BTD, head.weight, head.bias, seeds_B, i, 0.0)
        update = TextUpdate(tokens, draw, flow.jump_probability(*ends), seeds_B, i)
        tokens = teacher.ops.flow_step(None, update)[1]
    return tokens


@torch.no_grad()
def lead(teacher: UniViGU, config: TrainConfig, batch: dict[str, Tensor], runs: Runs) -> Taught:
    """What the teacher does from where the runs start, and says of the clips that it ends with."""
    grid, cast = grid_of(config.teacher_steps, config.flow_shift), cast_of(batch, runs)
    start = cast.moved(runs.noise, batch["latents"]), cast.said(runs.source, batch["prompt_tokens"])
    path = teach(teacher, cast, *start, runs.seeds_B, grid, config.guidance_scale)
    told = tell(teacher, path[-1], runs.source, runs.seeds_B, grid)
    return Taught(torch.stack(path[:: len(grid.rows) // runs.keep_BKT.shape[1]], 1), told)


def write_ahead(
    teacher: UniViGU,
    data: LatentSet,
    config: TrainConfig,
    folder: Path,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> None:
    """Writes the `Trajectories` of a training with this teacher, as `univigu trajectories` does.

    teacher: is frozen. data: as the training reads it. progress: wraps the steps that are written.

    Errors: UsageError, ModelFileError.
    """
    check_settings(config)
    teacher.requires_grad_(False)
    device, size = teacher.vocab_embed.weight.device, config.micro_batch_size or config.batch_size
    own = {"teacher": lora.fingerprint(teacher), "model": asdict(teacher.cfg)}
    own |= {"data": data.identity, "micro_batch_size": size}

    def taught(batch: dict[str, Tensor], step: int) -> Taught:
        batch = {name: moved(x, device) for name, x in batch.items()}
        runs = draw_runs(batch, config, teacher, step)
        parts = (slice(i, i + size) for i in range(0, config.batch_size, size))
        found = [lead(teacher, config, *part_of(batch, runs, part)) for part in parts]
        return Taught(*map(torch.cat, zip(*found, strict=True)))

    trajectories.write(taught, own, data, config, folder, progress)


def sampling_of(config: TrainConfig) -> dict:
    """How the student is sampled, as pipeline.json and an adapter's metadata say it: in the first
    of its numbers of steps."""
    steps = {"num_inference_steps": config.student_steps[0], "flow_shift": config.flow_shift}
    how = {"solver": "euler", "guidance_scale": 1.0}
    return steps | how | {"caption_steps": config.student_steps[0]}


def save_sampling(config: TrainConfig, folder: Path) -> None:
    """Writes the pipeline.json of a student's folder, for `Pipeline`'s transformer_path."""
    record = {"sampling": sampling_of(config)}
    with replacing(folder / "pipeline.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")


def load_teacher(path: Path, student: UniViGU, device: torch.device) -> UniViGU:
    """A model of the student's dtype and kernels on the device. Errors: ModelFileError."""
    return load_model(path, device, student.dtype, student.ops, precision="bf16")


def step_flops(
    student: ModelConfig, teacher: ModelConfig | None, config: TrainConfig, step: int, **how
) -> int:
    """The FLOPs of a training step, by its number. The teacher evaluates prompt, null and caption
    in each of its steps; None, whose trajectories were written ahead, nothing. how: as of
    `engine.planning.train_flops`."""
    steps = config.student_steps[step % len(config.student_steps)]
    sizes = {name: value for name, value in how.items() if name != "recompute"}
    own = steps * train_flops(student, **how)
    if teacher is None:
        return own
    evaluations = 3 * config.teacher_steps
    if config.matching:  # the student's own run; two of the teacher's and one of the score's, which
        own += own + train_flops(teacher, **how)  # is trained
        evaluations += 3
    return own + evaluations * forward_flops(teacher, **sizes).total


def check_settings(config: TrainConfig) -> None:
    """Errors: UsageError, for settings of any stage that do not go with it."""
    distill, asked = config.stage == "distill", config.student_steps
    if bool(asked) != distill:
        must = "given with" if distill else "left out without"
        got = " ".join(map(str, asked)) or "none"
        raise UsageError(f"train: student_steps must be {must} stage=distill; got {got}.")
    if uneven := [steps for steps in asked if config.teacher_steps % steps]:
        raise UsageError(
            f"train: teacher_steps must be a multiple of student_steps {uneven[0]}; "
            f"got {config.teacher_steps}."
        )
    if config.matching and not distill:
        raise UsageError(
            f"train: matching must be 0 without stage=distill; got {config.matching:g}."
        )
    for name, plain in (("text_loss", "ce"), ("text_exponent", 1.0)):
        if distill and getattr(config, name) != plain:
            got = getattr(config, name)
            raise UsageError(f"train: {name} must be {plain} with stage=distill; got {got}.")


def check_teacher(student: ModelConfig, teacher: ModelConfig | None, sequence=None) -> None:
    """Errors: UsageError."""
    if sequence is not None:
        raise UsageError(
            "train: sp must be 1 with stage=distill, whose teacher has whole samples; "
            f"got {sequence.ranks}. Use dp_shard."
        )
    if teacher is None:
        raise UsageError(
            "train: teacher must be given with stage=distill; got none. Name the model whose steps "
            "are to become few."
        )
    if "embedding" in (student.text_flow, teacher.text_flow):
        raise UsageError("train: text_flow must be discrete with stage=distill; got embedding.")
    for name in ("text_dim", "vocab", "mask_source"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise UsageError(f"train: {name} must be that of the teacher, {theirs}; got {ours}.")


class Distillation(nn.Module):
    """The losses of the stage, as `engine.train.objective.Objective` has those of the others.

    teacher: frozen, whole on every rank, and no part of the module's parameters; or the
        `Trajectories` that one wrote ahead, whose `batch` goes with each of the data.

    Errors: UsageError.
    """

    def __init__(
        self,
        model: UniViGU,
        config: TrainConfig,
        sequence,
        teacher: UniViGU | Trajectories | None,
    ):
        super().__init__()
        check_teacher(model.cfg, teacher and teacher.cfg, sequence)
        if isinstance(teacher, Trajectories):
            teacher.check(config)
        else:
            teacher.requires_grad_(False)

        self.model, self.config, self.held = model, config, (teacher,)  # a tuple hides parameters
        self.matching = None
        if config.matching:
            self.matching = Matching(score_of(teacher, model, config), config)

    @property
    def networks(self) -> dict[str, UniViGU]:
        """Those that are trained, by what begins the names of their parameters."""
        score = {} if self.matching is None else {SCORE: self.matching.score}
        return {"": self.model} | score

    @property
    def teacher(self) -> UniViGU | Trajectories:
        return self.held[0]

    def taught(self, batch: dict[str, Tensor], runs: Runs) -> Taught:
        """What the teacher did, or does now. Errors: UsageError for a batch without what it did."""
        if not isinstance(self.teacher, Trajectories):
            return lead(self.teacher, self.config, batch, runs)
        return Taught.of(batch)

    def forward(self, batch: dict[str, Tensor], runs: Runs) -> tuple[Tensor, ...]:
        """(video loss, text loss), then the two of `engine.train.matching` where that is asked for:
        this rank's addends of means over the global batch and the student's steps."""
        config, cast, model = self.config, cast_of(batch, runs), self.model
        grid = grid_of(config.teacher_steps, config.flow_shift)
        path, told = self.taught(batch, runs)
        path, prompts = path.unbind(1), batch["prompt_tokens"]
        cuts = range(0, len(grid.sigmas), len(grid.rows) // (len(path) - 1))
        turns = list(zip(pairwise(cuts), runs.keep_BKT.unbind(1), strict=True))

        context = [model.cond_text_embedder(cast.context.to(model.dtype))] * len(model.blocks)

        def features(x: Tensor, i: int, keep_BT: Tensor, rows: str) -> Tensor:
            """What the student's heads read at the teacher's step i."""
            tokens = cast.said(torch.where(keep_BT < grid.ts[i], told, runs.source), prompts)
            conditions = model.conditions(*cast.times(grid.sigmas[i], grid.ts[i]))
            return model.features(x, tokens, conditions, context, cast.lengths_B, rows)

        losses = []
        for (x, goal), ((i, j), keep_BT) in zip(pairwise(path), turns, strict=True):
            velocity = (goal - x) / (grid.sigmas[j] - grid.sigmas[i])
            losses.append(self.losses(features(x, i, keep_BT, "all"), velocity, told, runs))
        found = torch.stack(losses).mean(0).unbind()
        if self.matching is None:
            return found

        clip = path[0]
        for (i, j), keep_BT in turns:
            velocity = model.velocity(features(clip, i, keep_BT, "video"), clip.shape)
            step = (grid.sigmas[j] - grid.sigmas[i]) * velocity.to(clip.dtype)
            clip = cast.moved(clip + step, clip)
        return *found, *self.matching(self.teacher, clip, cast.said(told, prompts), cast, runs)

    def losses(self, h_BLD: Tensor, velocity: Tensor, told: Tensor, runs: Runs) -> Tensor:
        """Those of a step of the student, [2]."""
        model, (_, T) = self.model, told.shape
        found = model.velocity(h_BLD, velocity.shape).to(velocity.dtype)
        missed = F.mse_loss(found, velocity, reduction="none")
        video = weighted(missed, runs.video_share_B, velocity[0].numel())

        def read(h_BTD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            loss = model.ops.vocab_loss(h_BTD, weight, bias, told, IGNORE)
            return weighted(loss, runs.text_share_B, T)

        return torch.stack([video, model.text_head(h_BLD[:, h_BLD.shape[1] - T :], read)])
