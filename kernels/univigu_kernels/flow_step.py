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
Dtypes   state fp32 or fp64; velocities any float; arithmetic in the state's dtype.
Saved    nothing.
Bytes    32 per latent value: 4 fp32 states and 2 bf16 velocities in, 3 fp32 states out.
Bound    memory.
Given up nothing.
Legend   B samples, T text rows; latents of any shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require
from ._philox import JUMP, philox_uniform
from ._spec import Backend, Op
from .vocab_sample import check_seeds

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
    """tokens and proposal [B, T] int64, probability float or 0-d, seeds [B] int64, step."""

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
    """-> (state after the step or None, tokens [B, T] after the jumps or None)."""
    check(video, text)
    state = None if video is None else _update_video(video)
    return state, None if text is None else _update_text(text)


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
    backends=(Backend("reference", flow_step_reference),),
    example=example,
    bytes=lambda c: 32 * 64 * c["B"] * c["V"],  # a video row is a 1x2x2 patch of 16 channels
    flops=lambda c: 19 * 64 * c["B"] * c["V"],
    differentiable=False,
)
