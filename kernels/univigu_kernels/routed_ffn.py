"""routed_ffn: two feed-forward experts, chosen by modality: video rows one, text rows the other.

Formula  y = down(gelu(up(h))), gelu the tanh approximation; hard assignment, no router.
Gradient with a = up(h): da = (dy down_weight) * gelu'(a); dh = da up_weight;
         dup_weight = da^T h; ddown_weight = dy^T gelu(a); biases sum their rows
Dtypes   matmuls in the dtype of h with fp32 accumulation. Reference: bias and gelu in that dtype;
         Triton, CPU, cuBLASLt: in fp32, before the one rounding of a and of gelu(a).
Saved    h and a (gelu is recomputed by its own backward).
Bytes    4D + 4F per row in bf16 (h, the hidden row out and in, y), 8DF for the two experts; 2F more
         where gradients are wanted (a). Backward 10D + 12F per row and 16DF.
Bound    tensor cores: 4DF FLOP per row forward, 8DF backward.
Given up the hidden rows go through memory: 4F bytes for 4DF FLOP, an eighth of the time at
         D = 1536 if nothing hid it. The reference also launches four GEMMs and a cat; Triton
         launches two, in which the text rows' tiles fill the last wave of the video rows'; "split",
         for few rows, splits their sums (see _split.py) and keeps no a, as cuBLASLt. On a
         CPU 48 rows at a time go through both layers, so hidden rows stay in the L2 cache; the
         weights are packed in every call, of up to 192 rows of one expert a part at a time, where
         it is used, if they do not stay in L2; backward's products are torch's. cuBLASLt,
         the library's epilogue with bias and gelu, keeps no a: where gradients are wanted the
         reference runs. It takes one matrix at a time: with B > 1 and rows of both experts each
         sample has its own four products, which copies nothing and holds the hidden rows of one
         sample only, but fills the GPU less where those rows are few, and no tile of text rows
         fills the video rows' last wave.
Legend   B samples, L joint rows [video ; text], V video rows and T text rows of a sample,
         D width, F hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_video_rows, require, segments, wants_gradients
from ._compiled import built, supports_cpu
from ._ffn import ffn_hidden_gradient, ffn_project, ffn_up, ffn_weight_gradient
from ._gemm import gemm_configuration, tile_count
from ._problems_ffn import routed_trials
from ._products import experts_cublaslt, feed_forward, supports_cublaslt
from ._rows import packed
from ._spec import TEXT_ROWS, Backend, Op, joint_rows
from ._split import split_ffn
from ._triton import launch, operator, supports_triton


class Expert(NamedTuple):
    """up_weight [F, D], up_bias [F], down_weight [D, F], down_bias [D]."""

    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def check(h: Tensor, video: Expert, text: Expert, video_rows: int) -> None:
    require(h.ndim == 3, "routed_ffn: h", "[B, L, D]", list(h.shape), "Add the batch dimension.")
    check_video_rows("routed_ffn", video_rows, h.shape[1])

    for name, expert in (("video", video), ("text", text)):
        hidden, width = expert.up_weight.shape
        expected = [(hidden, width), (hidden,), (width, hidden), (width,)]
        require(
            width == h.shape[2] and [tuple(p.shape) for p in expert] == expected,
            f"routed_ffn: {name} expert",
            f"[F, {h.shape[2]}], [F], [{h.shape[2]}, F], [D]",
            [list(p.shape) for p in expert],
            "Pass up_weight, up_bias, down_weight, down_bias.",
        )
        require(
            all(p.dtype == h.dtype for p in expert),
            f"routed_ffn: {name} expert",
            f"{h.dtype}, as h is",
            [p.dtype for p in expert],
            "Convert one or the other.",
        )


def routed_ffn_reference(h_BLD: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    """h [B, L, D] -> y [B, L, D] in the same dtype."""
    check(h_BLD, video, text, video_rows)
    if video_rows == 0:
        return feed_forward(h_BLD, *text)
    if video_rows == h_BLD.shape[1]:
        return feed_forward(h_BLD, *video)
    h_video, h_text = segments(h_BLD, video_rows)
    return torch.cat([feed_forward(h_video, *video), feed_forward(h_text, *text)], 1)


def _columns(video: Tensor, text: Tensor, dim: int) -> tuple[int, int]:
    return video.shape[dim], text.shape[dim]


def _options(kernel, x: Tensor, video_rows: int, columns: tuple[int, int], depths: tuple[int, ...]):
    """Returns (grid, launch options) for x's rows by these columns of both experts."""
    rows = x.shape[0] * video_rows, x.shape[0] * (x.shape[1] - video_rows)
    options = gemm_configuration(kernel.__name__, x, rows, columns, max(depths))
    options["EVEN_K"] = all(depth % options["BLOCK_K"] == 0 for depth in depths)
    return (tile_count(rows, columns, options),), options


