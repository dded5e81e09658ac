"""What a frozen caption step and a block launch on a GPU, counted without one: on meta tensors, at
the shapes of the 1.3B model, as an H100 would be given them.

A kernel is a launch of Triton's, or a torch operation that is neither a view nor an allocation; of
those the library may launch more than one. Backends are Triton's unless a test asks for others;
`linear` is the library's.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from engine import sample
from engine.config import ModelConfig
from engine.layers import Joint
from engine.model import UniViGU, rotary_of
from engine.schedule import schedule
from univigu_kernels import OPS, _triton, bind
from univigu_kernels._card import CARDS
from univigu_kernels.ahead import name_of

GRID, T, C = (21, 30, 52), 256, 512  # 480x832x81, its text and context rows
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
VIEWS = {"detach", "_unsafe_view", "_reshape_alias"}  # whose schema doesn't say so
LIBRARY = "linear=reference,"
TRITON = ",".join(f"{name}=triton" for name, op in OPS.items() if op.backends[0].name == "triton")


class TorchOperations(TorchDispatchMode):
    """Notes the torch operations that would launch something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, returns = op._schema.name.removeprefix("aten::"), op._schema.returns
        view = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        if not view and name not in ALLOCATIONS | VIEWS:
            self.names.append(name)
        return op(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter]:
    """Counts what is launched inside, by name, Triton's and torch's."""
    found: Counter[str] = Counter()
    with TorchOperations() as operations, _triton.rehearsal(CARDS[90]) as launches:
        yield found
    found.update(operations.names)
    found.update(name_of(launch) for launch in launches)


def model(layers: int, request: str) -> UniViGU:
    """The 1.3B model with so many layers, in bf16, without numbers."""
    cfg = replace(ModelConfig.preset("wan2.1-1.3b"), layers=layers)
    return UniViGU(cfg, "meta", torch.bfloat16, bind(f"{TRITON},{LIBRARY}{request}".rstrip(",")))


def frozen_step(layers: int, request: str = "") -> Counter:
    """One evaluation of one sample's caption, its video's K and V cached, its context empty."""
    net = model(layers, request)
    frames, height, width = GRID
    latents = torch.empty(1, 16, frames, 2 * height, 2 * width, device="meta")
    tokens = torch.empty(1, T, dtype=torch.int64, device="meta")
    plan, context = schedule("v2t", 3, 3.0, "euler", "exact"), torch.zeros(1, C, net.cfg.text_dim)
    request = sample.Request(plan, latents, tokens, context, refresh_every=len(plan))

    with torch.no_grad():
        step = sample.Step(net, request, sample.WholeRun())
        step.allocate()
        with counted() as found:
            step(sample.Kind(video=False, text=True, cached=True))
    return found


def block_passes(request: str = "") -> tuple[Counter, Counter]:
    """A block's forward pass over all rows of one sample with a prompt's context, and its backward
    pass to every parameter and input."""
    net = model(1, request)
    rows = GRID[0] * GRID[1] * GRID[2]

    def leaf(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)

    times = torch.zeros(1, device="meta"), torch.zeros(1, device="meta")
    mods, head = tree_map(
        lambda t: leaf(*t.shape) if torch.is_tensor(t) else t, net.conditions(*times).norms()
    )
    x, h = leaf(1, rows + T, net.cfg.dim), leaf(1, rows + T, net.cfg.dim, dtype=net.dtype)
    context = leaf(1, C, net.cfg.dim, dtype=net.dtype)
    joint = Joint(rows, rotary_of(GRID, T, net, torch.device("meta")), None)

    with counted() as forward:
        results = net.blocks[0](x, h, mods[0], context, joint, head)
    cotangents = [torch.empty_like(r) for r in results]
    tensors = [t for part in (mods[0].attention[:2], mods[0].ffn[:2], head[:2]) for t in part]
    wanted = [x, h, context, *tensors, mods[0].attention_gate_B2D, mods[0].ffn_gate_B2D]
    wanted += net.blocks[0].parameters()
    with counted() as backward:
        torch.autograd.grad(results, wanted, cotangents, allow_unused=True)
    return forward, backward
