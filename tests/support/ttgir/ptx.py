"""A small evaluator of inline PTX: one element of a tensor per lane, all lanes at once.

A register holds a torch tensor of one lane each (of no dimension where no operand is a tensor); an
instruction's type says how its bits are read. What is not listed in INSTRUCTIONS is refused.
"""

import re
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .fault import Fault

TYPES = {
    "f32": torch.float32,
    "b32": torch.int32,
    "u32": torch.int32,
    "s32": torch.int32,
    "b16": torch.int16,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
INSTRUCTIONS = {
    "mov": lambda a: a,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "min": torch.fmin,
    "max": torch.fmax,
    "neg": torch.neg,
    "fma": lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype),
    "ex2": torch.exp2,
    "lg2": torch.log2,
    "rcp": torch.reciprocal,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
}
MODIFIERS = {"approx", "ftz", "rn", "lo", "volatile", "shared", "sync", "aligned", "cta"}
COMPARE = {"lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq}
COMPARE["ne"] = torch.ne


class Instruction(NamedTuple):
    predicate: str  # "", "p" or "!p"
    name: str
    parts: list[str]  # after the name: "lt", "f32"
    operands: list[str]


class Bar(NamedTuple):
    """What the assembly does at a named barrier; the machine does it."""

    waits: bool
    number: int
    threads: int


def bits(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else value.contiguous().view(dtype)


class Assembly:
    def __init__(self, operation):
        self.operation = operation
        asm = operation.attribute("asm").strip('"').replace("\\0A", " ").replace("\\09", " ")
        self.constraints = operation.attribute("constraints").strip('"').split(",")
        if operation.attribute("packed_element") != "1":
            raise NotImplementedError(f"{operation}: several elements in a register")
        statements = (s.strip() for s in re.sub(r"[{}\n\t]", " ", asm).split(";"))
        declared = (s for s in statements if s and not s.startswith(".reg"))
        self.instructions = [self.read(statement) for statement in declared]

    def read(self, statement: str) -> Instruction:
        found = re.fullmatch(r"(?:@(!?\w+)\s+)?([a-z]\w*)((?:\.\w+)*)\s*(.*)", statement)
        if not found:
            raise NotImplementedError(f"{self.operation}: PTX {statement!r}")
        predicate, name, parts, operands = found.groups()
        instruction = Instruction(
            predicate or "", name, parts.split(".")[1:], re.split(r"\s*,\s*", operands)
        )
        known = name in INSTRUCTIONS or name in ("setp", "selp", "st", "bar")
        unknown = (
            set(instruction.parts) - MODIFIERS - set(TYPES) - set(COMPARE) - {"arrive", "pred"}
        )
        if not known or unknown or name == "bar" and predicate:
            raise NotImplementedError(f"{self.operation}: PTX {statement!r}")
        return instruction

    def bars(self) -> list[Bar]:
        bars = (i for i in self.instructions if i.name == "bar")
        return [Bar("sync" in i.parts, *map(int, i.operands)) for i in bars]

    def results(self, operands: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
        outputs = sum(c.startswith("=") for c in self.constraints)
        registers = {f"${outputs + i}": x for i, x in enumerate(operands)}
        for instruction in self.instructions:
            if instruction.name != "bar":
                self.execute(instruction, registers)
        return [bits(registers[f"${i}"], dtype) for i, dtype in enumerate(dtypes)]

    def execute(self, instruction: Instruction, registers: dict[str, Tensor]) -> None:
        taken = None
        if instruction.predicate:
            taken = registers[instruction.predicate.lstrip("!")]
            taken = ~taken if instruction.predicate.startswith("!") else taken
        if instruction.name == "st":
            if taken is None or taken.any():
                raise Fault("trap", self.operation, "a store to shared memory that must not be")
            return

        dtype = next((TYPES[part] for part in instruction.parts if part in TYPES), None)
        target, *sources = instruction.operands
        values = [self.value(source, dtype, registers) for source in sources]
        if instruction.name == "setp":
            result = next(COMPARE[p] for p in instruction.parts if p in COMPARE)(*values)
        elif instruction.name == "selp":
            result = torch.where(values[2], values[0], values[1])
        else:
            result = INSTRUCTIONS[instruction.name](*values)
        if taken is not None:
            result = torch.where(taken, result, bits(registers[target], result.dtype))
        registers[target] = result

    def value(self, text: str, dtype: torch.dtype, registers: dict[str, Tensor]) -> Tensor:
        if text in registers:
            value = registers[text]
            return value if value.dtype == torch.bool else bits(value, dtype)
        if literal := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return torch.tensor(struct.unpack(">f", bytes.fromhex(literal[1]))[0])
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", text):
            return torch.tensor(int(text, 0), dtype=dtype)
        raise NotImplementedError(f"{self.operation}: PTX operand {text!r}")
