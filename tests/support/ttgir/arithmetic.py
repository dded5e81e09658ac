"""The operations that have no effect but their result.

A tensor is a torch tensor of its shape; layouts do not exist here. A single integer is a Python
int, signed (an i1: 0 or 1), a single float a tensor of no dimension. `pure` makes the function of
an operation once; it is then called with the values.
"""

import operator
import struct

import torch
from torch import Tensor

from .fault import Fault
from .memory import Pointers
from .parse import Operation, Type


def bits(type: Type) -> int:
    return 1 if type.dtype == torch.bool else 8 * type.dtype.itemsize


def wrapped(value: int, width: int) -> int:
    if width == 1:
        return value & 1
    half = 1 << (width - 1)
    return (value + half) % (2 * half) - half


def settled(value, type: Type):
    """A single integer as a Python int of its width. Within a reduction, whose region speaks of
    single elements, values are tensors all the same."""
    many = type.shape or isinstance(value, Tensor) and value.dim()
    if many or isinstance(value, Pointers) or type.dtype.is_floating_point:
        return value
    return wrapped(int(value), bits(type))


def both(on_tensors, on_integers):
    """A function of tensors or of Python ints."""

    def apply(a, *rest):
        return (on_integers if isinstance(a, int) else on_tensors)(a, *rest)

    return apply


def quotient(operation: Operation):
    def divide(a, b):
        if not (b if isinstance(b, int) else b.all()):
            raise Fault("bounds", operation, "divides by zero")
        if isinstance(a, int):
            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return torch.div(a, b, rounding_mode="trunc")

    return divide


def remainder(operation: Operation):
    divide = quotient(operation)
    return lambda a, b: a - divide(a, b) * b


def integer_compare(operation: Operation):
    predicate = operation.head.split(",")[0]
    type = operation.operand_types[0]
    compare = getattr(operator, predicate.lstrip("su") if len(predicate) > 2 else predicate)
    flip = 0 if predicate[0] != "u" else -1 << (bits(type) - 1)  # maps unsigned order on signed
    return lambda a, b: compare(a ^ flip, b ^ flip)


def float_compare(operation: Operation):
    predicate = operation.head.split(",")[0]
    if predicate in ("ord", "uno"):
        ordered = predicate == "ord"
        return lambda a, b: (a.isnan() | b.isnan()) ^ ordered
    compare = getattr(operator, predicate[1:])
    if predicate[0] == "u":
        return lambda a, b: compare(a, b) | a.isnan() | b.isnan()
    return lambda a, b: compare(a, b) & ~(a.isnan() | b.isnan())


def select(condition, a, b):
    if isinstance(condition, int):
        return a if condition else b
    return torch.where(condition, a, b)


def constant(operation: Operation):
    type, text = operation.type, operation.head.removeprefix("dense<").removesuffix(">")
    if text in ("true", "false"):
        number = text == "true"
    elif type.dtype.is_floating_point and text.startswith("0x"):
        form = {16: "H", 32: "I", 64: "Q"}[bits(type)]
        raw = torch.frombuffer(bytearray(struct.pack(form, int(text, 16))), dtype=type.dtype)
        number = raw.item()
    elif type.dtype.is_floating_point:
        number = float(text)
    else:
        number = int(text, 0)
    value = settled(torch.full(type.shape, number, dtype=type.dtype), type)
    return lambda: value


def converted(operation: Operation):
    """To the result's type, rounding to nearest even, or to zero where it is an integer."""
    if operation.attribute("rounding", "1") != "1":
        raise NotImplementedError(f"{operation}: rounding {operation.attributes}")
    source, target = operation.operand_types[0], operation.type
    signed_bit = operation.name == "arith.extsi" and source.dtype == torch.bool

    def convert(x):
        x = torch.as_tensor(x, dtype=source.dtype)
        if operation.name == "arith.trunci" and target.dtype == torch.bool:
            x = x & 1
        x = x.to(target.dtype)
        return -x if signed_bit else x

    return convert


def unsigned(operation: Operation):
    source, target = operation.operand_types[0], operation.type
    mask = (1 << bits(source)) - 1
    return lambda x: (torch.as_tensor(x).to(torch.int64) & mask).to(target.dtype)


def reinterpreted(operation: Operation):
    source, target = operation.operand_types[0], operation.type

    def convert(x):
        if isinstance(x, Pointers):
            if source.dtype.itemsize != target.dtype.itemsize:
                raise NotImplementedError(f"{operation}: pointers to another size")
            return Pointers(x.memory, target.dtype, x.places)
        return torch.as_tensor(x, dtype=source.dtype).contiguous().view(target.dtype)

    return convert


