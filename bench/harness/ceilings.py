"""What this device can do, measured: bytes per second of a large copy, FLOP per second of a large
product, exponentials per second. Normal data: a GPU's products are slower on it than on zeros."""

import statistics

import torch

from bench.harness.models import Setting
from bench.harness.record import machine
from bench.harness.timing import Clock, interleaved
from bench.roofline import Ceilings

SIZES = {"cpu": (1 << 25, 2048), "cuda": (1 << 29, 8192), "quick": (1 << 16, 64)}
EXPONENTIALS, TIMES = 1 << 16, 10  # numbers a thread, which its cache holds; calls of a round


def ceilings(s: Setting, dtype: torch.dtype) -> Ceilings:
    """bytes: read plus written. flops: the better layout of two, the best round, for a ceiling is
    not to be passed. exps: torch's in fp32, on a CPU, where they are not made beside the products;
    ours may pass it."""
    count, side = SIZES["quick" if s.preset == "quick" else "cuda" if s.cuda else "cpu"]
    source = torch.randn(count, device=s.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=s.device, dtype=dtype) for _ in range(2))
    few = torch.randn(torch.get_num_threads() * EXPONENTIALS, device=s.device)
    out = torch.empty_like(few)

    def exponentials():
        for _ in range(TIMES):
            torch.exp(few, out=out)

    calls = {
        "copy": lambda: target.copy_(source),
        "nn": lambda: a @ b,
        "nt": lambda: a @ b.T,
        "exp": exponentials,
    }
    times = interleaved(calls, Clock(s.device), rounds=40, budget=10)
    return Ceilings(
        machine(s.device)["device"],
        flops=2 * side**3 / min(times["nn"] + times["nt"]),
        bytes=2 * source.nbytes / statistics.median(times["copy"]),
        exps=None if s.cuda else TIMES * few.numel() / min(times["exp"]),
    )
