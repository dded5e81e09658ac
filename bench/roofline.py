"""How long a run should take: FLOPs, bytes and exponentials of every operation of a forward pass, a
sampling step and a training step, and what a device's ceilings make of them.

FLOPs are those of `engine.planning.flops`: matrix products alone, 2 per multiply-add. Bytes are
what passes through memory when each operand is read and each result written once per operation,
over an fp32 residual stream, as the operations of `univigu_kernels` declare it. Left out: indices,
biases, tables, what the solver copies to keep its state, what a refresh puts in the cache. No
tensor library is imported here.

Legend: V video rows and T text rows of a sample, L = V+T, C context rows, D width, F hidden width.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engine.config import ModelConfig
from engine.errors import UsageError
from engine.planning import memory
from engine.planning.flops import PATCH, RECOMPUTED


class Ceilings(NamedTuple):
    """What a device can do. flops: FLOP/s of a large GEMM in the run's dtype; bytes: B/s of a large
    copy, read plus written; exps: exponentials/s where they are not hidden behind the products, as
    on a CPU; launch: seconds of an operation that nothing hides."""

    name: str
    flops: float
    bytes: float
    exps: float | None = None
    launch: float = 0.0


# Dense bf16 and memory, by NVIDIA's data sheets of the SXM boards.
H100 = Ceilings("H100 SXM (data sheet)", 989.4e12, 3.35e12)
H200 = Ceilings("H200 SXM (data sheet)", 989.4e12, 4.8e12)


class Reached(NamedTuple):
    """The share of a ceiling that operations reach: of FLOP/s attention forward, its backward and
    the other products; of B/s all that memory bounds."""

    attention: float = 1.0
    attention_backward: float = 1.0
    products: float = 1.0
    memory: float = 1.0


# The best that others published for bf16 on Hopper, none of it measured here: FlashAttention-3 at
# head_dim 128 (648 to 711 TFLOP/s forward, 561 backward), cuBLASLt (635 to 685), row kernels of
# quack and Triton. A backward that counts 10 FLOP per pair and channel, as those 550 do, computes
# the scores again; ours count 8.
REACHED = Reached(700 / 989.4, 550 / 989.4 * 8 / 10, 680 / 989.4, 0.90)


class Work(NamedTuple):
    """Equal calls of an operation, all together. op: the registry's name, or what the model does
    beside it; exps: exponentials of softmax, and one for each value of a GELU."""

    op: str
    calls: int
    flops: int
    bytes: int
    exps: int = 0


class _Sizes(NamedTuple):
    """The sizes of a pass. shared: samples before the first cross-attention, where guidance's
    prompt and null are one; cached: rows a sample that have K and V alone; context_kv: whether a
    layer has to make them; equal: the prompt's rows are, so that every row gets the same."""

    video: int
    text: int
    context: int
    samples: int
    itemsize: int
    shared: int
    cached: int = 0
    context_kv: bool = True
    equal: bool = False

    @property
    def wide(self) -> int:
        return max(4, self.itemsize)


INPUTS = "patch_embedding", "context_embedder", "time_embedder"  # nobody wants their gradient
ATTENTION = "joint_attention", "cross_attention"


def _linear(op: str, rows: int, inputs: int, outputs: int, size: int) -> Work:
    moved = size * (rows * (inputs + outputs) + inputs * outputs)
    return Work(op, 1, 2 * rows * inputs * outputs, moved)


def _attention(op: str, cfg: ModelConfig, queries: int, keys: int, pairs: int, size: int) -> Work:
    moved = 2 * size * (queries + keys) * cfg.dim
    return Work(op, 1, 4 * pairs * cfg.dim, moved, pairs * cfg.heads)


def _experts(cfg: ModelConfig, video: int, text: int, size: int) -> Work:
    D, F, rows = cfg.dim, cfg.ffn_dim, video + text
    weights = 2 * D * F * ((video > 0) + (text > 0))
    moved = size * (2 * rows * (D + F) + weights)
    return Work("routed_ffn", 1, 4 * rows * D * F, moved, rows * F)


