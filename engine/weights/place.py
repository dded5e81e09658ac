"""Where a model runs: its device and dtype, found and changed."""

import torch

from engine import fp8
from engine.errors import UsageError
from engine.model import UniViGU
from univigu_kernels import bind


def find_place(
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    torch_dtype: torch.dtype | None = None,
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype: those asked for; None is the GPU where there is one, and bfloat16 on a GPU,
    float32 on a CPU. torch_dtype: another name of dtype. Errors: UsageError."""
    if None not in (dtype, torch_dtype):
        raise UsageError(
            "pipeline: one of dtype and torch_dtype must be given; got both. Leave out torch_dtype."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device, dtype = torch.device(device), dtype or torch_dtype
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, dtype or usual


def moved(
    model: UniViGU, device: torch.device, dtype: torch.dtype, kernels: str, case: dict[str, int]
) -> UniViGU:
    """The model on another device or in another dtype, with kernels chosen for it. Parameters that
    need no change are shared. kernels, case: as in `load_model`."""
    precision = model.ops.precision
    ops = bind(kernels, device, dtype, precision, {**case, **model.cfg.case})
    new = UniViGU(model.cfg, "meta", dtype, ops)
    new = fp8.quantize(new) if precision == "fp8" else new
    likes, old = new.state_dict(), model.state_dict()
    state = {name: old[name].to(device, like.dtype) for name, like in likes.items()}
    new.load_state_dict(state, assign=True)
    return new.train(model.training).requires_grad_(next(model.parameters()).requires_grad)
