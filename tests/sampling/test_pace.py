"""The host keeps to the pace of a device that works behind it, so that progress and cancel are
true. The device is a stand-in that is as late as one may be."""

import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from tiny_sampling import finish, make, model
from tqdm import tqdm

from engine.errors import Cancelled, NonFinite
from engine.result import Watch
from engine.run import Pace

STEPS = 6


class Place:
    """A mark behind the first `count` steps of a device."""

    def __init__(self, device: "LateDevice", count: int):
        self.device, self.count = device, count

    def synchronize(self) -> None:
        self.device.work_until(self.count)


class LateDevice:
    """A queue of steps, of which none runs before the host waits for it. To a run it is the
    `Graphs` that take its steps.

    after_step: called with the number of steps done, while the host waits.
    """

    def __init__(self, after_step=lambda done: None):
        self.after_step = after_step
        self.waiting: deque = deque()
        self.queued = self.done = self.most_waiting = 0

    def adopt(self, step):
        return step

    def run(self, step, kind) -> None:
        self.waiting.append((step, kind))
        self.queued += 1
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def mark(self) -> Place:
        return Place(self, self.queued)

    def work_until(self, count: int) -> None:
        while self.done < count:
            step, kind = self.waiting.popleft()
            step(kind)
            self.done += 1
            self.after_step(self.done)


def no_wait() -> SimpleNamespace:
    """A mark that nobody waits at: the host as it was without a pace."""
    return SimpleNamespace(synchronize=lambda: None)


def run_on(device: LateDevice, mark=None, net=None, mode="t2v"):
    run = make(net or model(torch.float32), mode, steps=STEPS, graphs=device)
    run.pace = Pace(mark or device.mark)
    return run


@pytest.mark.parametrize("mode", ["t2v", "t2vt", "v2t"])
def test_the_host_is_one_step_ahead_and_no_more(mode):
    """One step that the device works on, and one that waits."""
    device = LateDevice()
    run = run_on(device, mode=mode)
    for i in run.steps():
        assert device.queued == i + 1 and device.done == i
        assert run.done == (STEPS if i == STEPS - 1 else device.done)
    assert device.most_waiting == 2

    device.work_until(STEPS)
    alone = finish(make(model(torch.float32), mode, steps=STEPS))
    assert torch.equal(run.latents, alone.latents) and torch.equal(run.tokens, alone.tokens)


def test_without_the_wait_all_steps_are_queued_before_one_is_done():
    device = LateDevice()
    finish(run_on(device, no_wait))
    assert device.most_waiting == STEPS and device.done == 0


def follow(run, cancel: threading.Event) -> None:
    Watch(False, cancel=cancel).follow(SimpleNamespace(first=True), run)


@pytest.mark.parametrize("when", range(1, STEPS - 1))
def test_after_cancel_one_more_step_runs_at_most(when):
    """The Event is set by the end of the device's step `when`, while the host waits for it."""
    cancel = threading.Event()
    device = LateDevice(lambda done: cancel.set() if done == when else None)
    with pytest.raises(Cancelled, match=f"after step {when} of {STEPS}"):
        follow(run_on(device), cancel)
    assert device.done == when and device.queued == when + 1


def test_without_the_wait_cancel_would_come_after_all_steps():
    cancel = threading.Event()
    device = LateDevice(lambda done: cancel.set() if done == 1 else None)
    follow(run_on(device, no_wait), cancel)
    assert device.queued == STEPS
    device.work_until(STEPS)
    assert cancel.is_set() and device.done == STEPS


def test_a_cpu_waits_for_nothing():
    run = make(model(torch.float32), "t2v", steps=STEPS)
    assert run.pace is None
    for i in run.steps():
        assert run.done == i + 1


def test_what_is_not_finite_is_named_at_once_on_a_cpu_and_behind_a_device_at_the_end():
    net = model(torch.float32)
    with torch.no_grad():
        net.blocks[1].ffn.down.bias[0] = float("nan")

    seen = []
    for run in (make(net, "t2v", steps=STEPS), run_on(LateDevice(), net=net)):
        with pytest.raises(NonFinite, match="step 0, first in block 1"):
            for i in run.steps():
                seen.append(i)
    assert seen == list(range(STEPS - 1))


def test_the_bar_shows_what_the_device_has_done(monkeypatch):
    device, bars, shown = LateDevice(), [], []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)

    def note(pipe, step, time, tensors):
        shown.append((bars[0].n, device.done))

    monkeypatch.setattr("engine.result.tqdm", Bar)
    Watch(True, note).follow(SimpleNamespace(first=True), run_on(device))
    assert shown[:-1] == [(i, i) for i in range(STEPS - 1)]
    assert bars[0].n == STEPS  # the host reads what the last step found, and so waits for it
