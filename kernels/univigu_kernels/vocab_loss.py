"""vocab_loss: text head and cross-entropy in one, per row, without keeping the logits.

Formula  loss = logsumexp(z) - z[target], z = h weight^T + bias; 0 where target is ignore_index.
Gradient with p = softmax(z): dz = dloss * (p - onehot(target)), 0 where ignored;
         dh = dz weight; dweight = dz^T h; dbias = sum_rows dz
Dtypes   matmul in the dtype of h with fp32 accumulation; softmax and loss in fp32 (fp64 for fp64).
         Triton: fp32 logits. Triton and chunked: an fp32 sum of dh over chunks; dz is rounded to
         the dtype of h.
Saved    h, weight, bias, targets and the log-sum-exp of a row; the logits of a chunk are computed
         again in backward. The reference keeps all logits.
Bytes    2D per row for bf16 h, 2DN for the weight; backward reads it twice and writes as much.
Bound    tensor cores: 2DN FLOP per row forward, three times that with the recomputed backward. 256
         rows are 200 GFLOP over 786 MB at D 1536: memory is as near.
Triton   forward as vocab_sample's: a tile of logits stays in registers. Backward by chunks of 16384
         vocabulary rows: one launch writes dz of a chunk into a scratch that all chunks share.
Chunked  plain PyTorch, forward and backward by chunks of 4 Mi logits: 256 rows of a vocabulary of
         256k need 43 MB beside the gradients, where stored logits need 786.
Given up Triton's dz passes through the L2 cache (8 MiB for 256 rows), its two products in backward
         are cuBLAS's; dweight is always computed.
Legend   B samples, T text rows, M = B*T, D width, N vocabulary rows, S splits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._spec import Backend, Op
from ._triton import launch, operator, supports_triton, tl, triton
from ._vocab import (
    FLOOR,
    add_logits,
    check_head,
    example_head,
    exp,
    head_logits,
    head_meta,
    head_operands,
    head_tile,
    join_splits,
    reduce_configuration,
    row_tile,
    split_tile,
    split_vocabulary,
    tile_configuration,
)

CHUNK_LOGITS = 2**22  # of the chunked backend at a time
CHUNK_COLUMNS = 16384  # vocabulary rows; dz of 256 text rows is 8 MiB, so it stays in the L2 cache


def check(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    check_head("vocab_loss", h, weight, bias)
    require(
        targets.shape == h.shape[:2] and targets.dtype == torch.int64,
        "vocab_loss: targets",
        f"{list(h.shape[:2])} int64",
        (list(targets.shape), targets.dtype),
        "Pass one token id per text row.",
    )


def vocab_loss_reference(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    targets_BT: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """h [B, T, D], weight [N, D], bias [N] or None, targets [B, T] int64 -> loss [B, T] fp32."""
    check(h_BTD, weight_ND, bias_N, targets_BT)
    logits_MN = head_logits(h_BTD.flatten(0, 1), weight_ND, bias_N)
    target_M = targets_BT.flatten()
    loss = F.cross_entropy(logits_MN, target_M, reduction="none", ignore_index=ignore_index)
    return loss.view(targets_BT.shape)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // max(1, rows))
    return [slice(n, min(n + size, vocabulary)) for n in range(0, vocabulary, size)]


class _Chunked(torch.autograd.Function):
    """The log-sum-exp runs along the vocabulary; logits of a chunk live while it is worked on."""

    @staticmethod
    def forward(ctx, h_MD, weight, bias, target_M, ignore_index: int):
        lse_M = h_MD.new_full(target_M.shape, float("-inf"), dtype=compute_dtype(h_MD))
        logit_M = torch.full_like(lse_M, float("-inf"))
        for chunk in _chunks(len(h_MD), len(weight)):
            z_MC = head_logits(h_MD, weight[chunk], None if bias is None else bias[chunk])
            at_M = target_M - chunk.start
            here_M = (at_M >= 0) & (at_M < z_MC.shape[1])
            found_M = z_MC.gather(1, torch.where(here_M, at_M, 0)[:, None])[:, 0]
            logit_M = torch.where(here_M, found_M, logit_M)
            lse_M = torch.logaddexp(lse_M, z_MC.logsumexp(1))
        ctx.save_for_backward(h_MD, weight, bias, target_M, lse_M)
        ctx.ignore_index = ignore_index
        return torch.where(target_M == ignore_index, 0.0, lse_M - logit_M)

    @staticmethod
    def backward(ctx, dloss_M):
        h_MD, weight, bias, target_M, lse_M = ctx.saved_tensors
        ignored_M = target_M == ctx.ignore_index
        h_MD = h_MD.masked_fill(ignored_M[:, None], 0)  # 0 * NaN would reach dweight
        dloss_M = dloss_M.masked_fill(ignored_M, 0)
        lse_M = lse_M.masked_fill(ignored_M, 0)

        dh_MD = torch.zeros_like(h_MD, dtype=lse_M.dtype)
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dbias = None if bias is None else torch.empty_like(bias)

        for chunk in _chunks(len(h_MD), len(weight)):
            dz_MC = head_logits(h_MD, weight[chunk], None if bias is None else bias[chunk])

            # Softmax less the one-hot target, times the loss's gradient: the logits' gradient.
            dz_MC = dz_MC.sub_(lse_M[:, None]).exp_()
            at_M = target_M - chunk.start
            here_M = (at_M >= 0) & (at_M < dz_MC.shape[1])
            at_M1 = torch.where(here_M, at_M, 0)[:, None]
            dz_MC.scatter_add_(1, at_M1, -here_M[:, None].to(dz_MC.dtype))
            dz_MC *= dloss_M[:, None]

            if bias is not None:
                dbias[chunk] = dz_MC.sum(0)
            dz_MC = dz_MC.to(h_MD.dtype)
            dh_MD += dz_MC @ weight[chunk]
            if dweight is not None:
                torch.mm(dz_MC.T, h_MD, out=dweight[chunk])

        return dh_MD.to(h_MD.dtype), dweight, dbias, None, None


def vocab_loss_chunked(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    targets_BT: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """As `vocab_loss_reference`, with 16 MiB of fp32 logits at a time. An ignored row may hold
    NaN: it reaches no gradient. A target outside the vocabulary gives an infinite loss."""
    check(h_BTD, weight_ND, bias_N, targets_BT)
    flat = h_BTD.flatten(0, 1), weight_ND, bias_N, targets_BT.flatten()
    return _Chunked.apply(*flat, ignore_index).view(targets_BT.shape)


@triton.jit
def in_tile(target_M, n):
    """The column of a tile from n that int64 targets are, or one that no tile has."""
    return tl.minimum(tl.maximum(target_M - n, -1), 65536).to(tl.int32)


@triton.jit
def _vocab_loss_forward(
    h,
    weight,
    bias,
    targets,
    logit,
    peak,
    total,
    T,
    N,
    D,
    per_split,
    h_b,
    h_t,
    w_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    split = tl.program_id(2)
    b, first, read_M, h_at = row_tile(h, T, h_b, h_t, BLOCK_M)
    w_at = weight + split.to(tl.int64) * per_split * BLOCK_N * w_n

    target_M = tl.load(targets + b * T + first + read_M)
    logit_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    peak_M, total_M = tl.full([BLOCK_M], FLOOR, tl.float32), tl.zeros([BLOCK_M], tl.float32)

    last = tl.minimum((split + 1) * per_split, tl.cdiv(N, BLOCK_N))
    for tile in range(split * per_split, last):
        n = tile * BLOCK_N
        z_MN = head_tile(
            h_at, read_M, w_at, bias, n, N, D, h_t, w_n, BLOCK_M, BLOCK_N, BLOCK_K, TAIL
        )
        peak_M, total_M = add_logits(z_MN, peak_M, total_M)

        here = tl.arange(0, BLOCK_N)[None, :] == in_tile(target_M, n)[:, None]
        logit_M = tl.maximum(logit_M, tl.max(tl.where(here, z_MN, float("-inf")), 1))
        w_at += BLOCK_N * w_n

    rows_M = first + tl.arange(0, BLOCK_M)
    at_M = (split * tl.num_programs(1) + b) * T + rows_M
    tl.store(logit + at_M, logit_M, rows_M < T)
    tl.store(peak + at_M, peak_M, rows_M < T)
    tl.store(total + at_M, total_M, rows_M < T)


@triton.jit
def _vocab_loss_reduce(
    targets,
    logit,
    peak,
    total,
    loss,
    lse,
    M,
    splits,
    ignore_index,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    _, at_SM, mask_S1 = split_tile(rows_M, M, splits, BLOCK_S)
    peak_M, total_M = join_splits(peak, total, at_SM, mask_S1)
    lse_M = peak_M + tl.log(total_M)
    logit_M = tl.max(tl.load(logit + at_SM, mask_S1, other=float("-inf")), 0)
    kept_M = tl.load(targets + rows_M, rows_M < M, other=ignore_index) != ignore_index
    tl.store(loss + rows_M, tl.where(kept_M, lse_M - logit_M, 0.0), rows_M < M)
    tl.store(lse + rows_M, lse_M, rows_M < M)


@triton.jit
def _vocab_loss_backward(
    h,
    weight,
    bias,
    targets,
    lse,
    dloss,
    dz,
    start,
    T,
    N,
    D,
    width,
    ignore_index,
    h_b,
    h_t,
    w_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dz [M, width] of the vocabulary rows from `start`."""
    b, first, read_M, h_at = row_tile(h, T, h_b, h_t, BLOCK_M)
    column = tl.program_id(2) * BLOCK_N
    n = start + column
    w_at = weight + n.to(tl.int64) * w_n
    z_MN = head_tile(h_at, read_M, w_at, bias, n, N, D, h_t, w_n, BLOCK_M, BLOCK_N, BLOCK_K, TAIL)
    row_M, column_N = b * T + first + read_M, tl.arange(0, BLOCK_N)
    target_M = tl.load(targets + row_M)
    p_MN = exp(z_MN - tl.load(lse + row_M)[:, None])
    dz_MN = tl.where(column_N[None, :] == in_tile(target_M, n)[:, None], p_MN - 1.0, p_MN)
    dz_MN *= tl.load(dloss + row_M)[:, None]
    dz_MN = tl.where((target_M != ignore_index)[:, None], dz_MN, 0.0)
    at_MN = row_M[:, None] * width + (column + column_N)[None, :]
    mask_MN = (tl.arange(0, BLOCK_M) < T - first)[:, None] & (column_N < width - column)[None, :]
    tl.store(dz + at_MN, dz_MN.to(dz.dtype.element_ty), mask_MN)


