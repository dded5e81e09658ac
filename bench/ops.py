"""Every operation at a model's shapes, forward and backward: plain PyTorch, torch.compile, other
people's kernels (`bench.harness.rivals`) and each backend of the registry that runs here.

Results, and in the backward pass gradients, are checked against plain PyTorch in fp32 on the same
numbers. Attention's plain PyTorch is the scaled_dot_product_attention that PyTorch takes itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch._functorch.config
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bench.harness.groups import Group, attempt, build, last, timed
from bench.harness.inputs import arguments
from bench.harness.models import ENGINE, Setting
from bench.harness.rivals import COMPILABLE, offered
from bench.roofline import ATTENTION, Work
from univigu_kernels import OPS, Rotary
from univigu_kernels._spec import ALL_ROWS, Backend, joint_rows

FORWARD, BACKWARD = "forward", "backward"
PLAIN, COMPILED = "plain PyTorch", "torch.compile"
LIBRARIES = {  # backends that call another's kernel
    "flash_attn": "flash-attn",
    "cudnn": "SDPA, cudnn",
    "xformers": "xformers",
    "torch": "torch._scaled_mm",
    "cublaslt": "cuBLASLt, GELU epilogue",
}
AGREEMENT = {"bfloat16": 2e-2, "float32": 1e-3}  # relative L2, the worst of an operation's results
LOOSE = {  # in bf16
    "vocab_sample": 5e-2,  # share of tokens: plain PyTorch rounds logits to bf16, others do not
    "fp8_ffn": 5e-2,  # another order of a sum may round a hidden number to the next of e4m3
}
TOGETHER = True  # one process a dtype: starting one takes longer than most operations
ROUNDS, BUDGET = 30, {"cpu": 2.5, "cuda": 1.5}  # seconds of an operation and a pass
LOW = torch.bfloat16, torch.float16


def cases(setting: Setting) -> list[tuple[str, str]]:
    """fp32 on a CPU too, where the operation has it."""
    dtypes = ("bfloat16",) if setting.cuda else ("bfloat16", "float32")
    return [(op, d) for op in OPS for d in dtypes if d == "bfloat16" or not op.startswith("fp8")]


def shapes(s: Setting) -> dict:
    """A case of `univigu_kernels._spec`, and the grid of patches."""
    cfg, (frames, height, width) = s.cfg, s.latent
    return {
        "B": s.samples,
        "V": s.video_rows,
        "T": s.text_rows,
        "C": s.context_rows,
        "D": cfg.dim,
        "H": cfg.heads,
        "K": cfg.head_dim,
        "F": cfg.ffn_dim,
        "N": cfg.vocab_rows,
        "grid": (frames, height // 2, width // 2),
    }


def exponentials(op: str, c: dict) -> int:
    rows, tokens = joint_rows(c), c["B"] * c["T"] * c["N"]
    return {
        "joint_attention": rows * (c["V"] + c["T"]) * c["H"],
        "cross_attention": rows * c["C"] * c["H"],
        "routed_ffn": rows * c["F"],
        "fp8_ffn": rows * c["F"],
        "vocab_loss": tokens,
        "vocab_sample": tokens,
        "rms_norm_silu": 96 * 256 * c["B"] * c["V"],
    }.get(op, 0)


def part(op: str, c: dict, dtype: str, which: str) -> Work:
    """Work of a call, as the operation declares it for bf16 beside an fp32 stream. In fp32 all that
    is bf16 doubles. Backward: an attention computes its scores again, 5 products for 2; others 4
    for 2; each twice the bytes."""
    flops, size = OPS[op].flops(c), OPS[op].bytes(c)
    if dtype == "float32":
        size += size // {"adaln": 3, "residual_adaln": 3, "flow_step": 8}.get(op, 1)
    if which == BACKWARD:
        flops, size = (5 if op in ATTENTION else 4) * flops // 2, 2 * size
    return Work(f"{op}_backward" if which == BACKWARD else op, 1, flops, size, exponentials(op, c))


def plain(op: str) -> Callable:
    by_name = {b.name: b.call for b in OPS[op].backends}
    return by_name["sdpa" if op in ATTENTION else "reference"]


def exact(op: str, s: Setting) -> Callable:
    """What is taken for the truth, in fp32. On a GPU an attention's scores would not fit."""
    return plain(op) if s.cuda else OPS[op].reference


def backends(op: str, device: str, dtype: torch.dtype) -> list[Backend]:
    """All backends of the registry that run here and are for all rows, but Triton's interpreter,
    which nobody would time."""
    where = torch.device(device)
    return [
        b
        for b in OPS[op].backends
        if b.supports(where, dtype) is None
        and (b.kinds is None or ALL_ROWS in b.kinds)
        and not (b.name == "triton" and where.type == "cpu")
    ]


def makers(op: str, s: Setting, dtype: torch.dtype, inputs) -> dict[str, Callable]:
    """Name -> a maker of a callable with the operation's signature. A quick run compiles nothing;
    the compiler leaves attention and a single product to the same kernels."""
    found = {PLAIN: lambda: plain(op)}
    if s.preset != "quick" and op not in (*ATTENTION, "linear"):
        source = COMPILABLE.get(op, lambda *_: plain(op))
        found[COMPILED] = lambda: torch.compile(source(*inputs), dynamic=False)
    found |= {peer.name: partial(peer.make, *inputs) for peer in offered(op, s.device)}
    for backend in backends(op, s.device, dtype):
        if backend.name not in ("reference", "sdpa"):
            name = LIBRARIES.get(backend.name, f"{ENGINE}, {backend.name}")
            found[name] = lambda call=backend.call: call
    return found


