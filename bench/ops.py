"""Every operation at a real model's shapes: each backend that runs here against its peers, in one
process, interleaved, medians, with the share of the device's measured roofline.

    python bench/ops.py --output bench/results/h100      writes h100.json and h100.md
    python bench/ops.py --output /tmp/smoke --small      the same on small shapes, on any device

An implementation is timed only after its outputs agree with the reference's in fp32 on the same
inputs. Losses are printed like wins.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import SMALL, arguments
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from univigu_kernels import OPS
from univigu_kernels.cross_attention import attend_sdpa

ROUNDS, BUDGET = 30, 4.0  # rounds of all implementations, seconds spent on one op and pass at most
AGREEMENT = 2e-2  # relative L2 error in bf16 against the fp32 reference
BACKWARD_FLOPS = {"joint_attention": 2.5, "cross_attention": 2.5}  # of the forward's; others 2


class Clock:
    """Seconds of one call: device events on a GPU, the monotonic clock elsewhere. The L2 cache is
    overwritten before each call."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(96 << 20, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, call: Callable) -> float:
        if not self.cuda:
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def interleaved(
    calls: dict[str, Callable], clock: Clock, rounds: int = ROUNDS, budget: float = BUDGET
) -> dict[str, list[float]]:
    """Times of every call, round by round, after two warm-up rounds."""
    for call in calls.values():
        clock(call)
        clock(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begun > budget:
            break
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return low, middle, high


def ceilings(device: str, clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """Measured here: bytes per second of a large copy (read plus written), FLOP per second of a
    large square GEMM on normal data."""
    small = device == "cpu"
    source = torch.randn((1 << 22) if small else (1 << 29), device=device)
    target, n = torch.empty_like(source), 512 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    times = {name: statistics.median(t) for name, t in interleaved(calls, clock).items()}
    return {"bytes": 2 * source.nbytes / times["copy"], "flops": 2 * n**3 / times["gemm"]}


def peers(op: str) -> dict[str, Callable]:
    """Other people's implementations of the same call, beside the registry's backends."""
    found = {"torch.compile": torch.compile(OPS[op].reference, dynamic=False)}
    if op not in ("joint_attention", "cross_attention"):
        return found
    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def pinned(kind):
        def call(q, k, v, *_):
            with sdpa_kernel(kind):
                return attend_sdpa(q, k, v)

        return call

    return {f"sdpa[{name}]": pinned(kind) for name, kind in kinds.items()}


def floats(tree) -> list[torch.Tensor]:
    leaves = tree_flatten(tree)[0]
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def widened(tree):
    """bf16 and fp16 tensors and dtypes as fp32."""
    low = (torch.bfloat16, torch.float16)

    def widen(x):
        if isinstance(x, torch.dtype):
            return torch.float32 if x in low else x
        return x.float() if isinstance(x, torch.Tensor) and x.dtype in low else x

    return tree_map(widen, tree)


def disagreement(op: str, result, truth) -> float:
    """The largest relative L2 error over the outputs; for tokens, the share that differ."""
    if op == "vocab_sample":
        return (result[0] != truth[0]).float().mean().item()
    pairs = zip(floats(result), floats(truth), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def with_gradients(call: Callable, inputs) -> Callable:
    """A call that runs the backward pass alone, over a graph that is kept."""
    leaves, spec = tree_flatten(inputs)
    low = (torch.bfloat16, torch.float16, torch.float32)
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.dtype in low else x
        for x in leaves
    ]
    args, kwargs = tree_unflatten(leaves, spec)
    outputs = [t for t in floats(call(*args, **kwargs)) if t.requires_grad]
    cotangents = [torch.randn_like(t) for t in outputs]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(
        outputs, wanted, cotangents, retain_graph=True, allow_unused=True
    )


def attempt(name: str, failed: dict[str, str], make: Callable):
    """make(), or None with the reason noted: a peer that cannot run is a line of the report."""
    try:
        return make()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return None


def reference_errors(op: str, candidates: dict[str, Callable], inputs, failed) -> dict[str, float]:
    args, kwargs = widened(inputs)
    reference = attempt("fp32 reference", failed, lambda: OPS[op].reference(*args, **kwargs))
    errors = {}
    for name, call in candidates.items():
        result = attempt(name, failed, lambda call=call: call(*inputs[0], **inputs[1]))
        if result is not None:
            truth = reference if reference is not None else attend_sdpa(*widened(inputs)[0][:3])
            errors[name] = disagreement(op, result, truth)
    return errors


def bench(op: str, case: dict, device: str, dtype: torch.dtype, clock: Clock, roof: dict) -> dict:
    spec, inputs, failed = OPS[op], arguments(op, case, device, dtype), {}
    chosen = [b for b in spec.backends if b.supports(torch.device(device), dtype) is None]
    candidates = {b.name: b.call for b in chosen} | peers(op)
    with torch.no_grad():
        errors = reference_errors(op, candidates, inputs, failed)
        for name, error in errors.items():
            if not error <= AGREEMENT:
                failed[name] = f"differs by {error:.2e} from the fp32 reference"
        calls = {n: c for n, c in candidates.items() if n not in failed and n in errors}
        forward = interleaved(
            {n: lambda c=c: c(*inputs[0], **inputs[1]) for n, c in calls.items()}, clock
        )
    passes = {"forward": (forward, spec.flops(case), spec.bytes(case))}
    if spec.differentiable:
        made = {
            name: attempt(f"{name} backward", failed, lambda c=call: with_gradients(c, inputs))
            for name, call in calls.items()
        }
        backward = interleaved({n: c for n, c in made.items() if c is not None}, clock)
        factor = BACKWARD_FLOPS.get(op, 2)
        passes["backward"] = (backward, factor * spec.flops(case), 2 * spec.bytes(case))
    rows = []
    for which, (times, flops, size) in passes.items():
        floor = max(flops / roof["flops"], size / roof["bytes"])
        for name, seconds in times.items():
            low, median, high = quartiles(seconds)
            rows.append(
                {
                    "op": op, "pass": which, "implementation": name, "us": 1e6 * median,
                    "quartiles_us": [1e6 * low, 1e6 * high], "rounds": len(seconds),
                    "GB/s": size / median / 1e9, "TFLOP/s": flops / median / 1e12,
                    "share_of_roofline": floor / median, "error": errors[name],
                }
            )  # fmt: skip
    return {"rows": rows, "failed": failed}


def environment(device: str) -> dict:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
    }
    if device == "cuda":
        fields = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw"
        query = ["nvidia-smi", fields, "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        found["triton"] = __import__("triton").__version__
    return found


def markdown(table: dict) -> str:
    env, roof = table["environment"], table["ceilings"]
    lines = [
        f"# Operations on {env['device']}, {table['case']}",
        "",
        f"torch {env['torch']}, commit {env['commit'][:12]}, {table['dtype']}; measured ceilings: "
        f"copy {roof['bytes'] / 1e12:.2f} TB/s, GEMM {roof['flops'] / 1e12:.1f} TFLOP/s.",
        "",
        "| op | pass | implementation | us (quartiles) | GB/s | TFLOP/s | share of roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in table["rows"]:
        low, high = r["quartiles_us"]
        cells = [r["op"], r["pass"], r["implementation"], f"{r['us']:.0f} ({low:.0f}-{high:.0f})"]
        cells += [f"{r['GB/s']:.0f}", f"{r['TFLOP/s']:.1f}", f"{r['share_of_roofline']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] + [f"- not timed: {name}: {why}" for name, why in table["failed"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="without its suffix")
    parser.add_argument("--ops", nargs="*", default=list(OPS))
    parser.add_argument("--case", default="wan2.1-1.3b/480x832x81")
    parser.add_argument("--small", action="store_true", help="small shapes: checks the script")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, clock = torch.bfloat16 if device == "cuda" else torch.float32, Clock(device)
    roof = ceilings(device, clock, dtype)
    table = {
        "schema": 1, "environment": environment(device), "ceilings": roof, "dtype": str(dtype),
        "case": "small" if chosen.small else chosen.case, "rows": [], "failed": {},
    }  # fmt: skip
    for op in chosen.ops:
        case = SMALL if chosen.small else OPS[op].cases[chosen.case]
        found = bench(op, case, device, dtype, clock, roof)
        table["rows"] += found["rows"]
        table["failed"] |= {f"{op} {name}": why for name, why in found["failed"].items()}
        print(f"{op}: {len(found['rows'])} rows, not timed: {found['failed']}", file=sys.stderr)
    chosen.output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    chosen.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