def _forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Returns loss, log-sum-exp of the logits [B, T] fp32."""
    (B, T, D), N, M = h.shape, len(weight), targets.numel()
    h, weight, bias = head_operands(h, weight, bias)
    targets = targets.contiguous()

    options = tile_configuration("vocab_loss_forward", h)
    per_split, splits = split_vocabulary(h, N, options)

    logit, peak, total = (h.new_empty(splits, M, dtype=torch.float32) for _ in range(3))
    launch(
        _vocab_loss_forward,
        (triton.cdiv(T, options["BLOCK_M"]), B, splits),
        h,
        weight,
        bias,
        targets,
        logit,
        peak,
        total,
        T,
        N,
        D,
        per_split,
        *h.stride()[:2],
        weight.stride(0),
        TAIL=D % options["BLOCK_K"] > 0,
        **options,
    )

    loss, lse = (h.new_empty(B, T, dtype=torch.float32) for _ in range(2))
    options = reduce_configuration("vocab_loss_reduce", splits)
    launch(
        _vocab_loss_reduce,
        (triton.cdiv(M, options["BLOCK_M"]),),
        targets,
        logit,
        peak,
        total,
        loss,
        lse,
        M,
        splits,
        ignore_index,
        **options,
    )

    return loss, lse


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32; CUDA alone has an fp32 result of 16-bit operands."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _backward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    dloss: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dh, dweight, dbias (empty without a bias)."""
    (B, T, D), N, M = h.shape, len(weight), targets.numel()
    h = h.masked_fill((targets == ignore_index)[..., None], 0)  # 0 * NaN would reach dweight
    h, weight, bias = head_operands(h, weight, bias)
    targets, dloss = targets.contiguous(), dloss.contiguous()

    options = tile_configuration("vocab_loss_backward", h, CHUNK=CHUNK_COLUMNS)
    chunk = options.pop("CHUNK")

    dh, dweight = h.new_zeros(M, D, dtype=torch.float32), weight.new_empty(N, D)
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(N)
    scratch = h.new_empty(M * min(N, chunk))

    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        width = rows.stop - start
        dz = scratch[: M * width].view(M, width)
        launch(
            _vocab_loss_backward,
            (triton.cdiv(T, options["BLOCK_M"]), B, triton.cdiv(width, options["BLOCK_N"])),
            h, weight, bias, targets, lse, dloss, dz, start, T, N, D, width, ignore_index,
            *h.stride()[:2], weight.stride(0), TAIL=D % options["BLOCK_K"] > 0, **options,
        )  # fmt: skip

        dh += _matmul_fp32(dz, weight[rows])
        torch.mm(dz.T, h.view(M, D), out=dweight[rows])
        if bias is not None:
            dbias[rows] = dz.sum(0, dtype=torch.float32)

    return dh.to(h.dtype).view(B, T, D), dweight, dbias


