"""Sampling: t2v, t2vt and v2t are three corners of one square of (video time, text time), so one
step serves all.

What is constant over a run is computed once: cross-attention K and V of the prompts, rotary tables,
time embeddings and every layer's modulation for the whole schedule. A `Step` is the rest: a
function of tensors that stay where they are, which takes nothing from the host, so that
`engine.graphs` can capture it; `engine.run` calls it. Guidance runs the prompt and its null as one
batch of 2B, from the first cross-attention on; before it they are equal. The null keeps the text
rows, as the official model does: guidance removes the cross-attention path alone. On several ranks
the network runs on a rank's share of that and the rest on all of it, see
`engine.parallel.sampling`.

Legend: B samples, V video rows, T text rows, C context rows, E evaluations, N steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine import flow
from engine.layers import Cache
from engine.model import UniViGU, rotary_of
from engine.schedule import FreshNoise, Schedule
from univigu_kernels.flow_step import SolverState, TextUpdate, VideoUpdate

TEXT_STREAM = 0x7E57  # keeps a seed's text noise apart from its video noise


def video_noise(
    shape: tuple[int, ...], seeds: list[int], device, generators: list | None = None
) -> Tensor:
    """Standard normal fp32 [len(seeds), *shape], drawn on the CPU one sample per seed: a batch
    equals its singles. generators: in place of the seeds, each where it is; one may be there
    several times."""
    generators = generators or [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.randn(1, *shape, generator=g, device=g.device) for g in generators]
    return torch.cat([draw.to(device) for draw in draws])


def text_source(model: UniViGU, rows: int, seeds: list[int]) -> Tensor:
    """The text at t = 0, one generator per seed: ids [B,T] (uniform, or the mask id), or Gaussian
    vectors [B,T,D]."""
    cfg, device = model.cfg, model.vocab_embed.weight.device
    if cfg.mask_source:
        return torch.full((len(seeds), rows), cfg.vocab, device=device)
    generators = [torch.Generator().manual_seed(seed ^ TEXT_STREAM) for seed in seeds]
    if cfg.text_flow == "embedding":
        return torch.stack([torch.randn(rows, cfg.dim, generator=g) for g in generators]).to(device)
    draws = [torch.randint(cfg.vocab, (rows,), generator=g) for g in generators]
    return torch.stack(draws).to(device)


def collapse(context_BCE: Tensor, multiple: int = 1) -> tuple[Tensor, int]:
    """Cuts the rows after the prompt, zeros whose keys and values are equal. Returns the context up
    to the first of them, in a multiple of `multiple` rows, and how many times its last row counts.
    One row stays one: cross-attention then is a row for all. Exact; a prompt of 20 tokens keeps 21
    of 512 rows. Reads the device once."""
    C = context_BCE.shape[1]
    equal_C = (context_BCE == context_BCE[:, -1:]).all(-1).all(0).tolist()
    rows = next((c + 2 for c in reversed(range(C)) if not equal_C[c]), 1)
    rows = min(C, -(-rows // multiple) * multiple) if rows > 1 else 1
    return context_BCE[:, :rows], C - rows + 1


class Kind(NamedTuple):
    """What an evaluation moves, and whether the video's K and V come from the cache."""

    video: bool
    text: bool
    cached: bool = False

    @property
    def keep(self) -> str:
        return "all" if self.video and self.text else "video" if self.video else "text"


