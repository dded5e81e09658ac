"""Runs a benchmark: each case in fresh processes, round after round, and puts its table together.

A module of a benchmark has cases(setting) -> [(case, dtype)], measure(case, dtype, setting), which
yields each Group as soon as it is measured, and, where a process of its own tells an
implementation's memory, alone(case, dtype, implementation, setting) -> (call, times that it is to
be run). adjusted(setting): what it measures instead. TOGETHER: its cases are so short that one
process measures all of a dtype.
"""

import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from bench import roofline
from bench.harness import record, timing
from bench.harness.breakdown import breakdown
from bench.harness.ceilings import ceilings
from bench.harness.models import Setting
from engine.errors import UsageError

MARK = "bench result: "  # libraries print too


def child(
    *arguments: str, until: float = math.inf, frugal: bool = False
) -> tuple[list, str | None]:
    """The results that `python -m bench` with these arguments printed, and why they are not all.
    until: the moment of time.monotonic() that it has. frugal: glibc gives back what is freed; left
    alone, it raises the size from which it does, and a training step seems to need 350 MiB more."""
    left = until - time.monotonic()
    if left <= 0:
        return [], "no time was left"
    paths = [str(record.ROOT), str(record.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if frugal else {}
    command = [sys.executable, "-W", "ignore", "-m", "bench", *arguments]
    timeout, why = left if math.isfinite(left) else None, None
    try:
        done = subprocess.run(command, capture_output=True, env=env, timeout=timeout)
        if done.returncode:
            last = (done.stderr.decode().strip().splitlines() or ["nothing"])[-1]
            why = f"the process ended with {done.returncode} and said: {last[:300]}"
    except subprocess.TimeoutExpired as error:
        done, why = error, f"the process ran past the time limit, after {left:.0f} s"
    lines = (done.stdout or b"").decode().splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)], why


def encoded(setting: Setting) -> str:
    return json.dumps(asdict(setting))


def decoded(text: str) -> Setting:
    """In a child; its device becomes the current one, on whose stream events are recorded."""
    fields = json.loads(text)
    setting = Setting(**fields | {"latent": tuple(fields["latent"])})
    if setting.cuda:
        torch.cuda.set_device(torch.device(setting.device).index or 0)
    return setting


def work(name: str, dtype: str, cases: str, setting: str) -> None:
    """In a child: prints each group when it is measured, and None after each case: what a child
    has measured outlives it."""
    module = import_module(f"bench.{name}")
    gc.freeze()  # what was imported: `groups.peak` collects before each call
    for case in json.loads(cases):
        for group in module.measure(case, dtype, decoded(setting)):
            print(MARK + json.dumps(asdict(group)), flush=True)
        print(MARK + json.dumps(None), flush=True)


def roof(dtype: str, setting: str) -> None:
    """In a child: measures the ceilings of a dtype and prints them."""
    print(MARK + json.dumps(ceilings(decoded(setting), getattr(torch, dtype))._asdict()))


def alone(name: str, case: str, dtype: str, implementation: str, setting: str) -> None:
    """In a child: runs one implementation and prints the bytes that the process took at most while
    it ran."""
    module = import_module(f"bench.{name}")
    call, times = module.alone(case, dtype, implementation, decoded(setting))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # what making it took does not count
    for _ in range(times):
        call()
    status = Path("/proc/self/status").read_text()  # rusage would give the parent's peak
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    print(f"{MARK}{1024 * kibibytes}")


def parts(dtype: str, setting: str) -> None:
    """In a child: where a forward's time goes."""
    print(MARK + json.dumps(breakdown(decoded(setting), dtype)))


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
            for field in ("errors", "peaks", "notes"):
                into[field] = into[field] | group[field]
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
        parts = [roofline.Part(*part) for part in group["parts"].get(name, [])]
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


class Children:
    """Children of one benchmark, and why those that failed are not in its table."""

    def __init__(self, name: str, setting: Setting, limit: float, say: Callable[[str], None]):
        self.name, self.text, self.say = name, encoded(setting), say
        self.until, self.failed = time.monotonic() + limit, {}

    def __call__(self, said: str, *arguments: str, **options) -> list:
        """The child's results, as far as it came. The setting is its last argument."""
        self.say(f"{self.name}: {said}")
        results, why = child(*arguments, self.text, until=self.until, **options)
        self.failed |= {} if why is None else {said: why}
        return results


def batches(cases: list[tuple[str, str]], together: bool) -> list[tuple[str, list[str]]]:
    """(dtype, cases) of each child."""
    if not together:
        return [(dtype, [case]) for case, dtype in cases]
    dtypes = dict.fromkeys(dtype for _, dtype in cases)
    return [(dtype, [case for case, d in cases if d == dtype]) for dtype in dtypes]


def run(
    name: str, setting: Setting, repeats: int, only=(), limit: float = math.inf, say=print
) -> dict:
    """The table of a benchmark. only: cases; none: all of them. limit: seconds in all; what they do
    not suffice for is in table["refused"]. say: what happens, line by line. Errors: UsageError."""
    module, begun = import_module(f"bench.{name}"), time.monotonic()
    setting = getattr(module, "adjusted", lambda s: s)(setting)
    cases = [(c, d) for c, d in module.cases(setting) if not only or c in only]
    known = dict.fromkeys(case for case, _ in module.cases(setting))
    if set(only) - set(known):
        raise UsageError(
            f"bench: --only must name some of {', '.join(known)}; got {', '.join(only)}. "
            "Correct the name."
        )
    table = {
        "schema": record.SCHEMA,
        "bench": name,
        "environment": record.machine(setting.device),
        "setting": asdict(setting) | {"repeats": repeats},
    }
    children, measured, roofs = Children(name, setting, limit, say), [], defaultdict(list)
    for number in range(repeats):
        which = f"process {number + 1} of {repeats}"
        for dtype in dict.fromkeys(dtype for _, dtype in cases):
            roofs[dtype] += children(f"ceilings, {dtype}, {which}", "roof", dtype)
        found = []
        for dtype, some in batches(cases, getattr(module, "TOGETHER", False)):
            while some:
                said = f"{', '.join(some)}, {dtype}, {which}"
                results = children(said, "work", name, dtype, json.dumps(some))
                found += filter(None, results)
                # Of the one that a process died of, what it had measured is all.
                some = some[results.count(None) + 1 :]
        measured.append(found)
    best = {
        dtype: roofline.Ceilings(**max(found, key=lambda roof: roof["flops"]))
        for dtype, found in roofs.items()
        if found
    }
    groups = merged(measured)
    table["ceilings"] = {dtype: roof._asdict() for dtype, roof in best.items()}
    table["rows"] = [row for group in groups.values() for row in rows(group, repeats, best)]
    if hasattr(module, "alone") and not setting.cuda:
        for row in table["rows"]:
            which = row["case"], row["dtype"], row["implementation"]
            said = f"memory of {', '.join(which)}"
            row["peak_bytes"] = next(iter(children(said, "alone", name, *which, frugal=True)), None)
    if name == "infer":
        table["breakdown"] = sum(children("breakdown of a forward", "parts", "bfloat16"), [])
    table["refused"] = children.failed | {
        f"{group['case']}, {group['dtype']}: {implementation}": why
        for group in groups.values()
        for implementation, why in group["refused"].items()
    }
    table["machine"] = [group["machine"] for groups in measured for group in groups]
    table["absent"] = record.absent()
    table["wall_seconds"] = round(time.monotonic() - begun, 1)
    return table
