"""flow_step: one step of both flows: guidance and solver update of the video, jumps of the tokens.

Formula  video: v = null + guidance * (velocity - null), or velocity when there is no null;
           m0 = x - sigma * v                                    (prediction of the clean latents)
           xc = c_x x + c_corrected corrected + c_m0 m0 + c_m1 m1 + c_m2 m2          (corrector)
           x' = p_x xc + p_m0 m0 + p_m1 m1                                           (predictor)
         Every linear multistep solver is a row of these numbers; Euler from sigma to s' is
         (sigma, 1, 0, 0, 0, 0, s'/sigma, 1 - s'/sigma, 0).
         text: token' = proposal where u < probability, else token, with u the Philox-4x32-10
         uniform of key seeds[b] and counter (t, 0, step, JUMP).
Gradient none.
Dtypes   state fp32 or fp64 (Triton and CPU: fp32); velocities any float; arithmetic in the state's
         dtype.
Saved    nothing.
Bytes    32 per latent value: 4 fp32 states and 2 bf16 velocities in, 3 fp32 states out.
Bound    memory: 19 FLOP per 32 bytes.
Triton   one launch; its last programs take the tokens. The uniform is compared in fp64.
CPU      one pass over the latents and one over the tokens, compared in fp64 too.
Given up nothing.
Legend   B samples, T text rows; latents of any shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require
from ._compiled import built, supports_cpu
from ._philox import JUMP, check_seeds, philox_uniform
from ._rows import columns
from ._spec import Backend, Op
from ._triton import configuration, launch, operator, supports_triton, tl, triton

COEFFICIENTS = ("sigma", "c_x", "c_corrected", "c_m0", "c_m1", "c_m2", "p_x", "p_m0", "p_m1")


class SolverState(NamedTuple):
    """Latents `x`; `corrected`, the latents of the previous time after correction; `m1` and `m2`,
    the two latest predictions of the clean latents. All of one shape, fp32 or fp64."""

    x: Tensor
    corrected: Tensor
    m1: Tensor
    m2: Tensor


class VideoUpdate(NamedTuple):
    """`coefficients` are nine floats or a 1-D tensor of nine, in the order of COEFFICIENTS."""

    state: SolverState
    velocity: Tensor
    velocity_null: Tensor | None
    guidance: float
    coefficients: Sequence[float] | Tensor


class TextUpdate(NamedTuple):
    """The tokens and proposal [B, T] int64, probability float or 0-d, seeds [B] int64, step."""

    tokens_BT: Tensor
    proposal_BT: Tensor
    probability: float | Tensor
    seeds_B: Tensor
    step: int | Tensor


def check(video: VideoUpdate | None, text: TextUpdate | None) -> None:
    if video is not None:
        given = [t for t in (*video.state, video.velocity, video.velocity_null) if t is not None]
        require(
            all(t.shape == video.state.x.shape for t in given),
            "flow_step: state and velocities",
            "of one shape",
            [list(t.shape) for t in given],
            "Unpatchify the velocity first.",
        )

        require(
            video.state.x.dtype in (torch.float32, torch.float64),
            "flow_step: state",
            "float32 or float64",
            video.state.x.dtype,
            "Keep latents in fp32 between steps.",
        )

        require(
            len(video.coefficients) == len(COEFFICIENTS),
            "flow_step: coefficients",
            f"{len(COEFFICIENTS)} numbers ({', '.join(COEFFICIENTS)})",
            len(video.coefficients),
            "Take a row of the solver's table.",
        )

    if text is not None:
        require(
            text.tokens_BT.ndim == 2 and text.tokens_BT.shape == text.proposal_BT.shape,
            "flow_step: tokens and proposal",
            "two tensors of one shape [B, T]",
            (list(text.tokens_BT.shape), list(text.proposal_BT.shape)),
            "Sample every text row.",
        )
        check_seeds("flow_step", text.seeds_B, len(text.tokens_BT))


def _update_video(video: VideoUpdate) -> SolverState:
    x, corrected, m1, m2 = video.state
    sigma, c_x, c_corrected, c_m0, c_m1, c_m2, p_x, p_m0, p_m1 = video.coefficients
    velocity = video.velocity.to(x.dtype)
    if video.velocity_null is not None:
        null = video.velocity_null.to(x.dtype)
        velocity = null + video.guidance * (velocity - null)
    m0 = x - sigma * velocity
    x_corrected = c_x * x + c_corrected * corrected + c_m0 * m0 + c_m1 * m1 + c_m2 * m2
    return SolverState(p_x * x_corrected + p_m0 * m0 + p_m1 * m1, x_corrected, m0, m1)


def _update_text(text: TextUpdate) -> Tensor:
    rows_T = torch.arange(text.tokens_BT.shape[1], device=text.tokens_BT.device)
    uniform_BT = philox_uniform(text.seeds_B[:, None], rows_T, 0, text.step, JUMP)
    return torch.where(uniform_BT < text.probability, text.proposal_BT, text.tokens_BT)


@torch.no_grad()
def flow_step_reference(
    video: VideoUpdate | None, text: TextUpdate | None
) -> tuple[SolverState | None, Tensor | None]:
    """Returns (state after the step or None, tokens [B, T] after the jumps or None).

    The new m2 is the old m1 itself and no copy, in every backend; nothing else of what goes in
    comes out."""
    check(video, text)
    state = None if video is None else _update_video(video)
    return state, None if text is None else _update_text(text)


@triton.jit
def number(value, LOAD: tl.constexpr):
    """`value`, or in fp32 what it points to."""
    if LOAD:
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def update_video(
    x,
    corrected,
    m1,
    m2,
    velocity,
    null,
    guidance,
    sigma,
    c_x,
    c_corrected,
    c_m0,
    c_m1,
    c_m2,
    p_x,
    p_m0,
    p_m1,
    x_new,
    corrected_new,
    m0_new,
    at,
    size,
    LOAD: tl.constexpr,
):
    v = tl.load(velocity + at, at < size).to(tl.float32)
    if null is not None:
        v_null = tl.load(null + at, at < size).to(tl.float32)
        v = v_null + guidance * (v - v_null)
    x_old, m1_old = tl.load(x + at, at < size), tl.load(m1 + at, at < size)
    m0 = x_old - number(sigma, LOAD) * v
    xc = number(c_x, LOAD) * x_old + number(c_m0, LOAD) * m0 + number(c_m1, LOAD) * m1_old
    xc += number(c_corrected, LOAD) * tl.load(corrected + at, at < size)
    xc += number(c_m2, LOAD) * tl.load(m2 + at, at < size)
    x_next = number(p_x, LOAD) * xc + number(p_m0, LOAD) * m0 + number(p_m1, LOAD) * m1_old
    tl.store(m0_new + at, m0, at < size)
    tl.store(corrected_new + at, xc, at < size)
    tl.store(x_new + at, x_next, at < size)


@triton.jit
def update_text(
    tokens, proposal, probability, seeds, step, tokens_new, at, rows, count, JUMP: tl.constexpr
):
    """The uniform is compared in fp64, as the reference does: no draw near the edge differs."""
    seed = tl.load(seeds + at // rows, at < count, other=0)
    row = (at % rows).to(tl.int32)
    word, _, _, _ = tl.philox(seed, row, 0, tl.load(step).to(tl.int32), JUMP)
    uniform = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08  # 2^-24
    old, new = tl.load(tokens + at, at < count), tl.load(proposal + at, at < count)
    tl.store(tokens_new + at, tl.where(uniform < tl.load(probability), new, old), at < count)


@triton.jit
def _flow_step(
    x,
    corrected,
    m1,
    m2,
    velocity,
    null,
    guidance,
    sigma,
    c_x,
    c_corrected,
    c_m0,
    c_m1,
    c_m2,
    p_x,
    p_m0,
    p_m1,
    x_new,
    corrected_new,
    m0_new,
    tokens,
    proposal,
    probability,
    seeds,
    step,
    tokens_new,
    video_programs,
    size,
    rows,
    count,
    JUMP: tl.constexpr,
    LOAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)

    if program < video_programs:
        update_video(
            x,
            corrected,
            m1,
            m2,
            velocity,
            null,
            guidance,
            sigma,
            c_x,
            c_corrected,
            c_m0,
            c_m1,
            c_m2,
            p_x,
            p_m0,
            p_m1,
            x_new,
            corrected_new,
            m0_new,
            program * BLOCK + columns(BLOCK),
            size,
            LOAD,
        )
    else:
        at = (program - video_programs) * BLOCK + tl.arange(0, BLOCK)
        update_text(tokens, proposal, probability, seeds, step, tokens_new, at, rows, count, JUMP)


def _step(
    x: Tensor,
    corrected: Tensor,
    m1: Tensor,
    m2: Tensor,
    velocity: Tensor,
    null: Tensor | None,
    guidance: float,
    coefficients: Sequence[float],
    row: Tensor | None,
    tokens: Tensor,
    proposal: Tensor,
    probability: Tensor,
    seeds: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x', corrected, m0, tokens'. Either half may be of size 0. `row` takes the place of
    the coefficients where they are on the device."""
    state = [t.contiguous() for t in (x, corrected, m1, m2, velocity)]
    null = None if null is None else null.contiguous()
    tokens, proposal, seeds = tokens.contiguous(), proposal.contiguous(), seeds.contiguous()

    new, tokens_new = [torch.empty_like(t) for t in state[:3]], torch.empty_like(tokens)
    numbers = coefficients if row is None else row.unbind()

    options = configuration("flow_step", {"BLOCK": 1024, "num_warps": 4})
    programs = [-(-t.numel() // options["BLOCK"]) for t in (x, tokens)]
    launch(
        _flow_step, (sum(programs),), *state, null, guidance, *numbers, *new, tokens, proposal,
        probability, seeds, step, tokens_new, programs[0], x.numel(), max(1, tokens.shape[1]),
        tokens.numel(), JUMP=JUMP, LOAD=row is not None, **options,
    )  # fmt: skip

    return *new, tokens_new


step_op = operator("univigu::flow_step", _step)


@step_op.register_fake
def _(x, corrected, m1, m2, velocity, null, guidance, coefficients, row, tokens, *rest):
    return *(x.new_empty(x.shape) for _ in range(3)), tokens.new_empty(tokens.shape)


def check_fp32(state: SolverState) -> None:
    require(
        all(t.dtype == torch.float32 for t in state),
        "flow_step: state",
        "float32 in this backend",
        [t.dtype for t in state],
        "Bind flow_step=reference for float64.",
    )


def on(device: torch.device, value) -> bool:
    return isinstance(value, Tensor) and value.device == device


def beside(device: torch.device, dtype: torch.dtype, value) -> Tensor:
    """A number as a 0-d tensor on `device`, without a copy from the host, which would wait for it
    and could not be captured. One that is there already is read when the kernel runs."""
    if on(device, value):
        return value.to(dtype)
    value = value.item() if isinstance(value, Tensor) else value
    return torch.full((), value, dtype=dtype, device=device)


@torch.no_grad()
def flow_step_triton(
    video: VideoUpdate | None, text: TextUpdate | None
) -> tuple[SolverState | None, Tensor | None]:
    """As `flow_step_reference` for a state in fp32, both halves in one launch. Coefficients,
    probability and step on the device are read there: a captured graph follows them."""
    check(video, text)
    if video is None and text is None:
        return None, None

    # Empty tensors take the place of a half that is left out.
    device = (text.tokens_BT if video is None else video.state.x).device
    real = torch.empty(0, device=device)
    whole = torch.empty(0, 1, dtype=torch.int64, device=device)
    latents, tokens = (*[real] * 5, None, 1.0, [0.0] * 9, None), (whole, whole, real, whole, whole)

    if video is not None:
        check_fp32(video.state)
        numbers = video.coefficients
        numbers = ([], numbers) if on(device, numbers) else ([float(c) for c in numbers], None)
        latents = (*video.state, video.velocity, video.velocity_null, video.guidance, *numbers)

    if text is not None:
        probability = beside(device, torch.float64, text.probability)
        step = beside(device, torch.int64, text.step)
        tokens = (text.tokens_BT, text.proposal_BT, probability, text.seeds_B, step)

    *new, tokens_new = step_op(*latents, *tokens)
    state = None if video is None else SolverState(*new, video.state.m1)
    return state, None if text is None else tokens_new


def number_of(value) -> float | int:
    return value.item() if isinstance(value, Tensor) else value


@torch.no_grad()
def flow_step_cpu(
    video: VideoUpdate | None, text: TextUpdate | None
) -> tuple[SolverState | None, Tensor | None]:
    """As `flow_step_reference` for a state in fp32."""
    check(video, text)
    state = tokens = None
    if video is not None:
        check_fp32(video.state)
        row = video.coefficients
        row = row.tolist() if isinstance(row, Tensor) else [float(number_of(c)) for c in row]
        flow = (video.velocity, video.velocity_null, video.guidance, row)
        new = torch.ops.univigu_C.video_step(*video.state, *flow)
        state = SolverState(*new, video.state.m1)
    if text is not None:
        probability, step = number_of(text.probability), number_of(text.step)
        tokens = torch.ops.univigu_C.text_step(
            text.tokens_BT, text.proposal_BT, probability, text.seeds_B, step
        )
    return state, tokens


if built():

    @torch.library.register_fake("univigu_C::video_step")
    def _(x, *rest):
        return tuple(x.new_empty(x.shape) for _ in range(3))

    @torch.library.register_fake("univigu_C::text_step")
    def _(tokens, *rest):
        return tokens.new_empty(tokens.shape)


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: with and without guidance, coefficients
    from the host and on the device."""
    B, T = case["B"], case["T"]

    def meta(dtype, *shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, velocity = meta(torch.float32, B, 64 * case["V"]), meta(torch.bfloat16, B, 64 * case["V"])
    numbers, whole = meta(torch.float64, 9), meta(torch.int64, B, T)
    text = (whole, whole, numbers[0], whole[:, 0], whole[0, 0])
    for null, row in ((velocity, None), (None, None), (velocity, numbers)):
        _step(x, x, x, x, velocity, null, 5.0, [0.5] * 9, row, *text)


def example(device, dtype, generator):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(target):
        x = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
        return x.to(device, target)

    state = SolverState(*(randn(state_dtype) for _ in range(4)))
    row = (0.8, 0.6, 0.3, 0.2, -0.1, 0.05, 0.7, 0.4, -0.1)
    tokens, proposal = torch.randint(97, (2, 2, 5), generator=generator).to(device)
    seeds = torch.tensor([7, -(2**40) - 3], device=device)
    video = VideoUpdate(state, randn(dtype), randn(dtype), 5.0, row)
    return (video, TextUpdate(tokens, proposal, 0.4, seeds, 3)), {}


OP = Op(
    name="flow_step",
    backends=(
        Backend("triton", flow_step_triton, supports_triton, auto_on=("cuda",)),
        Backend("cpu", flow_step_cpu, supports_cpu),
        Backend("reference", flow_step_reference),
    ),
    example=example,
    bytes=lambda c: 32 * 64 * c["B"] * c["V"],  # a video row is a 1x2x2 patch of 16 channels
    flops=lambda c: 19 * 64 * c["B"] * c["V"],
    differentiable=False,
    rehearse=rehearse,
)
