"""Runs a benchmark: each case in fresh processes, round after round, and puts its table together.

A module of a benchmark has cases(setting) -> [(case, dtype)], measure(case, dtype, setting), which
yields each Group as soon as it is measured, and again with more in it, and, where a process of its
own tells an implementation's memory, alone(case, dtype, implementation, setting) -> (call, times
that it is to be run). adjusted(setting): what it measures instead. TOGETHER: its cases are so short
that one process measures all of a dtype. SILENCE: seconds without news after which its process is
killed; measure then takes `without`, names to leave out, and yields the name of an implementation
before it runs it: a case that dies is measured again without the one that was running.
"""

import gc
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from bench import roofline
from bench.harness import record, timing
from bench.harness.breakdown import breakdown
from bench.harness.ceilings import ceilings
from bench.harness.children import Children, tell
from bench.harness.models import Setting, bound
from engine.errors import UsageError
from univigu_kernels import explain

MODELS = "infer", "caption", "train", "scale"  # benchmarks that run the engine's own choice


def encoded(setting: Setting) -> str:
    return json.dumps(asdict(setting))


def decoded(text: str) -> Setting:
    """In a child; its device becomes the current one, on whose stream events are recorded."""
    fields = json.loads(text)
    setting = Setting(**fields | {"latent": tuple(fields["latent"])})
    if setting.cuda:
        torch.cuda.set_device(torch.device(setting.device).index or 0)
    return setting


def work(name: str, dtype: str, cases: str, without: str, setting: str) -> None:
    """In a child: tells each group when it is measured, and None after each case: what a child has
    measured outlives it."""
    module, less = import_module(f"bench.{name}"), json.loads(without)
    measure = partial(module.measure, without=less) if less else module.measure
    gc.freeze()  # what was imported: `groups.peak` collects before each call
    for case in json.loads(cases):
        for group in measure(case, dtype, decoded(setting)):
            tell(group if isinstance(group, str) else asdict(group))
        tell(None)


def roof(dtype: str, setting: str) -> None:
    """In a child: measures the ceilings of a dtype and tells them."""
    tell(ceilings(decoded(setting), getattr(torch, dtype))._asdict())


def kernels(name: str, dtype: str, setting: str) -> None:
    """In a child: binds the engine's kernels as the benchmark does and tells the table. On a GPU
    the trial that chooses them is remembered, so that it takes nothing of a case's time."""
    ops = bound(decoded(setting), getattr(torch, dtype), training=name == "train")
    tell(explain(ops).splitlines())


def alone(name: str, case: str, dtype: str, implementation: str, setting: str) -> None:
    """In a child: runs one implementation and tells the bytes that the process took at most while
    it ran."""
    module = import_module(f"bench.{name}")
    call, times = module.alone(case, dtype, implementation, decoded(setting))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # what making it took does not count
    for _ in range(times):
        call()
    status = Path("/proc/self/status").read_text()  # rusage would give the parent's peak
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    tell(1024 * kibibytes)


def parts(dtype: str, setting: str) -> None:
    """In a child: where a forward's time goes."""
    tell(breakdown(decoded(setting), dtype))


def key_of(group: dict) -> tuple:
    return group["case"], group["dtype"], *sorted(group["more"].items())


def merged(repeats: list[list[dict]]) -> dict[tuple, dict]:
    """Groups of the same key over the processes: times and errors of implementations that ran in
    all of them, the order as measured."""
    found: dict[tuple, dict] = {}
    for groups in repeats:
        for group in groups:
            into = found.setdefault(
                key_of(group), group | {"samples": defaultdict(list), "refused": {}}
            )
            for name, times in group["times"].items():
                into["samples"][name].append(times)
            into["refused"] |= group["refused"]
            for name in ("errors", "peaks", "notes"):
                into[name] = into[name] | group[name]
    return found


def rows(group: dict, processes: int, roofs: dict[str, roofline.Ceilings]) -> list[dict]:
    sound = group["samples"].keys() - group["refused"].keys()
    samples = {n: s for n, s in group["samples"].items() if n in sound and len(s) == processes}
    if not samples:
        return []

    base = next(iter(samples))
    times, speeds = timing.figures(samples), timing.speedups(samples, base)

    found = []
    for name in samples:
        parts = [roofline.Work(*part) for part in group["parts"].get(name, [])]
        roof_ = roofs.get(group["dtype"])
        found.append(
            {
                "case": group["case"],
                **group["more"],
                "dtype": group["dtype"],
                "implementation": name,
                "note": group["notes"].get(name),
                "seconds": times[name].value,
                "low": times[name].low,
                "high": times[name].high,
                "against": base,
                "speedup": speeds[name].value,
                "speedup_low": speeds[name].low,
                "speedup_high": speeds[name].high,
                "error": group["errors"].get(name),
                "bytes": group["bytes"],
                "flops": group["flops"] if parts else None,
                "predicted": roofline.predict(parts, roof_) if parts and roof_ else None,
                "peak_bytes": group["peaks"].get(name),
                "samples": samples[name],
            }
        )

    return found


def batches(cases: list[tuple[str, str]], together: bool) -> list[tuple[str, list[str]]]:
    """(dtype, cases) of each child."""
    if not together:
        return [(dtype, [case]) for case, dtype in cases]
    dtypes = dict.fromkeys(dtype for _, dtype in cases)
    return [(dtype, [case for case, d in cases if d == dtype]) for dtype in dtypes]


