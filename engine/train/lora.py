"""What of a model is trained: freezing by name, and low-rank adapters (LoRA, Hu et al. 2021)."""

import hashlib
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from engine.errors import UsageError


def freeze(model: nn.Module, patterns: str) -> None:
    """Stops the gradients of the parameters whose names match one of the patterns, which are
    separated by commas. Errors: UsageError for a pattern that matches none, or if all match."""
    names = dict(model.named_parameters())
    for pattern in filter(None, patterns.split(",")):
        matched = [p for name, p in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"train: freeze must name parameters; got {pattern!r}, which none matches. "
                f"They are called {next(iter(names))}, and so on; * stands for anything."
            )
        for p in matched:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise UsageError(f"train: freeze must leave a parameter; got {patterns!r}.")


class LowRank(nn.Module):
    """weight + up @ down, up zero at first. Kernels get the sum: a matrix more in memory while its
    layer runs, and no GEMM of the rows."""

    def __init__(self, weight_NM: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        (N, M), like = weight_NM.shape, {"dtype": weight_NM.dtype, "device": weight_NM.device}
        down_RM = torch.randn(rank, M, generator=generator) * M**-0.5
        self.down = nn.Parameter(down_RM.to(**like))
        self.up = nn.Parameter(torch.zeros(N, rank, **like))

    def forward(self, weight_NM: Tensor) -> Tensor:
        return torch.addmm(weight_NM, self.up, self.down)


def _matrices(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]


def add_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Freezes the model and adapts each matrix of its blocks."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in _matrices(model):
        adapter = LowRank(module.weight, rank, generator)
        parametrize.register_parametrization(module, "weight", adapter)


def merge_lora(model: nn.Module) -> None:
    """Puts the sums in the place of the weights; a model without adapters stays as it is."""
    for module in _matrices(model):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def fingerprint(model: nn.Module) -> str:
    """A digest of the frozen parameters, which no checkpoint holds; the same on every device."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen or frozen[0][1].is_meta or isinstance(frozen[0][1], FakeTensor):
        return ""
    digest, bits = hashlib.sha256(), {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, p in frozen:
        digest.update(f"{name} {p.view(bits[p.element_size()]).sum(dtype=torch.int64)}".encode())
    return digest.hexdigest()
