"""What the numbers and words of a configuration may be, checked field by field."""

import math
from dataclasses import MISSING, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import NamedTuple, get_args, get_origin

from engine.errors import ModelFileError, UsageError

MOST = 2**63  # every number of a configuration is below it, and so fits in 64 bits


class Range(NamedTuple):
    """The numbers from `low` to `high`, both included; `above`: low itself is not."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, number: float) -> bool:
        least = number > self.low if self.above else number >= self.low
        return least and number <= self.high and number < MOST

    def __str__(self) -> str:
        if self.high < math.inf:
            between = f"above {self.low} and at most" if self.above else f"between {self.low} and"
            return f"{between} {self.high}"
        return "positive" if self.above or self.low == 1 else f"at least {self.low}"

    def rule(self, number: float) -> str:
        """What the number breaks, in words."""
        if self.high < math.inf or abs(number) < MOST:
            return str(self)
        return f"{self} and {'below 2**63' if abs(number) < math.inf else 'finite'}"


COUNT, POSITIVE, NOT_NEGATIVE = Range(1), Range(0, above=True), Range(0)
SHARE, SEED = Range(0, 1), Range(-MOST, MOST - 1)
SIZE, LAYERS = Range(1, 2**24), Range(1, 1000)  # of a model, which is made before its file is read
SHIFT, GUIDANCE = Range(0.001, 1000), Range(-1000, 1000)
STEPS, CLIPS = Range(1, 10_000), Range(1, 10_000)  # of a run, which are listed before it starts


def check_fields(config, what: str) -> None:
    """Check every field of a frozen dataclass: its type, and its number or word against the class's
    RANGES and CHOICES; of a list, each entry. NumPy's numbers become Python's, so that they can be
    written as JSON.

    Errors: UsageError, which begins with `what`; NaN and infinity are in no range.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        union = get_origin(field.type) is UnionType
        kind, *others = get_args(field.type) if union else (field.type,)
        if value is None and NoneType in others:
            continue
        if others == [int] and not isinstance(value, kind):
            kind = int

        rules = config.RANGES.get(name), config.CHOICES.get(name)
        several = get_origin(kind)
        if several is None:
            value = checked(f"{what}: {name}", value, kind, *rules)
        elif isinstance(value, list | tuple):
            kind = get_args(kind)[0]
            numbered = enumerate(value)
            value = several(checked(f"{what}: {name}[{i}]", x, kind, *rules) for i, x in numbered)
        else:
            raise UsageError(f"{what}: {name} must be a list; got {value!r:.80}.")
        object.__setattr__(config, name, value)


def read_fields(config: type, stored: dict):
    """A `config` of those of a file's entries that are fields of it; the others are not read.
    Errors: ModelFileError for one that is missing or wrong."""
    needed = {field.name: field.default is MISSING for field in fields(config)}
    missing = [name for name, must in needed.items() if must and name not in stored]
    if missing:
        raise ModelFileError(f"{missing[0]} must be given; got none.")
    try:
        return config(**{name: value for name, value in stored.items() if name in needed})
    except UsageError as error:
        raise ModelFileError(str(error)) from None


def checked(what: str, value, kind: type, allowed: Range | None, known: tuple[str, ...] | None):
    """The value as a `kind`, in the range `allowed` or among the `known` words. Errors: UsageError,
    which begins with `what`."""
    if kind in NUMBERS:
        family, noun = NUMBERS[kind]
        if not isinstance(value, family) or isinstance(value, bool):
            raise UsageError(f"{what} must be {noun}; got {value!r:.80}.")
        if value not in allowed:
            raise UsageError(f"{what} must be {allowed.rule(value)}; got {value!s:.80}.")
        return kind(value)

    if not isinstance(value, kind):
        raise UsageError(f"{what} must be a {kind.__name__}; got {value!r:.80}.")
    if known is not None and value not in known:
        listed = ", ".join(known[:-1]) + " or " * (len(known) > 1) + known[-1]
        raise UsageError(f"{what} must be {listed}; got {value!r:.80}.")
    return value


NUMBERS = {int: (Integral, "a whole number"), float: (Real, "a number")}