def chosen(name: str, setting: Setting, only) -> list[tuple[str, str]]:
    """(case, dtype) of all that is to be measured. Errors: UsageError for a case that is none."""
    known = import_module(f"bench.{name}").cases(setting)
    if unknown := set(only) - {case for case, _ in known}:
        raise UsageError(
            f"bench: --only must name some of {', '.join(dict.fromkeys(c for c, _ in known))}; "
            f"got {', '.join(sorted(unknown))}. Correct the name."
        )
    return [(case, dtype) for case, dtype in known if not only or case in only]


@dataclass
class Progress:
    """What was measured until now; `table` can be written at any moment.

    found: of each repeat, its groups by key.
    memory: bytes of an implementation in a process of its own, by case, dtype and name.
    """

    head: dict
    children: Children
    repeats: int
    begun: float = field(default_factory=time.monotonic)
    roofs: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    found: list[dict[tuple, dict]] = field(default_factory=list)
    memory: dict[tuple, int | None] = field(default_factory=dict)
    breakdown: list[dict] = field(default_factory=list)
    done: bool = False

    def rows(self) -> tuple[list[dict], dict[tuple, dict], dict[str, roofline.Ceilings]]:
        """Rows, groups and ceilings, of whole repeats; of the first one as far as it came."""
        best = {
            dtype: roofline.Ceilings(**max(found, key=lambda roof: roof["flops"]))
            for dtype, found in self.roofs.items()
            if found
        }
        whole = len(self.found) if self.done else max(1, len(self.found) - 1)
        groups = merged([list(found.values()) for found in self.found[:whole]])
        return [row for group in groups.values() for row in rows(group, whole, best)], groups, best

    def table(self, running: str | None = None) -> dict:
        """running: what has not ended yet, a line of the table's remarks."""
        found, groups, best = self.rows()
        for row in found:
            which = row["case"], row["dtype"], row["implementation"]
            row["peak_bytes"] = self.memory.get(which, row["peak_bytes"])

        unfinished = {} if running is None else {running: "had not ended when this was written"}
        refused = {
            f"{group['case']}, {group['dtype']}: {implementation}": why
            for group in groups.values()
            for implementation, why in group["refused"].items()
        }

        return self.head | {
            "ceilings": {dtype: roof._asdict() for dtype, roof in best.items()},
            "rows": found,
            **({"breakdown": self.breakdown} if self.head["bench"] == "infer" else {}),
            "refused": self.children.failed | refused | unfinished,
            "machine": [group["machine"] for one in self.found for group in one.values()],
            "absent": record.absent(),
            "wall_seconds": round(time.monotonic() - self.begun, 1),
        }


def measure_cases(
    name: str, dtype: str, cases: list[str], which: str, progress: Progress, save: Callable
) -> None:
    """The cases of one child, and of those that follow where it dies: the case that it died of
    keeps what was measured; where the implementation is known, it is measured again without it."""
    silence, without = getattr(import_module(f"bench.{name}"), "SILENCE", None), []
    while cases:
        said, failed = f"{', '.join(cases)}, {dtype}, {which}", progress.children.failed
        tried = len(failed)

        def heard(result, said=said) -> None:
            if isinstance(result, dict):
                progress.found[-1][key_of(result)] = result
                save(progress.table(said))

        arguments = name, dtype, json.dumps(cases), json.dumps(without)
        results = progress.children(
            said, "work", *arguments, silence=silence or math.inf, heard=heard
        )
        cases = cases[results.count(None) :]
        last = results[-1] if results else None
        if silence and len(failed) > tried and isinstance(last, str) and cases:
            failed[f"{cases[0]}, {dtype}: {last}"] = failed.pop(said)
            without.append(last)
        else:
            cases, without = cases[1:], []


def run(
    name: str,
    setting: Setting,
    repeats: int,
    only=(),
    limit: float = math.inf,
    say: Callable[[str], None] = print,
    save: Callable[[dict], None] = lambda table: None,
) -> dict:
    """The table of a benchmark. Errors: UsageError.

    only: cases; none: all of them.
    limit: seconds in all; what they do not suffice for is in table["refused"].
    say: called with what happens, line by line.
    save: called with the table so far whenever there is something new in it.
    """
    module = import_module(f"bench.{name}")
    setting = getattr(module, "adjusted", lambda s: s)(setting)
    cases = chosen(name, setting, only)
    head = {
        "schema": record.SCHEMA,
        "bench": name,
        "environment": record.machine(setting.device),
        "setting": asdict(setting) | {"repeats": repeats},
    }
    children = Children(name, encoded(setting), limit, say)
    progress = Progress(head, children, repeats)
    save(progress.table("all of it"))
    if setting.cuda and name in MODELS:
        for table in children("the choice of kernels", "kernels", name, "bfloat16"):
            head["environment"]["kernels"] = table
    for number in range(repeats):
        which = f"process {number + 1} of {repeats}"
        progress.found.append({})
        for dtype in dict.fromkeys(dtype for _, dtype in cases):
            progress.roofs[dtype] += children(f"ceilings, {dtype}, {which}", "roof", dtype)
        for dtype, some in batches(cases, getattr(module, "TOGETHER", False)):
            measure_cases(name, dtype, some, which, progress, save)
    progress.done = True

    if hasattr(module, "alone") and not setting.cuda:
        for row in progress.table()["rows"]:
            key = row["case"], row["dtype"], row["implementation"]
            said = f"memory of {', '.join(key)}"
            found = children(said, "alone", name, *key, frugal=True)
            progress.memory[key] = next(iter(found), None)
            save(progress.table(said))
    if name == "infer":
        progress.breakdown = sum(children("breakdown of a forward", "parts", "bfloat16"), [])
    return progress.table()