def _rows(op: str, elements: int, s: _Sizes) -> Work:
    size, wide = s.itemsize, s.wide
    per_element = {
        "adaln": wide + size,
        "residual_adaln": 2 * wide + 2 * size,
        "qknorm_rope": 4 * size,
        "rms_norm": 2 * size,
        "gelu": 2 * size,
        "copy": 2 * size,
    }
    return Work(op, 1, 0, elements * per_element[op], elements if op == "gelu" else 0)


def _block(cfg: ModelConfig, s: _Sizes, keep: str, before: int) -> Iterator[Work]:
    """before: samples before cross-attention."""
    D, size = cfg.dim, s.itemsize
    V, T = (0 if keep == "text" else s.video), (0 if keep == "video" else s.text)
    L, keys = s.video + s.text, s.cached + s.video + s.text
    pairs = V * (L if cfg.video_sees_text else s.video) + T * keys
    first, all_rows = before * (V + T), s.samples * (V + T)
    yield _linear("linear", before * L, D, 3 * D, size)
    yield _rows("qknorm_rope", before * L * D, s)
    if s.cached:
        yield _rows("copy", 2 * before * L * D, s)
    yield _attention("joint_attention", cfg, first, before * keys, before * pairs, size)
    yield _linear("linear", first, D, D, size)
    yield _rows("residual_adaln", first * D, s)
    yield from _cross(cfg, s, first, all_rows)
    if before < s.samples:
        yield Work("copy", 1, 0, (first + all_rows) * D * s.wide)
    yield _rows("residual_adaln", all_rows * D, s)
    yield _experts(cfg, s.samples * V, s.samples * T, size)
    yield _rows("residual_adaln", all_rows * D, s)


def _cross(cfg: ModelConfig, s: _Sizes, first: int, rows: int) -> Iterator[Work]:
    """first: rows of the samples that are still one; rows: of all of them."""
    D, size, C = cfg.dim, s.itemsize, s.samples * s.context
    if s.context_kv:
        yield _linear("linear", C, D, 2 * D, size)
        yield _rows("rms_norm", C * D, s)
    if s.equal:
        yield _linear("linear", s.samples, D, D, size)
        return
    yield _linear("linear", first, D, D, size)
    yield _rows("rms_norm", first * D, s)
    if first < rows:
        yield Work("copy", 1, 0, (first + rows) * D * size)
    yield _attention("cross_attention", cfg, rows, C, rows * s.context, size)
    yield _linear("linear", rows, D, D, size)


def _blocks(cfg: ModelConfig, s: _Sizes, keep: str = "all") -> Iterator[Work]:
    for layer in range(cfg.layers):
        before = s.shared if layer == 0 else s.samples
        yield from _block(cfg, s, keep if layer == cfg.layers - 1 else "all", before)


def _embedding(cfg: ModelConfig, s: _Sizes) -> Iterator[Work]:
    """Patches are cast, cut and multiplied; text is looked up; both are widened, joined, normed."""
    D, size, wide = cfg.dim, s.itemsize, s.wide
    V, T = s.shared * s.video, s.shared * s.text
    yield _linear("patch_embedding", V, PATCH, D, size)
    cut = V * PATCH * (wide + 3 * size)
    widened = V * D * (size + wide) + T * D * (3 * size + wide)
    yield Work("embedding", 1, 0, cut + widened + 2 * (V + T) * D * wide)
    yield _rows("adaln", (V + T) * D, s)


def _conditions(cfg: ModelConfig, s: _Sizes) -> Iterator[Work]:
    """Both times of every sample, then a table of modulations for every layer; and the prompt."""
    B, D, wide, C = s.samples, cfg.dim, s.wide, s.samples * s.context
    for _ in ("video", "text"):
        yield _linear("time_embedder", B, cfg.freq_dim, D, wide)
        yield _linear("modulation", B, D, D, wide)
        yield _linear("modulation", B, D, 6 * D, wide)
    yield Work("modulation", 1, 0, wide * cfg.layers * D * (6 + B * 12))
    yield _linear("context_embedder", C, cfg.text_dim, D, s.itemsize)
    yield _rows("gelu", C * D, s)
    yield _linear("linear", C, D, D, s.itemsize)


