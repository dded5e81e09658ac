"""Uni-flow mathematics: pure functions, no model.

Video, continuous: x_sigma = (1 - sigma) x0 + sigma eps, velocity v = eps - x0, network time 1000
sigma. Text, discrete: each token is data with probability kappa_t = t^n, else source; network time
round(1000 (1 - t)). Text, embedding: z_t = (1 - t) noise + t E[token], velocity E[token] - noise.
Text runs from t = 0 (source) to 1 (data), video from sigma = 1 (noise) to 0.

Legend: B samples, T text rows, N vocabulary, D width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TIMES = 1000.0  # the network's clock: 1000 = noise, 0 = clean


def shifted(u, shift: float):
    """shift * u / (1 + (shift - 1) * u), for numbers or tensors in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def euler_sigmas(steps: int, shift: float) -> list[float]:
    """The official grid: sigma_i = shifted(1 - i/steps), i < steps, and 0. steps + 1 numbers."""
    return [shifted(1 - i / steps, shift) for i in range(steps)] + [0.0]


def unipc_sigmas(steps: int, shift: float) -> list[float]:
    """Wan's grid: shifted(linspace(1, 1/1000)), the first one less 1e-6, and 0; rounded to fp32 as
    diffusers keeps them."""
    grid = torch.linspace(1, 1 / TIMES, steps + 1, dtype=torch.float64)[:-1]
    return [*_finite(shifted(grid, shift)).float().tolist(), 0.0]


def _finite(starts: Tensor) -> Tensor:
    """Sigmas of UniPC's steps: the log-SNR of the first must be finite, so 1 becomes 1 - 1e-6."""
    starts = starts.clone()
    starts[0] -= 1e-6 * (starts[0] > 1 - 1e-6)
    return starts


