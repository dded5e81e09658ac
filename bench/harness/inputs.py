"""Arguments of every operation at the shapes of a model: normal data, an fp32 residual stream."""

import torch

from univigu_kernels import (
    Expert,
    Fp8Expert,
    Norm,
    SolverState,
    TextUpdate,
    VideoUpdate,
    quantize_rows,
    quantize_weight,
    rotary_tables,
)


def expert(D: int, F: int, randn) -> Expert:
    return Expert(randn(F, D) / D**0.5, randn(F), randn(D, F) / F**0.5, randn(D))


def fp8_expert(D: int, F: int, randn) -> Fp8Expert:
    up, down = (quantize_weight(randn(*s) / s[1] ** 0.5) for s in ((F, D), (D, F)))
    return Fp8Expert(*up, randn(F), *down, randn(D))


def flow_arguments(case: dict, seeds: torch.Tensor, randn) -> tuple[VideoUpdate, TextUpdate]:
    B, (frames, height, width) = case["B"], case["grid"]
    shape = (B, 16, frames, 2 * height, 2 * width)
    state = SolverState(*(randn(*shape, dtype=torch.float32) for _ in range(4)))
    row = (0.8, 0.6, 0.3, 0.2, -0.1, 0.05, 0.7, 0.4, -0.1)
    tokens = torch.zeros(B, case["T"], dtype=torch.int64, device=seeds.device)
    video = VideoUpdate(state, randn(*shape), randn(*shape), 5.0, row)
    return video, TextUpdate(tokens, tokens + 1, 0.4, seeds, 3)


def vocab_arguments(op: str, case: dict, seeds: torch.Tensor, generator, randn) -> tuple:
    B, T, D, N = (case[k] for k in "BTDN")
    h, weight, bias = randn(B, T, D), randn(N, D) / D**0.5, randn(N)
    if op == "vocab_sample":
        return h, weight, bias, seeds, 3
    targets = torch.randint(N, (B, T), generator=generator, device=seeds.device)
    return h, weight, bias, targets, -100


def arguments(op: str, case: dict, device: str, dtype: torch.dtype, seed: int = 0):
    """The (args, kwargs) of the op's call; the same seed gives the same numbers.

    case: the letters of `univigu_kernels._spec`, and "grid": frames, rows and columns of patches.
    """
    generator = torch.Generator(device).manual_seed(seed)
    B, V, T, D, H, K = (case[letter] for letter in "BVTDHK")
    L, seeds = V + T, torch.arange(B, device=device, dtype=torch.int64)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def modulation():
        return 0.3 * randn(B, 2, D, dtype=torch.float32)

    if op == "adaln":
        x = randn(B, L, D, dtype=torch.float32)
        return (x, Norm(1 + modulation(), modulation()), V), {"out_dtype": dtype}
    if op == "residual_adaln":
        x, y = randn(B, L, D, dtype=torch.float32), randn(B, L, D)
        gate, norm = modulation(), Norm(1 + modulation(), modulation())
        return (x, y, gate, norm, V), {"out_dtype": dtype}
    rotary = rotary_tables(case["grid"], T, K, device)
    if op == "rope3d":
        return (randn(B, L, H, K), rotary), {}
    if op == "qknorm_rope":
        q, k, _ = randn(B, L, 3 * D).chunk(3, -1)
        return (q, k, *(1 + 0.3 * randn(2, D)), H, rotary), {}
    if op == "rms_norm":
        return (randn(B, L, D), 1 + 0.3 * randn(D)), {}
    if op == "linear":
        return (randn(B, L, D), randn(D, D) / D**0.5, randn(D)), {}
    if op == "joint_attention":
        return (*(randn(B, L, H, K) for _ in range(3)), V), {}
    if op == "cross_attention":
        return (randn(B, L, H, K), *(randn(B, case["C"], H, K) for _ in range(2))), {}
    if op == "routed_ffn":
        experts = [expert(D, case["F"], randn) for _ in range(2)]
        return (randn(B, L, D), *experts, V), {}
    if op == "fp8_ffn":
        experts = [fp8_expert(D, case["F"], randn) for _ in range(2)]
        return (*quantize_rows(randn(B, L, D)), *experts, V, dtype), {}
    if op == "fp8_linear":
        x, w = quantize_rows(randn(B, L, D)), quantize_weight(randn(case["F"], D) / D**0.5)
        return (*x, *w, randn(case["F"]), dtype), {}
    if op in ("vocab_sample", "vocab_loss"):
        return vocab_arguments(op, case, seeds, generator, randn), {}
    if op == "rms_norm_silu":
        return (randn(B, 96, V, 16, 16), randn(96)), {}
    if op == "flow_step":
        return flow_arguments(case, seeds, randn), {}
    raise ValueError(f"bench: op must be one of the registry's; got {op!r}. See explain().")