def _video_head(cfg: ModelConfig, s: _Sizes) -> Work:
    rows = s.samples * s.video
    part = _linear("video_head", rows, cfg.dim, PATCH, s.itemsize)
    return part._replace(bytes=part.bytes + 2 * rows * PATCH * s.itemsize)  # and unpatchify


def _text_head(cfg: ModelConfig, op: str, rows: int, size: int) -> Work:
    """Logits of all rows; "vocab_loss" and "vocab_sample" keep none of them."""
    if cfg.text_flow == "embedding":
        return _linear("text_head", rows, cfg.dim, cfg.dim, size)
    part = _linear(op, rows, cfg.dim, cfg.vocab_rows, size)
    if op == "text_head":
        return part
    written = 12 * rows if op == "vocab_sample" else 0
    moved = size * cfg.dim * (rows + cfg.vocab_rows) + written
    return part._replace(bytes=moved, exps=rows * cfg.vocab_rows)


def _gather(calls: Iterable[Work]) -> list[Work]:
    """Equal calls as one part, in the order of their first; those of no rows are left out."""
    counts = Counter(call for call in calls if call.flops or call.bytes)
    return [Work(c.op, n, n * c.flops, n * c.bytes, n * c.exps) for c, n in counts.items()]


def forward_parts(
    cfg: ModelConfig,
    *,
    video_rows: int,
    text_rows: int,
    context_rows: int = 512,
    samples: int = 1,
    itemsize: int = 2,
) -> list[Work]:
    """The work of `UniViGU.forward`: every row of `samples`, logits of all text rows. itemsize:
    bytes of the model's dtype. The FLOPs' sum is that of `forward_flops`."""
    s = _Sizes(video_rows, text_rows, context_rows, samples, itemsize, samples)
    heads = _video_head(cfg, s), _text_head(cfg, "text_head", samples * text_rows, itemsize)
    return _gather([*_conditions(cfg, s), *_embedding(cfg, s), *_blocks(cfg, s), *heads])


def step_parts(
    cfg: ModelConfig,
    mode: str,
    cached: bool = False,
    guided: bool = False,
    *,
    video_rows: int,
    text_rows: int,
    context_rows: int = 512,
    samples: int = 1,
    itemsize: int = 2,
) -> list[Work]:
    """The work of one evaluation and update of `engine.sample`, less what it leaves out: prompt
    and times are encoded before; guidance's two samples are one until the first cross-attention;
    the last layer ends after K and V for rows that no head reads; t2v has no text head, v2t no
    video head, and null prompts no text to draw.

    mode: "t2v", "t2vt" or "v2t". cached (v2t): text rows alone, to the video's kept K and V.
    samples: videos. context_rows: of those that `sample.collapse` leaves; 1 is a prompt of zeros on
    a CPU, where all rows are equal and nothing attends. Errors: UsageError.
    """
    if mode not in ("t2v", "t2vt", "v2t"):
        raise UsageError(
            f"roofline: mode must be t2v, t2vt or v2t; got {mode!r}. Name one of them; "
            "a forward of every row is forward_parts."
        )

    if cached and mode != "v2t" or guided and mode == "v2t":
        got = f"{mode}, cached {cached}, guided {guided}"
        raise UsageError(
            f"roofline: v2t alone must be cached, and must not be guided; got {got}. "
            f"Leave out {'guided' if mode == 'v2t' else 'cached'}."
        )

    s = _Sizes(
        video=0 if cached else video_rows,
        text=text_rows,
        context=context_rows,
        samples=2 * samples if guided else samples,
        itemsize=itemsize,
        shared=samples,
        cached=video_rows if cached else 0,
        context_kv=False,
        equal=context_rows == 1,
    )

    keep = {"t2v": "video", "t2vt": "all", "v2t": "text"}[mode]
    state = 24 * samples * text_rows if mode == "v2t" else 32 * PATCH * samples * video_rows
    heads = [Work("flow_step", 1, 0, state)]  # of latents, beside which tokens are nothing
    if mode != "v2t":
        heads.append(_video_head(cfg, s))
    if mode != "t2v":
        heads.append(_text_head(cfg, "vocab_sample", samples * text_rows, itemsize))
    return _gather([*_embedding(cfg, s), *_blocks(cfg, s, "all" if cached else keep), *heads])


