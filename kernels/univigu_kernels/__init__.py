"""Operations of the Uni-ViGU engine, each with a plain PyTorch reference and faster backends."""

from ._adaln import Norm
from ._fp8 import quantize_rows, quantize_weight
from ._qknorm_rope_arguments import Into
from ._rotary import Rotary, rotary_tables
from ._spec import PIXELS, Backend, Op
from ._trial import Once
from .flow_step import SolverState, TextUpdate, VideoUpdate
from .fp8_ffn import Fp8Expert
from .registry import OPS, Choice, Ops, bind, bind_op, explain
from .routed_ffn import Expert

__all__ = [
    "OPS",
    "PIXELS",
    "Backend",
    "Choice",
    "Expert",
    "Fp8Expert",
    "Into",
    "Norm",
    "Once",
    "Op",
    "Ops",
    "Rotary",
    "SolverState",
    "TextUpdate",
    "VideoUpdate",
    "bind",
    "bind_op",
    "explain",
    "quantize_rows",
    "quantize_weight",
    "rotary_tables",
]