@dataclass(frozen=True, eq=False)
class Request:
    """What a run samples: when each modality moves, where both start, and what conditions them.

    schedule: the constants of the run's evaluations.
    latents: fp32 [B,16,F,Y,X], noise, or clean where the video is frozen.
    tokens: int64 ids [B,T], or vectors [B,T,D] of the embedding flow; a source, or clean.
    context: [B,C,text_dim], the prompts.
    null_context: the same of what guidance leads away from; None: no guidance.
    guidance: weight of the prompts against their nulls.
    text_lengths: real text rows of each sample; None: all T.
    seeds: one per sample, for the draws of its tokens.
    temperature: of those draws; 0 takes the most probable token.
    commit: "jump" (each token by itself, as the flow says) or "confidence" (the number that is
        due, the surest first, and they stay).
    refresh_every: evaluations after which the rows of a frozen video are computed again; 1 is
        exact.
    """

    schedule: Schedule
    latents: Tensor
    tokens: Tensor
    context: Tensor
    null_context: Tensor | None = None
    guidance: float = 1.0
    text_lengths: Sequence[int] | None = None
    seeds: Sequence[int] = (0,)
    temperature: float = 1.0
    commit: str = "jump"
    refresh_every: int = 1

    @property
    def guided(self) -> bool:
        return self.null_context is not None and self.schedule.coefficients is not None

    @property
    def cached(self) -> bool:
        """Whether any evaluation takes the video's K and V from a cache."""
        return self.refresh_every > 1 and len(self.schedule) > 1

    @property
    def kinds(self) -> list[Kind]:
        """What each evaluation moves."""
        plan = self.schedule
        return [
            Kind(*moves, cached=i % self.refresh_every > 0)
            for i, moves in enumerate(zip(plan.video_moves, plan.text_moves, strict=True))
        ]

    def without_padding(self) -> "Request":
        """The same without the text rows after the longest text, which are neither attended to nor
        read; text_lengths stay where they differ."""
        if self.text_lengths is None:
            return self
        longest = max(self.text_lengths)
        lengths = self.text_lengths if min(self.text_lengths) < longest else None
        return replace(self, tokens=self.tokens[:, :longest], text_lengths=lengths)


class WholeRun:
    """Who computes what of a run, where one rank computes all of it; on several ranks see
    `engine.parallel.sampling`.

    box: its part of the latents.
    text: its part of the text rows.
    part: what the model needs to know of both; None: nothing.
    """

    box, text, part = ..., slice(None), None

    def contexts(self, context_BCE: Tensor) -> Tensor:
        """The contexts that this rank evaluates, of the prompts and their nulls."""
        return context_BCE

    def join_video(self, velocities: Tensor) -> Tensor:
        """Joins the ranks' velocities, each of a box and of some contexts, to all of them."""
        return velocities

    def join_text(self, h_BTD: Tensor) -> Tensor:
        """Joins the ranks' slices of the prompts' text rows to all of them."""
        return h_BTD

    def least(self, number: int) -> int:
        """The least of all ranks' numbers. Waits for the device."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank: what stops one stops all. Waits for the device."""
        return self.least(int(not flag)) == 0