def widened(tree):
    """bf16 and fp16 tensors and dtypes as fp32."""

    def widen(x):
        if isinstance(x, torch.dtype):
            return torch.float32 if x in LOW else x
        return x.float() if isinstance(x, torch.Tensor) and x.dtype in LOW else x

    return tree_map(widen, tree)


def tensors(tree) -> list[torch.Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


def disagreement(result, truth) -> float:
    """The largest over all results: relative L2, of tokens the share that differ."""
    pairs = zip(tensors(result), tensors(truth), strict=True)
    return max(
        (
            (a.float() - b.float()).norm() / b.float().norm()
            if b.is_floating_point()
            else (a != b).float().mean()
        ).item()
        for a, b in pairs
    )


def differentiated(call: Callable, inputs, dtype: torch.dtype) -> Callable:
    """A call of the backward pass alone, over a graph that is kept, from cotangents that `dtype`
    holds. Gives the gradients of all float arguments but rotary tables, which are constants."""
    leaves, spec = tree_flatten(inputs, is_leaf=lambda x: isinstance(x, Rotary))
    wanted = [_is_float(x) for x in leaves]
    leaves = [x.detach().requires_grad_() if w else x for x, w in zip(leaves, wanted, strict=True)]
    args, kwargs = tree_unflatten(leaves, spec)
    outputs = [t for t in tensors(call(*args, **kwargs)) if t.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    cotangents = [
        torch.randn(t.shape, generator=generator, device=t.device).to(dtype).to(t.dtype)
        for t in outputs
    ]
    into = [x for x, w in zip(leaves, wanted, strict=True) if w]
    return lambda: torch.autograd.grad(outputs, into, cotangents, retain_graph=True)


def _is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (*LOW, torch.float32)


def checked(calls: dict[str, Callable], truth: Callable, failed: dict[str, str]) -> dict:
    """Errors of the calls that run; none without a truth."""
    expected, errors = attempt("plain PyTorch in fp32", failed, truth), {}
    for name, call in calls.items() if expected is not None else ():
        result = attempt(name, failed, lambda call=call: disagreement(call(), expected))
        errors |= {} if result is None else {name: result}
    return errors


def adjusted(s: Setting) -> Setting:
    if s.preset == "quick":
        return s
    return replace(s, rounds=ROUNDS, budget=BUDGET["cuda" if s.cuda else "cpu"])


def group_of(op: str, dtype: str, s: Setting, which: str, names) -> Group:
    work = part(op, shapes(s), dtype, which)
    parts = {name: [work] for name in names}
    return Group(op, dtype, work.flops, work.bytes, {"pass": which}, parts)


def notes(op: str, device: str) -> dict[str, str]:
    return {peer.name: peer.note for peer in offered(op, device) if peer.note}


def limit_of(op: str, dtype: str) -> float:
    return LOOSE.get(op, AGREEMENT[dtype]) if dtype == "bfloat16" else AGREEMENT[dtype]


@torch.no_grad()
def forward(op: str, dtype: str, s: Setting, inputs) -> tuple[Group, dict[str, Callable]]:
    """Returns the group, and the implementations that could be made."""
    failed, (args, kwargs), (wide, options) = {}, inputs, widened(inputs)
    made, kept = build(makers(op, s, getattr(torch, dtype), inputs), failed, s.device)
    calls = {name: partial(call, *args, **kwargs) for name, call in made.items()}
    errors = checked(calls, lambda: exact(op, s)(*wide, **options), failed)
    group = group_of(op, dtype, s, FORWARD, calls)
    group.notes = notes(op, s.device)
    return last(timed(group, calls, errors, failed, limit_of(op, dtype), s, kept)), made


def backward(op: str, dtype: str, s: Setting, inputs, made: dict[str, Callable]) -> Group:
    kind, failed = getattr(torch, dtype), {}
    # A compiled backward otherwise frees what it was given, and can run once.
    with torch._functorch.config.patch(donated_buffer=False):
        graphs = {name: partial(differentiated, call, inputs, kind) for name, call in made.items()}
        calls, kept = build(graphs, failed, s.device)
        truth = partial(differentiated, exact(op, s), widened(inputs), kind)
        errors = checked(calls, lambda: truth()(), failed)
        group = group_of(op, dtype, s, BACKWARD, calls)
        last(timed(group, calls, errors, failed, limit_of(op, dtype), s, kept))
    group.refused = {name: f"backward: {why}" for name, why in failed.items()}
    return group


def measure(op: str, dtype: str, s: Setting) -> Iterator[Group]:
    """Measures the forward, then the backward of the implementations that forward was timed of.
    Memory, on a GPU: what a call takes beyond its arguments; backward's with what forward saved for
    it."""
    inputs = arguments(op, shapes(s), s.device, getattr(torch, dtype))
    first, made = forward(op, dtype, s, inputs)
    yield first
    if not OPS[op].differentiable:
        return
    without = {peer.name for peer in offered(op, s.device) if not peer.backward}
    without.add(LIBRARIES["cublaslt"])  # for gradients it is plain PyTorch
    sound = {name: made[name] for name in first.times if name not in without}
    yield backward(op, dtype, s, inputs, sound)