# Bytes a parameter in fp32: AdamW reads master, gradient and two moments and writes all but the
# gradient; clipping reads the gradient twice and writes it; the average reads two and writes one.
# A bf16 model's gradient is added to its master's, and the master copied back.
ADAMW, AVERAGE, BF16_COPIES = 28 + 12, 12, 12


def train_parts(
    cfg: ModelConfig,
    recompute: str = "none",
    *,
    video_rows: int,
    text_rows: int,
    context_rows: int = 512,
    samples: int = 1,
    itemsize: int = 2,
    ema: bool = True,
) -> list[Work]:
    """The work of a training step of all parameters on one device: forward, backward
    ("_backward"), what `recompute` does again and "optimizer". ema: whether an average of them is
    kept. The FLOPs' sum is that of `train_flops`, which says what backward counts; of bytes it
    takes twice forward's. Errors: UsageError."""
    if recompute not in RECOMPUTED:
        known = ", ".join(RECOMPUTED)
        raise UsageError(
            f"roofline: recompute must be one of {known}; got {recompute!r}. Name one of them."
        )

    s = _Sizes(video_rows, text_rows, context_rows, samples, itemsize, samples)
    heads = _video_head(cfg, s), _text_head(cfg, "vocab_loss", samples * text_rows, itemsize)
    blocks = list(_blocks(cfg, s))

    forward = [*_conditions(cfg, s), *_embedding(cfg, s), *blocks, *heads]
    backward = [
        Work(f"{p.op}_backward", 1, (1 if p.op in INPUTS else 2) * p.flops, 2 * p.bytes, p.exps)
        for p in forward
    ]
    again = blocks if recompute == "block" else [p for p in blocks if p.op not in ATTENTION]

    count = memory.parameters(cfg)
    narrow = count.narrow + count.experts
    copied = BF16_COPIES * narrow if itemsize < 4 else 0
    updated = (ADAMW + AVERAGE * ema) * (narrow + count.wide)
    optimizer = Work("optimizer", 1, 0, updated + copied)

    return _gather([*forward, *backward, *(again if recompute != "none" else []), optimizer])


def seconds(part: Work, ceilings: Ceilings, reached: Reached | None = None) -> float:
    """max(flops / (FLOP/s * share), bytes / (B/s * share)), and what nothing hides: exps / (exps/s)
    and calls * launch. reached: shares of the ceilings; None: all of them, a floor where nothing
    passes from operation to operation in a cache. Errors: UsageError for a ceiling or share that is
    not positive."""
    share = Reached() if reached is None else reached
    limits = ceilings.flops, ceilings.bytes, *share
    if min(limits) <= 0 or (ceilings.exps is not None and ceilings.exps <= 0):
        raise UsageError(
            f"roofline: ceilings must be positive; got {ceilings}, {share}. Measure the device's, "
            "or leave out exps where it has none."
        )
    products = share.products
    if part.op.removesuffix("_backward") in ATTENTION:
        products = share.attention_backward if part.op.endswith("_backward") else share.attention
    product_time = part.flops / (ceilings.flops * products)
    memory_time = part.bytes / (ceilings.bytes * share.memory)
    exposed = 0.0 if ceilings.exps is None else part.exps / ceilings.exps
    return max(product_time, memory_time) + exposed + part.calls * ceilings.launch


def predict(parts: Iterable[Work], ceilings: Ceilings, reached: Reached | None = None) -> float:
    """Seconds of all parts, one after another."""
    return sum(seconds(part, ceilings, reached) for part in parts)