def _up(h, video: Expert, text: Expert, video_rows: int, save: bool) -> tuple[Tensor, Tensor]:
    """Returns hidden = gelu(a) [B, L, F], and a (no rows unless `save`). F is the larger expert's;
    the other's rows end early and their tails stay unwritten."""
    B, L, D = h.shape
    F = _columns(video.up_weight, text.up_weight, 0)
    sizes = B, video_rows, L - video_rows, D, *F
    hidden, a = (h.new_empty(B, rows, max(F)) for rows in (L, L if save else 0))

    grid, options = _options(ffn_up, h, video_rows, F, (D,))
    launch(
        ffn_up,
        grid,
        h,
        video.up_weight,
        text.up_weight,
        video.up_bias,
        text.up_bias,
        hidden,
        a,
        *sizes,
        *h.stride()[:2],
        video.up_weight.stride(0),
        text.up_weight.stride(0),
        max(F),
        SAVE=save,
        **options,
    )

    return hidden, a


def _project(x, video, text, biases, video_rows: int, width: int, forward: bool) -> Tensor:
    """x [B, L, F] by down_weight and `biases`, or by up_weight in the backward -> [B, L, D]."""
    B, L, x_row = x.shape
    F = _columns(video, text, 1 if forward else 0)
    sizes = B, video_rows, L - video_rows, width, *F
    y = x.new_empty(B, L, width)

    grid, options = _options(ffn_project, x, video_rows, (width, width), F)
    launch(
        ffn_project,
        grid,
        x,
        video,
        text,
        *biases,
        y,
        *sizes,
        x_row,
        video.stride(0),
        text.stride(0),
        FORWARD=forward,
        **options,
    )

    return y


