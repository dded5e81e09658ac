"""Text of TTGIR -> operations, each with the line of Python that it came from.

Reads what Triton prints (one operation a line, regions indented below it), not MLIR in general.
Layouts are kept as text: a tensor is its shape and its elements.
"""

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

DTYPES = {
    "i1": torch.bool,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2": torch.float8_e5m2,
}
NAME = r"%[\w.$-]+(?:#\d+)?"
LOCATION = re.compile(r" loc\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
LIBRARY = str(Path(triton.__file__).parent)


def split(text: str, separator: str = ",") -> list[str]:
    """The parts between separators that no bracket encloses."""
    parts, depth, last = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "<([{":
            depth += 1
        elif letter in ">)]}" and text[i - 1 : i + 1] != "->":
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    return [*parts, text[last:].strip()] if text.strip() else []


@dataclass(frozen=True)
class Type:
    shape: tuple[int, ...]
    element: str  # "f32", "!tt.ptr<f32>"
    encoding: str  # of a memdesc or a descriptor: its shared layout's name

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of an element, or of what it points to."""
        return DTYPES[re.sub(r"!tt\.ptr<(\w+).*>", r"\1", self.element)]

    @property
    def pointer(self) -> bool:
        return self.element.startswith("!tt.ptr")


@functools.cache
def read_type(text: str) -> Type:
    box = re.fullmatch(r"(?:tensor|!ttg\.memdesc|!tt\.tensordesc)<(.*)>", text)
    if not box:
        return Type((), text, "")
    if box[1].startswith("tensor<"):
        return read_type(box[1])
    content, *rest = split(box[1])
    sizes, element = re.fullmatch(r"((?:\d+x)*)(.*)", content).groups()
    return Type(tuple(map(int, sizes.split("x")[:-1])), element, rest[0] if rest else "")


@dataclass
class Region:
    arguments: list[str]
    operations: list["Operation"] = field(default_factory=list)
    warps: int = 0  # of a partition


@dataclass(eq=False)
class Operation:
    name: str
    results: list[str]
    head: str  # what stands before the types, without the attributes
    attributes: str
    types: str
    where: str = "unknown"  # "file.py:line"
    regions: list[Region] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(NAME, self.head)

    @functools.cached_property
    def literals(self) -> list[int]:
        """Integers among the operands."""
        return [int(n) for n in re.findall(r"(?<=[\[ ])-?\d+(?=[,\]]|$)", self.head)]

    def attribute(self, name: str, otherwise: str | None = None) -> str | None:
        pattern = rf'\b{name} = (array<[^>]*>|"(?:[^"\\]|\\.)*"|[^,:]+)'
        found = re.search(pattern, self.attributes)
        return found[1].strip() if found else otherwise

    def integers(self, name: str) -> list[int]:
        """The integers of an attribute such as array<i32: 1, 0>."""
        return [int(n) for n in self.attribute(name).split(":")[1].rstrip(">").split(",")]

    @functools.cached_property
    def operand_types(self) -> list[Type]:
        return [read_type(t) for t in split(re.split(r" -> | to ", self.types)[0].strip("()"))]

    @functools.cached_property
    def result_types(self) -> list[Type]:
        """Where an arrow tells them; else that of the last operand (a comparison: of both)."""
        *arrow, last = re.split(r" -> | to ", self.types or "i1")
        types = [read_type(t) for t in split(last.removeprefix("(").removesuffix(")"))]
        return types if arrow else types[-1:]

    @property
    def type(self) -> Type:
        return self.result_types[0]


@dataclass
class Parameter:
    value: str  # %name
    python: str
    type: Type


@dataclass
class Module:
    parameters: list[Parameter]
    body: Region
    warps: int
    layouts: dict[str, str]


class _Locations:
    """#loc7 -> "file.py:line", of the kernel's own code rather than of Triton's library."""

    def __init__(self, lines: list[str]):
        found = (re.fullmatch(r"(#loc\d*) = loc\((.*)\)", line) for line in lines)
        self.texts = {match[1]: match[2] for match in found if match}

    def chain(self, text: str) -> list[tuple[str, str]]:
        """(file, line) from the inside out."""
        if text in self.texts:
            return self.chain(self.texts[text])
        if text.startswith("callsite("):
            inner, outer = text[len("callsite(") : -1].split(" at ", 1)
            return self.chain(inner) + self.chain(outer)
        if place := re.fullmatch(r'"([^"]*)":(\d+):\d+.*', text):
            return [(place[1], place[2])]
        if named := re.fullmatch(r'"[^"]*"\((.*)\)', text):
            return self.chain(named[1])
        return []

    def where(self, text: str) -> str:
        chain = self.chain(text)
        own = [place for place in chain if not place[0].startswith(LIBRARY)]
        return ":".join((own or chain or [("unknown",)])[0])


class _Reader:
    def __init__(self, text: str):
        lines = [line.strip() for line in text.splitlines()]
        self.locations = _Locations(lines)
        self.lines = [line for line in lines if line and not line.startswith("#loc")]
        self.at = 0

    def module(self) -> Module:
        layouts, warps = {}, 0
        while not self.lines[self.at].startswith("tt.func"):
            line = self.lines[self.at]
            if alias := re.match(r"(#\w+) = (.*)", line):
                layouts[alias[1]] = alias[2]
            if found := re.search(r'"ttg.num-warps" = (\d+)', line):
                warps = int(found[1])
            self.at += 1
        parameters = self.parameters(self.lines[self.at])
        self.at += 1
        return Module(parameters, self.region([]), warps, layouts)

    def parameters(self, line: str) -> list[Parameter]:
        found = []
        for text in split(re.search(r"\((.*)\)", line)[1]):
            value, rest = text.split(": ", 1)
            if not value.startswith("%"):
                continue
            named = re.search(r' loc\("(\w+)"', rest)
            type = re.sub(r" \{.*\}$", "", LOCATION.sub("", rest))
            found.append(Parameter(value, named[1] if named else value[1:], read_type(type)))
        return found

    def region(self, arguments: list[str]) -> Region:
        """The operations up to the brace that ends them; `at` is then that brace's line."""
        region = Region(arguments)
        while not (line := self.lines[self.at]).startswith("}"):
            self.at += 1
            if line.startswith("^"):
                region.arguments = re.findall(rf"({NAME}):", line)
            else:
                region.operations.append(self.operation(line))
        return region

    def operation(self, line: str) -> Operation:
        place = LOCATION.search(line)
        made = self.plain(LOCATION.sub("", line))
        if made.name == "ttg.warp_specialize":
            made.regions, last = self.partitions()
        elif line.endswith("{"):
            made.regions, last = self.regions()
        else:
            last = line
        if made.name == "tt.reduce":
            made.types = LOCATION.sub("", last).removeprefix("}) : ")
        place = place or LOCATION.search(last)
        made.where = self.locations.where(place[1]) if place else "unknown"
        return made

    def plain(self, line: str) -> Operation:
        names, equals, body = line.partition(" = ")
        if not equals or not re.fullmatch(rf"{NAME}(:\d+)?(, {NAME})*", names):
            names, body = "", line
        results = []
        for one in names.split(", ") if names else []:
            name, _, count = one.partition(":")
            results += [f"{name}#{i}" for i in range(int(count))] if count else [name]

        name = re.match(r'"?([\w.]+)"?', body)
        body, attributes = body[name.end() :], ""
        if asm := re.match(r' "(?:[^"\\]|\\.)*"', body):
            body, attributes = body[asm.end() :], f"asm ={asm[0]}, "
        if dictionary := re.search(r"\s<?\{([^{}]+)\}>?", body):
            attributes += dictionary[1]
            body = body[: dictionary.start()] + body[dictionary.end() :]
        head, types = (re.split(r"(?:^| ): ", body, maxsplit=1) + [""])[:2]
        if " -> " in head:
            head, types = head.split(" -> ", 1)
        return Operation(name[1], results, head.strip(), attributes, types.strip())

    def regions(self) -> tuple[list[Region], str]:
        """Returns (the regions, the line that ends the last)."""
        found = [self.region([])]
        while re.fullmatch(r"\} (else|do) \{", self.lines[self.at]):
            self.at += 1
            found.append(self.region([]))
        self.at += 1
        return found, self.lines[self.at - 1]

    def partitions(self) -> tuple[list[Region], str]:
        self.at += 1  # past "default {"
        found = [self.region([])]
        self.at += 1
        while (line := self.lines[self.at]).startswith("partition"):
            self.at += 1
            partition = self.region(re.findall(rf"({NAME}):", line))
            partition.warps = int(re.search(r"num_warps\((\d+)\)", line)[1])
            found.append(partition)
            self.at += 1
        return found, self.lines[self.at - 1]


def read_module(text: str) -> Module:
    return _Reader(text).module()