forward_op = operator("univigu::vocab_loss", _forward)
backward_op = operator("univigu::vocab_loss_backward", _backward)


@forward_op.register_fake
def _(h, weight, bias, targets, ignore_index):
    return tuple(h.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))


@backward_op.register_fake
def _(h, weight, bias, targets, lse, dloss, ignore_index):
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return h.new_empty(h.shape), weight.new_empty(weight.shape), dbias


def _save(ctx, inputs, output):
    h, weight, bias, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(h, weight, bias, targets, output[1])


def _differentiate(ctx, dloss, _):
    dh, dweight, dbias = backward_op(*ctx.saved_tensors, dloss, ctx.ignore_index)
    return dh, dweight, dbias if dbias.numel() else None, None, None


forward_op.register_autograd(_differentiate, setup_context=_save)


def vocab_loss_triton(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    targets_BT: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """As `vocab_loss_reference`, with fp32 logits for 16-bit h. An ignored row may hold NaN: it
    reaches no gradient. A target outside the vocabulary gives an infinite loss."""
    check(h_BTD, weight_ND, bias_N, targets_BT)
    return forward_op(h_BTD, weight_ND, bias_N, targets_BT, ignore_index)[0]


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors."""
    h, weight, bias = head_meta(case, case["T"])
    targets = torch.empty(h.shape[:2], dtype=torch.int64, device="meta")
    loss, lse = _forward(h, weight, bias, targets, -100)
    _backward(h, weight, bias, targets, lse, loss, -100)


def example(device, dtype, generator):
    targets = torch.randint(97, (2, 5), generator=generator)
    targets[0, 1] = -100
    return (*example_head(device, dtype, generator), targets.to(device)), {}


OP = Op(
    name="vocab_loss",
    backends=(
        Backend("triton", vocab_loss_triton, supports_triton, auto_on=("cuda",)),
        Backend("chunked", vocab_loss_chunked),
        Backend("reference", vocab_loss_reference),
    ),
    example=example,
    bytes=lambda c: 2 * c["D"] * (c["B"] * c["T"] + c["N"]),
    flops=lambda c: 2 * c["B"] * c["T"] * c["D"] * c["N"],
    rehearse=rehearse,
)