def _hidden_gradient(dy, video: Tensor, text: Tensor, a, video_rows: int):
    """Returns da and hidden [B, L, F], the experts' up_bias gradients."""
    B, L, D = dy.shape
    F = _columns(video, text, 1)
    sizes = B, video_rows, L - video_rows, D, *F
    hidden, da = torch.empty_like(a), torch.empty_like(a)

    grid, options = _options(ffn_hidden_gradient, dy, video_rows, F, (D,))
    tiles = [-(-B * rows // options["BLOCK_M"]) for rows in (video_rows, L - video_rows)]
    row_sums = dy.new_empty(sum(tiles), max(F), dtype=torch.float32)

    launch(
        ffn_hidden_gradient,
        grid,
        dy,
        video,
        text,
        a,
        hidden,
        da,
        row_sums,
        *sizes,
        *dy.stride()[:2],
        video.stride(0),
        text.stride(0),
        max(F),
        **options,
    )

    sums = zip(row_sums.split(tiles), F, strict=True)
    return da, hidden, *(part[:, :columns].sum(0).to(dy.dtype) for part, columns in sums)


def _weight_gradient(da, h, dy, hidden, F: tuple[int, int], video_rows: int) -> list[Tensor]:
    """Returns the up_weight gradients of both experts, then those of down_weight."""
    B, L, D = h.shape
    shapes = [(F[0], D), (F[1], D), (D, F[0]), (D, F[1])]
    out = [h.new_empty(shape) for shape in shapes]

    rows, columns = zip(*shapes, strict=True)
    options = gemm_configuration("ffn_weight_gradient", h, rows, columns, L)

    launch(
        ffn_weight_gradient,
        (tile_count(rows, columns, options),),
        da,
        h,
        dy,
        hidden,
        *out,
        B,
        video_rows,
        L - video_rows,
        D,
        *F,
        *da.stride()[:2],
        *h.stride()[:2],
        *dy.stride()[:2],
        **options,
    )

    return out


def _forward(
    h: Tensor,
    video_up: Tensor,
    video_up_bias: Tensor,
    video_down: Tensor,
    video_down_bias: Tensor,
    text_up: Tensor,
    text_up_bias: Tensor,
    text_down: Tensor,
    text_down_bias: Tensor,
    video_rows: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y, and a for the backward (no rows unless `save`)."""
    video = Expert(*map(packed, (video_up, video_up_bias, video_down, video_down_bias)))
    text = Expert(*map(packed, (text_up, text_up_bias, text_down, text_down_bias)))
    hidden, a = _up(packed(h), video, text, video_rows, save)
    biases = video.down_bias, text.down_bias
    weights = video.down_weight, text.down_weight
    return _project(hidden, *weights, biases, video_rows, h.shape[2], True), a


def _backward(
    h: Tensor,
    a: Tensor,
    dy: Tensor,
    video_up: Tensor,
    video_down: Tensor,
    text_up: Tensor,
    text_down: Tensor,
    video_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dh, the gradients of the video expert, those of the text expert."""
    h, dy, video_up, video_down, text_up, text_down = map(
        packed, (h, dy, video_up, video_down, text_up, text_down)
    )

    da, hidden, video_up_bias, text_up_bias = _hidden_gradient(
        dy, video_down, text_down, a, video_rows
    )
    dh = _project(da, video_up, text_up, (da, da), video_rows, h.shape[2], False)

    F = _columns(video_up, text_up, 0)
    weights = _weight_gradient(da, h, dy, hidden, F, video_rows)

    parts = segments(dy, video_rows)
    down_biases = [part.sum((0, 1), dtype=torch.float32).to(dy.dtype) for part in parts]
    up_biases = video_up_bias, text_up_bias
    video, text = zip(weights[:2], up_biases, weights[2:], down_biases, strict=True)
    return dh, *video, *text


forward_op = operator("univigu::routed_ffn", _forward)
backward_op = operator("univigu::routed_ffn_backward", _backward)


@forward_op.register_fake
def _forward_shapes(h, video_up, _1, video_down, _2, text_up, *rest):
    B, L, D = h.shape
    F = max(video_up.shape[0], text_up.shape[0])
    return h.new_empty(B, L, D), h.new_empty(B, L if rest[-1] else 0, F)


@backward_op.register_fake
def _(h, a, dy, video_up, video_down, text_up, text_down, video_rows):
    def gradients(up, down):
        F, D = up.shape
        return [up.new_empty(shape) for shape in ((F, D), (F,), (D, F), (D,))]

    return h.new_empty(h.shape), *gradients(video_up, video_down), *gradients(text_up, text_down)


def _save(ctx, inputs, output):
    h, video_up, _, video_down, _, text_up, _, text_down, _, ctx.video_rows, save = inputs
    require(
        save or not any(t.requires_grad for t in inputs[:9]),
        "routed_ffn: save",
        "true where gradients are wanted",
        save,
        "Call routed_ffn_triton, which sets it.",
    )
    ctx.set_materialize_grads(False)  # of a there is none: else 2F bytes a row of zeros
    ctx.save_for_backward(h, output[1], video_up, video_down, text_up, text_down)


def _differentiate(ctx, dy, _):
    h, a, *weights = ctx.saved_tensors
    return *backward_op(h, a, dy, *weights, ctx.video_rows), None, None


forward_op.register_autograd(_differentiate, setup_context=_save)


def _by(op, h: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    check(h, video, text, video_rows)
    inputs = h, *video, *text
    return op(*inputs, video_rows, wants_gradients(*inputs))[0]


def routed_ffn_triton(h_BLD: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    """As `routed_ffn_reference`, in two launches."""
    return _by(forward_op, h_BLD, video, text, video_rows)


def routed_ffn_cpu(h_BLD: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    """As `routed_ffn_reference`; hidden rows stay in the cache unless gradients are wanted."""
    return _by(torch.ops.univigu_C.routed_ffn, h_BLD, video, text, video_rows)


def routed_ffn_cublaslt(h_BLD: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    """As `routed_ffn_reference`, two products a run of rows; that itself for gradients."""
    check(h_BLD, video, text, video_rows)
    if wants_gradients(h_BLD, *video, *text):
        return routed_ffn_reference(h_BLD, video, text, video_rows)
    return experts_cublaslt(h_BLD, video, text, video_rows)


def routed_ffn_split(h_BLD: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    """As `routed_ffn_reference`, split along the sums; that itself for gradients."""
    check(h_BLD, video, text, video_rows)
    if wants_gradients(h_BLD, *video, *text):
        return routed_ffn_reference(h_BLD, video, text, video_rows)
    return split_ffn(h_BLD, *video, *text, video_rows)


def _expert_gradients(h, a, dy, up_weight, down_weight):
    """One expert's rows -> dh, its gradients; a and dy [B, rows, F] and [B, rows, D]."""
    h, dy = h.flatten(0, 1), dy.flatten(0, 1)
    hidden, da = torch.ops.univigu_C.gelu_backward(a.flatten(0, 1), dy @ down_weight)
    dh = (da @ up_weight).unflatten(0, a.shape[:2])
    biases = (d.sum(0, dtype=torch.float32).to(d.dtype) for d in (da, dy))
    return dh, da.mT @ h, next(biases), dy.mT @ hidden, next(biases)


if built():
    torch.library.register_fake("univigu_C::routed_ffn", _forward_shapes)

    @torch.library.register_fake("univigu_C::gelu_backward")
    def _(a, dhidden):
        return a.new_empty(a.shape), a.new_empty(a.shape)

    def _differentiate_cpu(ctx, dy, _):
        h, a, *weights = ctx.saved_tensors
        experts = zip(*(segments(x, ctx.video_rows) for x in (h, a, dy)), strict=True)
        gradients = [
            _expert_gradients(h, a[..., : len(up)], dy, up, down)
            for (h, a, dy), up, down in zip(experts, weights[::2], weights[1::2], strict=True)
        ]
        dh = torch.cat([video_or_text[0] for video_or_text in gradients], 1)
        return dh, *gradients[0][1:], *gradients[1][1:], None, None

    torch.library.register_autograd(
        "univigu_C::routed_ffn", _differentiate_cpu, setup_context=_save
    )


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: bf16. The text rows alone are those of a
    step of v2t over a cached video."""
    B, V, T, D, F = (case[name] for name in "BVTDF")

    def empty(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    h, expert = empty(B, V + T, D), (empty(F, D), empty(F), empty(D, F), empty(D))
    _, a = _forward(h, *expert, *expert, V, True)
    _forward(h, *expert, *expert, V, False)
    _forward(empty(B, T, D), *expert, *expert, 0, False)
    split_ffn(empty(B, T, D), *expert, *expert, 0)
    _backward(h, a, h, *expert[::2], *expert[::2], V)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def expert():
        up, down = randn(48, 32) / 32**0.5, randn(32, 48) / 48**0.5
        return Expert(up, randn(48), down, randn(32))

    return (randn(2, 29, 32), expert(), expert(), 24), {}


OP = Op(
    name="routed_ffn",
    backends=(
        Backend("triton", routed_ffn_triton, supports_triton, auto_on=("cuda",)),
        Backend("cublaslt", routed_ffn_cublaslt, supports_cublaslt, auto_on=()),
        Backend("split", routed_ffn_split, supports_triton, auto_on=(), kinds=(TEXT_ROWS,)),
        Backend("cpu", routed_ffn_cpu, supports_cpu),
        Backend("reference", routed_ffn_reference),
    ),
    example=example,
    bytes=lambda c: 4 * joint_rows(c) * (c["D"] + c["F"]) + 8 * c["D"] * c["F"],
    flops=lambda c: 4 * joint_rows(c) * c["D"] * c["F"],
    rehearse=rehearse,
    trials=routed_trials(Expert, routed_ffn_reference),
)