class Step:
    """One evaluation of the model and the update of all that it moves, in place.

    Calling it with a `Kind` advances the state: latents and the solver's history, tokens, the
    evaluation's number, and the first evaluation that was not finite, with what went into it.
    request: without padding. share: what this rank computes of it.
    """

    def __init__(self, model: UniViGU, request: Request, share: WholeRun):
        self.model, self.share, self.device = model, share, request.latents.device
        self.guided, self.guidance = request.guided, request.guidance
        self.temperature, self.commit = request.temperature, request.commit
        self._set_constants(request)
        self._set_state(request)

    def _set_constants(self, request: Request) -> None:
        """What no evaluation changes: tables of the schedule, and K and V of the prompts."""
        schedule, model, rows = request.schedule, self.model, request.tokens.shape[1]
        self.evaluations = len(schedule)

        context = request.context
        if self.guided:
            context = torch.cat([context, request.null_context])
        # 64 rows are one tile of the kernels on a GPU; fewer shapes, fewer graphs.
        context, repeats = collapse(context, 1 if self.device.type == "cpu" else 64)
        context = self.share.contexts(context).to(self.device)
        self.context = model.encode_context(context, repeats)

        last = [0.0] * schedule.last_argmax
        times = schedule.video_times, schedule.text_times
        self.conditions = model.conditions(
            *(self._table([*t, *last], torch.float32) for t in times)
        )
        self.coefficients = self._table(schedule.coefficients, torch.float64)
        self.probabilities = self._table(schedule.probabilities, torch.float64)
        self.deltas = self._table(schedule.text_deltas, torch.float32)
        shares = schedule.data_shares
        counts = None if shares is None else [round(share * rows) for share in shares]
        self.counts = self._table(counts, torch.int64)

        self.fresh = FreshNoise.draw(schedule, request.latents, request.seeds)
        self.seeds = self._table(request.seeds, torch.int64)
        self.text_lengths = self._table(request.text_lengths, torch.int64)
        # A captured graph reads these tensors in place, and the model may drop its own.
        self.rotary = model.rotary_for(request.latents, rows)
        self.text_rotary = rotary_of((0, 1, 1), rows, model, self.device)

    def _set_state(self, request: Request) -> None:
        latents, tokens = request.latents, request.tokens
        self.video = SolverState(*(latents.clone() for _ in range(4)))
        self.tokens = tokens.clone()
        self.committed = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=self.device)
        self.index = self._table([0], torch.int64)

        self.failed = self._table([self.evaluations], torch.int64)
        self.seen_latents, self.seen_tokens = latents.clone(), tokens.clone()
        self.cached, self.caches = request.cached, None  # allocated once it is adopted

    def _table(self, values: Sequence | None, dtype: torch.dtype) -> Tensor | None:
        if values is None:
            return None
        return torch.tensor(list(values), dtype=dtype, device=self.device)

    def new_caches(self) -> list[Cache]:
        cfg, B = self.model.cfg, len(self.tokens)
        rows = self.video.x[0, 0].numel() // 4 + self.tokens.shape[1]
        k_v = (2, B, rows, cfg.heads, cfg.head_dim)
        empty = {"dtype": self.model.dtype, "device": self.device}
        return [Cache(*torch.empty(k_v, **empty)) for _ in range(cfg.layers)]

    def allocate(self) -> None:
        """Allocates the cache of a run that has one; an adopted step keeps its own."""
        if self.cached and self.caches is None:
            self.caches = self.new_caches()

    def state(self) -> list[Tensor]:
        """What a call changes, the cache apart."""
        seen = [self.failed, self.seen_latents, self.seen_tokens]
        return [*self.video, self.tokens, self.committed, self.index, *seen]

    def tensors(self) -> list[Tensor]:
        """State and constants of a run."""
        kv = [tensor for layer in self.context for tensor in layer.tensors()]
        tables = [self.coefficients, self.probabilities, self.deltas, self.counts, *self.fresh]
        given = [*self.conditions, *tables, self.seeds, self.text_lengths, *kv, *self.state()]
        return [tensor for tensor in given if tensor is not None]

    def key(self) -> tuple:
        """Steps of one key differ in the numbers of `tensors` alone."""
        shapes = tuple((tuple(t.shape), t.dtype) for t in self.tensors())
        settings = (self.guided, self.guidance, self.temperature, self.commit, self.evaluations)
        layout = self.context[0].repeats, self.cached
        weights = id(self.model), self.model.cfg, next(self.model.parameters()).data_ptr()
        return weights, settings, layout, shapes

    def load(self, other: "Step") -> None:
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)

    def features(self, kind: Kind, latents: Tensor, tokens: Tensor) -> Tensor:
        """The model's features for the current times, of the prompts and, below them, of their
        nulls where they are needed; of this rank's share."""
        conditions, lengths = self.conditions.at(self.index), self.text_lengths
        context, share = self.context, self.share
        if self.guided and not kind.video:
            context = [kv.of(len(tokens)) for kv in context]
        if kind.cached:
            given = conditions, context, self.caches, lengths
            return self.model.text_features(tokens, *given, self.text_rotary)
        if lengths is not None and self.guided:
            lengths = lengths.repeat(2)
        rows = latents[share.box], tokens[:, share.text]
        return self.model.features(
            *rows, conditions, context, lengths, kind.keep, self.caches, share.part, self.rotary
        )

    def _velocities(self, h_BLD: Tensor) -> tuple[Tensor, ...]:
        """The velocities of the prompts and, where they are guided, of their nulls."""
        shape = len(h_BLD), *self.video.x[self.share.box].shape[1:]
        velocities = self.share.join_video(self.model.velocity(h_BLD, shape))
        return velocities.split(len(self.tokens))

    def text_rows(self, h_BLD: Tensor) -> Tensor:
        """What the text head reads, h_BTD, of the prompts."""
        B, T = self.tokens[:, self.share.text].shape[:2]
        return self.share.join_text(h_BLD[:B, h_BLD.shape[1] - T :])

    # no_grad would still send every operation through its registered gradient, in Python: on a CPU
    # a frozen step of the embedded model takes 1.22 times as long. What is made here stays here.
    @torch.inference_mode()
    def __call__(self, kind: Kind) -> None:
        index = self.index
        h_BLD = self.features(kind, self.video.x, self.tokens)

        video = text = None
        checked = []
        if kind.video:
            velocity, *null = checked = self._velocities(h_BLD)
            row = self.coefficients.index_select(0, index)[0]
            video = VideoUpdate(self.video, velocity, null[0] if null else None, self.guidance, row)
        if kind.text:
            h_BTD = self.text_rows(h_BLD)
            checked = [*checked, h_BTD]
            text = self._text_update(h_BTD)

        self._note(checked)
        jumps = text if isinstance(text, TextUpdate) else None
        state, tokens = self.model.ops.flow_step(video, jumps)
        if state is not None:
            # m1 becomes m2: its tensor is overwritten after it was read.
            for old, new in reversed(list(zip(self.video, state, strict=True))):
                old.copy_(new)
            self.fresh.add_to(self.video.x, index)

        if text is not None:
            self.tokens.copy_(text if tokens is None else tokens)
        index.add_(1)

    @torch.no_grad()
    def last_argmax(self) -> None:
        """The most probable tokens of one evaluation more replace all tokens."""
        h_BTD = self.text_rows(self.features(Kind(False, True), self.video.x, self.tokens))
        self.tokens.copy_(self.model.text_head.linear(h_BTD).argmax(-1))

    def _text_update(self, h_BTD: Tensor) -> TextUpdate | Tensor:
        """The discrete flow's proposal with the probability to take it; otherwise the new text."""
        head, model, index = self.model.text_head.linear, self.model, self.index
        if model.cfg.text_flow == "embedding":
            return self.tokens + self.deltas.index_select(0, index) * head(h_BTD).float()
        draw, confidence = model.ops.vocab_sample(
            h_BTD, head.weight, head.bias, self.seeds, index[0], self.temperature
        )
        if self.commit == "confidence":
            tokens, committed = flow.commit_confident(
                self.tokens, draw, confidence, self.committed, self.counts.index_select(0, index)
            )
            self.committed.copy_(committed)
            return tokens
        probability = self.probabilities.index_select(0, index)[0]
        return TextUpdate(self.tokens, draw, probability, self.seeds, index[0])

    def _note(self, outputs: list[Tensor]) -> None:
        """Keeps what went into the first evaluation whose outputs are not finite."""
        fine = self.failed == self.evaluations
        for seen, now in ((self.seen_latents, self.video.x), (self.seen_tokens, self.tokens)):
            torch.where(fine, now, seen, out=seen)
        # The largest magnitude: NaN or infinity where there is one. isfinite().all() launches 5.
        largest = [torch.linalg.vector_norm(output, torch.inf) for output in outputs]
        largest = largest[0] if len(largest) == 1 else torch.stack(largest).amax()
        first = torch.minimum(self.failed, self.index)
        torch.where(largest < torch.inf, self.failed, first, out=self.failed)
