"""Other people's kernels for the operations, called as their documentation has it. One that is not
installed, or is not for this device, is not offered."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness.timing import is_cuda
from univigu_kernels import Norm, Rotary, _libraries
from univigu_kernels._attention import attend_sdpa


class Peer(NamedTuple):
    """A rival of an operation. make(args, kwargs of the operation) -> a callable with the
    operation's signature, which is called with the same ones. module: what has to be installed.
    cuda: needs a GPU. backward: its gradients are its own. note: what more its call does, or leaves
    out."""

    op: str
    name: str
    make: Callable[[tuple, dict], Callable]
    module: str | None = None
    cuda: bool = True
    backward: bool = True
    note: str | None = None


def offered(op: str, device: str) -> list[Peer]:
    """What there is for `op` on this machine, beside the backends of the registry."""
    cuda = is_cuda(device)
    found = [p for p in PEERS if p.op == op and (cuda or not p.cuda) and _installed(p.module)]
    return found + (_flash_attn(op, torch.device(device)) if cuda else [])


def _installed(module: str | None) -> bool:
    return module is None or find_spec(module) is not None


def _attention(attend: Callable, args: tuple, kwargs: dict) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        o = attend(q, k, v)
        return o[0] if isinstance(o, tuple) else o  # some libraries give the log-sum-exp too

    return call


def _pinned(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return attend_sdpa(q, k, v)


def _flash_attn(op: str, device: torch.device) -> list[Peer]:
    """Generations of flash-attn that are installed beside the newest, the backend's."""
    if op not in ("joint_attention", "cross_attention"):
        return []
    libraries, (major, _) = _libraries.FLASH_ATTN, torch.cuda.get_device_capability(device)
    ready = [(x, _libraries.load(x).call) for x in libraries if major in x.majors]
    older = [(library, call) for library, call in ready if call is not None][1:]
    return [Peer(op, x.distribution, partial(_attention, call)) for x, call in older]


def _layer_norm(args: tuple, kwargs: dict) -> Callable:
    """adaLN as models write it."""

    def call(x: Tensor, norm: Norm, video_rows: int, out_dtype=None) -> Tensor:
        weight, shift, _ = norm
        n = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        video = n[:, :video_rows] * weight[:, :1] + shift[:, :1]
        text = n[:, video_rows:] * weight[:, -1:] + shift[:, -1:]
        return torch.cat([video, text], 1).to(out_dtype)

    return call


def _torch_rms_norm(args: tuple, kwargs: dict) -> Callable:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def _liger_rms_norm(args: tuple, kwargs: dict) -> Callable:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def call(x: Tensor, weight: Tensor) -> Tensor:
        # offset 0, all in fp32 ("gemma"); not in place: that would write dx over dy, round by round
        return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "gemma", False)

    return call


def _quack_rms_norm(args: tuple, kwargs: dict) -> Callable:
    from quack.rmsnorm import rmsnorm

    return lambda x, weight: rmsnorm(x.flatten(0, 1), weight, eps=1e-6).view(x.shape)


def _liger_vocab_loss(args: tuple, kwargs: dict) -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def call(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore: int) -> Tensor:
        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore, reduction="none")
        return loss(weight, h.flatten(0, 1), targets.flatten(), bias).view(targets.shape)

    return call


def _cublaslt(args: tuple, kwargs: dict) -> Callable:
    library = torch.backends.cuda.preferred_blas_library

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        before = library()
        library("cublaslt")
        try:
            return F.linear(x, weight, bias)
        finally:
            library(before)

    return call


def _torchao_config() -> object:
    """The configuration that scales by rows. By default it would change how the compiler searches
    for tiles in all that is compiled later in the process, other implementations' kernels too."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    known = signature(Float8DynamicActivationFloat8WeightConfig).parameters
    quiet = {"set_inductor_config": False} if "set_inductor_config" in known else {}
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **quiet)


def _torchao_linear(args: tuple, kwargs: dict) -> Callable:
    from torchao.quantization import quantize_

    x, x_scale, w, w_scale, bias, out_dtype = args
    layer = torch.nn.Linear(w.shape[1], w.shape[0], device=w.device, dtype=out_dtype)
    layer.weight.data = (w.float() * w_scale[:, None]).to(out_dtype)
    layer.bias.data = bias.to(out_dtype)
    model = torch.nn.Sequential(layer)
    quantize_(model, _torchao_config())
    wide = (x.float() * x_scale[..., None]).to(out_dtype)
    return lambda *_: model(wide)


def _rotation(rotary: Rotary) -> Callable[[Tensor], Tensor]:
    """Rotary embedding in real numbers, its table of all rows made ahead: the compiler takes no
    complex views, which plain PyTorch has."""
    grid, *axes, text = rotary
    rows = [x.expand(*grid, -1, -1) for x in (axes[0][:, None, None], axes[1][:, None], axes[2])]
    cos, sin = torch.cat(rows, -2).flatten(0, 2)[:, None].unbind(-1)
    text_cos, text_sin = text[:, None].unbind(-1)

    def rotate(x_BLHK: Tensor) -> Tensor:
        a, b = x_BLHK[:, : len(cos)].float().unflatten(-1, (-1, 2)).unbind(-1)
        video = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x_BLHK[:, len(cos) :].float().chunk(2, -1)
        rows = [a * text_cos - b * text_sin, a * text_sin + b * text_cos]
        return torch.cat([video, torch.cat(rows, -1)], 1)

    return rotate


def _real_rope(args: tuple, kwargs: dict) -> Callable:
    rotate = _rotation(args[-1])
    return lambda x, rotary: rotate(x).to(x.dtype)


def _real_qknorm_rope(args: tuple, kwargs: dict) -> Callable:
    rotate = _rotation(args[-1])

    def norm(x: Tensor, weight: Tensor, heads: int) -> Tensor:
        n = F.rms_norm(x.float(), weight.shape, weight.float(), 1e-6)
        return rotate(n.unflatten(-1, (heads, -1))).to(x.dtype)

    def call(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, heads: int, rotary: Rotary):
        return norm(q, weight_q, heads), norm(k, weight_k, heads)

    return call


# What torch.compile is given in the place of plain PyTorch.
COMPILABLE = {"rope3d": _real_rope, "qknorm_rope": _real_qknorm_rope}
SDPA = {  # cuDNN's is a backend of the registry
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PEERS = (
    *(
        # On a CPU there are two, and flash is what plain PyTorch takes.
        Peer(op, f"SDPA, {name}", partial(_attention, partial(_pinned, kind)), cuda=name != "math")
        for op in ("joint_attention", "cross_attention")
        for name, kind in SDPA.items()
    ),
    Peer("adaln", "F.layer_norm, then modulated", _layer_norm, cuda=False),
    Peer("rms_norm", "F.rms_norm", _torch_rms_norm, cuda=False),
    Peer("rms_norm", "Liger", _liger_rms_norm, "liger_kernel"),
    Peer("rms_norm", "quack", _quack_rms_norm, "quack"),
    Peer("linear", "cuBLASLt", _cublaslt, backward=False),
    Peer("fp8_linear", "torchao", _torchao_linear, "torchao", note="quantises its input too"),
    Peer("vocab_loss", "Liger", _liger_vocab_loss, "liger_kernel"),
)
