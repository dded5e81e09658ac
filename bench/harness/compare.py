"""Two results of one benchmark: what became slower or faster beyond noise."""

import math
from typing import NamedTuple

from engine.errors import UsageError

REGRESSED = 8  # exit code where a row became slower or is gone
KEYS = ("case", "pass", "along", "x", "dtype", "implementation")


class Change(NamedTuple):
    """ratio: time of B over time of A. width: what noise alone may do, as a factor. verdict:
    "same", "slower", "faster", "gone" where B lacks the row, "new" where A does."""

    key: str
    ratio: float | None
    width: float | None
    verdict: str


def compare(a: dict, b: dict) -> list[Change]:
    """Compares the times. An interval of `bench.timing` says where another run's figure falls 95%
    of the time; the wider one of the two runs counts. Errors: UsageError for results that do not
    compare."""
    for field, one, other in (
        ("benchmark", a["bench"], b["bench"]),
        ("device", a["environment"]["device"], b["environment"]["device"]),
        ("setting", _size(a), _size(b)),
    ):
        if one != other:
            raise UsageError(
                f"bench: both results must be of the same {field}; got {one} and {other}. "
                "Measure both on one machine with the same flags."
            )
    before, after = ({_key(row): row for row in table["rows"]} for table in (a, b))
    return [_change(key, before.get(key), after.get(key)) for key in before | after]


def _size(table: dict) -> dict:
    return {k: v for k, v in table["setting"].items() if k not in ("rounds", "repeats", "budget")}


def _key(row: dict) -> str:
    return ", ".join(str(row[key]) for key in KEYS if key in row)


def _change(key: str, a: dict | None, b: dict | None) -> Change:
    if a is None or b is None:
        return Change(key, None, None, "gone" if b is None else "new")
    ratio = b["seconds"] / a["seconds"]
    if a["low"] is None or b["low"] is None:
        raise UsageError(
            f"bench: rows must have intervals; got {key} of one process. Use --repeats 2 or more."
        )
    width = max(row["seconds"] / row["low"] for row in (a, b))
    beyond = abs(math.log(ratio)) > math.log(width)
    return Change(key, ratio, width, "same" if not beyond else "slower" if ratio > 1 else "faster")


def report(changes: list[Change]) -> str:
    lines = []
    for c in changes:
        said = "" if c.ratio is None else f"{c.ratio - 1:+.1%} (noise ±{c.width - 1:.1%})"
        lines.append(f"{c.verdict:<10} {said:<26} {c.key}")
    verdicts = ("same", "slower", "faster", "gone", "new")
    counts = {v: sum(c.verdict == v for c in changes) for v in verdicts}
    return "\n".join([*lines, ", ".join(f"{n} {v}" for v, n in counts.items() if n)])
