"""Where one step of sampling spends its time and memory: `univigu profile`.

The step is the third of four, so kernels are compiled and captured and caches are filled. Latents
and prompts are random numbers: the time depends on a prompt's length alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity

from engine import sample, schedule
from engine.graphs import Graphs
from engine.model import UniViGU
from engine.planning import memory
from engine.run import Run

WARM, STEPS = 2, 4
LONGEST_NAME = 72
PROMPT_TOKENS = 40  # of the context's rows; captioning has none


class Kernel(NamedTuple):
    """One row of the table; milliseconds are its own, without what it calls."""

    name: str
    calls: int
    milliseconds: float
    share: float


@dataclass
class Profile:
    """device: "cuda" or "cpu". memory: [microseconds since the first event, bytes allocated]; on a
    CPU the bytes are those allocated since the step began."""

    device: str
    kernels: list[Kernel]
    memory: list[list[int]]

    def table(self, rows: int | None = None) -> str:
        """Markdown, the most expensive first."""
        unit = "ms on the device" if self.device == "cuda" else "ms on the CPU"
        lines = [f"| kernel | calls | {unit} | share |", "|---|---:|---:|---:|"]
        for k in self.kernels[:rows]:
            name = k.name.replace("|", "\\|")
            name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
            lines.append(f"| {name} | {k.calls} | {k.milliseconds:.3f} | {k.share:.1%} |")
        return "\n".join(lines)


def make_run(model: UniViGU, job: memory.Job, guidance: float, graphs: Graphs | None) -> Run:
    """A sampling run of STEPS steps on random numbers. A frozen video stays frozen for all of
    them."""
    cfg, device = model.cfg, model.vocab_embed.weight.device
    seeds = list(range(job.batch))
    plan = schedule.schedule(job.mode, STEPS, 3.0, "unipc", "exact")
    latents = sample.video_noise((memory.CHANNELS, *job.latent), seeds, device)
    tokens = sample.text_source(model, job.text_rows, seeds)

    # Rows after a prompt's last token are zeros, as the text encoder leaves them.
    tokens_of = {"v2t": (0, 0)}.get(job.mode, (PROMPT_TOKENS, 1))
    context, null = torch.zeros(2, job.batch, job.context_rows, cfg.text_dim, device=device)
    context[:, : tokens_of[0]].normal_()
    null[:, : tokens_of[1]].normal_()

    every = schedule.refresh_every(job.video_cache, STEPS)
    guided = job.guided and job.mode != "v2t"
    request = sample.Request(
        plan,
        latents,
        tokens,
        context,
        null if guided else None,
        guidance,
        seeds=seeds,
        refresh_every=every,
    )
    return Run(model, request, graphs)


def profile(
    model: UniViGU,
    job: memory.Job,
    folder: Path,
    guidance: float = 5.0,
    graphs: Graphs | None = None,
) -> Profile:
    """Profiles one step of `job` and writes trace.json (for chrome://tracing or Perfetto),
    kernels.md and memory.json into `folder`. Errors: UsageError, NonFinite, OutOfMemory."""
    device = model.vocab_embed.weight.device
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    with memory.explain_oom(memory.DENOISING, lambda: {"cfg": model.cfg} | vars(job)):
        steps = make_run(model, job, guidance, graphs).steps()
        for _ in range(WARM):
            next(steps)
        _wait(device)
        with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
            next(steps)
            _wait(device)

    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    timeline = memory_timeline(json.loads(trace.read_text()), cuda)
    found = Profile(device.type, kernels(recorded.key_averages(), cuda), timeline)
    (folder / "kernels.md").write_text(found.table() + "\n")

    record = {"device": device.type, "columns": ["microseconds", "bytes"], "allocated": timeline}
    if cuda:
        record["segments"] = torch.cuda.memory_snapshot()
    (folder / "memory.json").write_text(json.dumps(record) + "\n")
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(averages, cuda: bool) -> list[Kernel]:
    """torch.profiler's averages as rows: kernels of the device, or operations on a CPU."""
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    rows = [
        (
            event.key,
            event.count,
            event.self_device_time_total if cuda else event.self_cpu_time_total,
        )
        for event in averages
        if event.device_type == kind and not event.is_user_annotation
    ]
    total = sum(time for _, _, time in rows) or 1
    rows.sort(key=lambda row: -row[2])
    return [Kernel(name, count, time / 1e3, time / total) for name, count, time in rows if time]


def memory_timeline(trace: dict, cuda: bool) -> list[list[int]]:
    """The allocator's events of a chrome trace: [microseconds since the first, bytes allocated]."""
    events = [
        (event["ts"], event["args"]["Total Allocated"])
        for event in trace["traceEvents"]
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == int(cuda)
    ]
    events.sort(key=lambda event: event[0])
    return [[round(time - events[0][0]), allocated] for time, allocated in events]