def euler_table(sigmas: list[float]) -> Tensor:
    """Rows of `flow_step` coefficients, fp64 [steps, 9], for x' = x + (sigma' - sigma) v."""
    rows = [
        (s, 1, 0, 0, 0, 0, e / s, 1 - e / s, 0) for s, e in zip(sigmas, sigmas[1:], strict=False)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf


def _unip(s: float, e: float, older: float | None) -> tuple[float, float, float]:
    """UniP-2 (B2) from sigma s to e: factors of (x, m0, m1); `older` is the sigma of m1, None =
    order 1."""
    grow = (1 - e) - (1 - s) * e / s  # = -alpha' expm1(-h), finite at e = 0
    if older is None:
        return e / s, grow, 0.0
    ratio = (_log_snr(older) - _log_snr(s)) / (_log_snr(e) - _log_snr(s))
    return e / s, grow - 0.5 * grow / ratio, 0.5 * grow / ratio


def _unic(s: float, e: float, older: float | None) -> tuple[float, float, float, float]:
    """UniC (B2) at sigma e after a step from s: factors of (corrected, m0, m1, m2), where m0 is the
    new prediction at e, m1 the one at s, m2 the one at `older`."""
    grow = (1 - e) - (1 - s) * e / s
    if older is None:
        return e / s, 0.5 * grow, 0.5 * grow, 0.0
    h = _log_snr(e) - _log_snr(s)
    ratio = (_log_snr(older) - _log_snr(s)) / h
    phi2 = math.expm1(-h) / -h - 1
    b1 = phi2 / math.expm1(-h)
    b2 = (phi2 / -h - 0.5) * 2 / math.expm1(-h)
    rho_old = (b1 - b2) / (1 - ratio)  # [[1, 1], [ratio, 1]] rho = [b1, b2]
    rho_new = b1 - rho_old
    old = grow * rho_old / ratio
    return e / s, grow * rho_new, grow * (1 - rho_new) - old, old


def unipc_table(sigmas: list[float]) -> Tensor:
    """UniPC, order 2, B2, predicting x0, lower order first and last (Zhao et al. 2023, as Wan runs
    it), as rows of `flow_step` coefficients, fp64 [steps, 9]."""
    rows, steps, order = [], len(sigmas) - 1, 0
    for i, (s, e) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        correct = (1.0, 0.0, 0.0, 0.0, 0.0)
        if i:
            older = sigmas[i - 2] if order == 2 else None  # as the predictor that brought us here
            correct = (0.0, *_unic(sigmas[i - 1], s, older))
        order = min(2, steps - i, i + 1)
        rows.append((s, *correct, *_unip(s, e, sigmas[i - 1] if order == 2 else None)))
    return torch.tensor(rows, dtype=torch.float64)


def lcm_table(sigmas: list[float]) -> Tensor:
    """Rows of `flow_step` coefficients, fp64 [steps, 9], for x' = (1 - sigma') (x - sigma v), to
    which the sampler then adds sigma' of fresh noise (consistency sampling, Luo et al. 2023)."""
    rows = [(s, 1, 0, 0, 0, 0, 0, 1 - e, 0) for s, e in zip(sigmas, sigmas[1:], strict=False)]
    return torch.tensor(rows, dtype=torch.float64)


def fresh_noise_scales(table: Tensor) -> Tensor:
    """The sigma' of each row of `lcm_table`, fp64 [steps]; 0 in the last."""
    return 1 - table[:, 7]


TABLES = {"euler": euler_table, "unipc": unipc_table, "lcm": lcm_table}


def video_schedule(
    solver: str,
    steps: int,
    shift: float | None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(network times fp64 [steps], coefficient table fp64 [steps, 9]) of a solver.

    solver: "euler", "unipc" or "lcm".
    shift: of the sigmas towards noise; timesteps have none.
    sigmas: where the steps begin, before the shift. None: on Wan's grid for UniPC, else on the
        official one.
    timesteps: network times in place of sigmas; sigma is then the time / 1000.

    UniPC's times are truncated to whole numbers, as in Wan, where they are not given.
    """
    if solver not in TABLES:
        raise ValueError(f"flow: solver must be one of {', '.join(TABLES)}; got {solver!r}.")

    if timesteps is not None:
        starts = torch.tensor(timesteps, dtype=torch.float64) / TIMES
    elif sigmas is not None:
        starts = shifted(torch.tensor(sigmas, dtype=torch.float64), shift)
    elif solver == "unipc":
        starts = shifted(torch.linspace(1, 1 / TIMES, steps + 1, dtype=torch.float64)[:-1], shift)
    else:
        starts = torch.tensor(euler_sigmas(steps, shift)[:-1], dtype=torch.float64)

    times = TIMES * starts
    if solver == "unipc":
        starts = _finite(starts)
        times, starts = (TIMES * starts).trunc(), starts.float()
    if timesteps is not None:
        times = torch.tensor(timesteps, dtype=torch.float64)
    return times, TABLES[solver]([*starts.tolist(), 0.0])


def corrupt_video(clean: Tensor, noise: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
    """(x_sigma, velocity target), both [B, ...]."""
    sigma = sigma_B.view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise, noise - clean


def text_time(t_B: Tensor) -> Tensor:
    """Network time of flow time t: round(1000 (1 - t)) in [0, 1000]."""
    return (TIMES * (1 - t_B)).round().clamp(0, TIMES)


def jump_probability(t: float, t_next: float, exponent: float = 1.0) -> float:
    """Exact probability 1 - (1 - kappa')/(1 - kappa) that a token of the mixture path which is
    still source at t has become data at t_next; 1 at t_next = 1."""
    return 1 - (1 - t_next**exponent) / (1 - t**exponent)


def legacy_probability(i: int, steps: int) -> float:
    """The official joint sampler's heuristic: replace with i/(steps - 1), unconditionally."""
    return i / (steps - 1) if steps > 1 else 1.0


def corrupt_tokens(
    tokens_BT: Tensor, source_BT: Tensor, t_B: Tensor, exponent: float, uniform_BT: Tensor
) -> Tensor:
    """x_t of the mixture path: data where uniform < t^exponent, else source."""
    return torch.where(uniform_BT < t_B[:, None] ** exponent, tokens_BT, source_BT)


def commit_confident(
    tokens_BT: Tensor, proposal_BT: Tensor, confidence_BT: Tensor, committed_BT: Tensor, count_1
) -> tuple[Tensor, Tensor]:
    """Commits `count_1` tokens of each row: those that were, and the most confident of the others'
    proposals; returns (tokens, committed). Deterministic; among equals the first."""
    score_BT = torch.where(committed_BT, torch.inf, confidence_BT)
    order_BT = score_BT.argsort(dim=-1, descending=True, stable=True)
    rank_BT = order_BT.argsort(dim=-1)
    due_BT = committed_BT | (rank_BT < count_1)
    return torch.where(due_BT & ~committed_BT, proposal_BT, tokens_BT), due_BT


def cross_entropy(logits_BTN: Tensor, clean_BT: Tensor) -> Tensor:
    """-log p(x_1 | x_t) per token, fp32 [B, T]."""
    return F.cross_entropy(logits_BTN.float().transpose(1, 2), clean_BT, reduction="none")


def generalized_kl(
    logits_BTN: Tensor, clean_BT: Tensor, noised_BT: Tensor, t_B: Tensor, exponent: float = 1.0
) -> Tensor:
    """Generalized KL of the mixture path's rates, fp32 [B, T] (Shaul et al. 2024):
    -kappa_dot/(1-kappa) [p(x_t|x_t) - 1{x_t = x_1} + 1{x_t != x_1} log p(x_1|x_t)]. Needs t < 1."""
    log_p = logits_BTN.float().log_softmax(-1)
    log_clean = log_p.gather(-1, clean_BT[..., None])[..., 0]
    stay = log_p.gather(-1, noised_BT[..., None])[..., 0].exp()
    same = (noised_BT == clean_BT).float()
    rate = exponent * t_B ** (exponent - 1) / (1 - t_B**exponent)
    return -rate[:, None] * (stay - same + (1 - same) * log_clean)


def unit_vectors(rows_BTD: Tensor) -> Tensor:
    """Rows of the embedding matrix at unit mean square, as the embedding flow takes them. Without
    the normalisation the loss is least where all rows meet at zero."""
    return F.normalize(rows_BTD.float(), dim=-1) * rows_BTD.shape[-1] ** 0.5


def nearest_tokens(table_ND: Tensor, vectors_BTD: Tensor) -> Tensor:
    """argmax_k <z, E_k> - |E_k|^2/2 over the normalised rows, [B, T] int64."""
    return (vectors_BTD.float() @ F.normalize(table_ND.float(), dim=-1).T).argmax(-1)