def addptr(pointer: Pointers, offset) -> Pointers:
    return pointer.at(pointer.places + (offset if isinstance(offset, int) else offset.long()))


def moved(function):
    """A function that moves elements, of tensors and of tensors of pointers."""

    def apply(x):
        return x.at(function(x.places)) if isinstance(x, Pointers) else function(x)

    return apply


def splat(operation: Operation):
    type = operation.type
    dtype = torch.int64 if type.pointer else type.dtype
    return moved(lambda x: torch.as_tensor(x, dtype=dtype).expand(type.shape))


def broadcast(operation: Operation):
    return moved(lambda x: x.expand(operation.type.shape))


def expand_dims(operation: Operation):
    axis = int(operation.attribute("axis"))
    return moved(lambda x: x.unsqueeze(axis))


def reshape(operation: Operation):
    if "allow_reorder" in operation.attributes:
        raise NotImplementedError(f"{operation}: in any order")
    return moved(lambda x: x.reshape(operation.type.shape))


def trans(operation: Operation):
    order = operation.integers("order")
    return moved(lambda x: x.permute(order))


def make_range(operation: Operation):
    values = torch.arange(int(operation.attribute("start")), int(operation.attribute("end")))
    values = values.to(operation.type.dtype)
    return lambda: values


def poison(operation: Operation):
    """A value that no result may depend on: NaN, or the integer that gives the wildest index."""
    type = operation.type
    if type.dtype.is_floating_point:
        value = torch.full(type.shape, float("nan"), dtype=type.dtype)
    else:
        value = settled(torch.full(type.shape, -1 << (bits(type) - 1), dtype=type.dtype), type)
    return lambda: value


def assume(operation: Operation):
    def check(condition):
        if not condition:
            raise Fault("trap", operation, "the assumption does not hold")

    return check


SAME = {  # functions of values alone
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrsi": operator.rshift,
    "arith.minsi": both(torch.minimum, min),
    "arith.maxsi": both(torch.maximum, max),
    "arith.addf": operator.add,
    "arith.subf": operator.sub,
    "arith.mulf": operator.mul,
    "arith.divf": operator.truediv,
    "tt.precise_divf": operator.truediv,
    "arith.negf": operator.neg,
    "arith.maxnumf": torch.fmax,
    "arith.minnumf": torch.fmin,
    "arith.maximumf": torch.maximum,
    "arith.minimumf": torch.minimum,
    "arith.select": select,
    "math.exp": torch.exp,
    "math.exp2": torch.exp2,
    "math.log": torch.log,
    "math.log2": torch.log2,
    "math.sqrt": torch.sqrt,
    "tt.precise_sqrt": torch.sqrt,
    "math.rsqrt": torch.rsqrt,
    "math.absf": torch.abs,
    "math.absi": abs,
    "math.floor": torch.floor,
    "math.ceil": torch.ceil,
    "math.fma": lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype),
    "tt.addptr": addptr,
    "tt.join": lambda a, b: torch.stack((a, b), -1),
    "tt.split": lambda x: x.unbind(-1),
    "ttg.convert_layout": moved(lambda x: x.view(x.shape)),  # other registers: another tensor
}
MADE = {  # functions of values that depend on more of the operation
    "arith.constant": constant,
    "arith.divsi": quotient,
    "arith.remsi": remainder,
    "arith.cmpi": integer_compare,
    "arith.cmpf": float_compare,
    "arith.extf": converted,
    "arith.truncf": converted,
    "arith.trunci": converted,
    "arith.extsi": converted,
    "arith.sitofp": converted,
    "arith.fptosi": converted,
    "tt.fp_to_fp": converted,
    "arith.extui": unsigned,
    "arith.bitcast": reinterpreted,
    "tt.bitcast": reinterpreted,
    "tt.splat": splat,
    "tt.broadcast": broadcast,
    "tt.expand_dims": expand_dims,
    "tt.reshape": reshape,
    "tt.trans": trans,
    "tt.make_range": make_range,
    "ub.poison": poison,
    "llvm.intr.assume": assume,
}


def pure(operation: Operation):
    """The function of an operation, or None where it has an effect."""
    if operation.name in MADE:
        function = MADE[operation.name](operation)
    elif operation.name in SAME:
        function = SAME[operation.name]
    else:
        return None
    if not operation.results or len(operation.results) > 1:
        return function
    type = operation.type
    if operation.name.startswith("arith.cmp"):
        type = Type(type.shape, "i1", "")
    return lambda *values: settled(function(*values), type)
