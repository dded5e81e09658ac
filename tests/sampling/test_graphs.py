"""What captured steps share and when they are captured again. Capture itself needs a GPU: here a
step is 'replayed' by running it, which shows that all it needs is in its static tensors."""

from types import FunctionType, ModuleType

import pytest
import torch
from tiny_sampling import finish, make, model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine import sample
from engine.graphs import Graphs
from engine.model import _rotary, forget_rotary


class Counted(Graphs):
    """Counts captures, and keeps what was handed to them."""

    def __init__(self, **options):
        super().__init__(capture=self.count, **options)
        self.captures = []

    def count(self, function, state, pool):
        self.captures.append(state)
        return function


def test_a_second_run_uses_the_first_ones_tensors_and_capture():
    net, graphs = model(torch.float32, "auto"), Counted()
    first = finish(make(net, "t2vt", graphs=graphs))
    kept = first.latents, first.tokens
    captures = len(graphs.captures)
    other = make(net, "t2vt", graphs=graphs, seed=5)
    assert other.step is first.step and not torch.equal(other.latents, kept[0])
    finish(other)
    again = finish(make(net, "t2vt", graphs=graphs))
    assert len(graphs.captures) == captures == 1
    assert torch.equal(again.latents, kept[0]) and torch.equal(again.tokens, kept[1])


@pytest.mark.parametrize(
    "mode,choices",
    [
        ("t2v", {"lengths": [4, 4]}),
        ("t2vt", {"text_steps": 6}),
        ("v2t", {"refresh_every": 2}),
        ("v2t", {"commit": "confidence"}),
        ("t2vt", {"guidance": 1.0}),
    ],
)
def test_replay_equals_eager(mode, choices):
    net, graphs = model(torch.float32, "auto"), Counted()
    eager = finish(make(net, mode, **choices))
    for _ in range(2):
        replayed = finish(make(net, mode, graphs=graphs, **choices))
        assert torch.equal(eager.latents, replayed.latents)
        assert torch.equal(eager.tokens, replayed.tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"B": 1},
        {"guidance": 4.0},
        {"steps": 5},
        {"temperature": 0.5},
        {"lengths": [3, 3]},
        {"commit": "confidence"},
    ],
)
def test_another_shape_or_setting_is_captured_anew(change):
    net, graphs = model(torch.float32, "auto"), Counted()
    finish(make(net, "t2vt", graphs=graphs))
    before = len(graphs.captures)
    finish(make(net, "t2vt", graphs=graphs, **change))
    assert len(graphs.captures) == before + 1


def test_the_key_is_built_once_a_run(monkeypatch):
    """80 shapes and a hash for each evaluation would cost a tenth of a cached step."""
    net, graphs, built = model(torch.float32, "auto"), Counted(), []
    key = sample.Step.key
    monkeypatch.setattr(sample.Step, "key", lambda step: built.append(1) or key(step))
    for _ in range(2):
        finish(make(net, "v2t", graphs=graphs, steps=6))
    assert len(built) == 2


class Reads(TorchDispatchMode):
    """Storages that operations read and no operation within made."""

    def __init__(self):
        super().__init__()
        self.made, self.foreign = {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        fresh = op is torch.ops.aten.lift_fresh.default  # a constant of the source, made here
        for x in [] if fresh else tensors_in((args, kwargs)):
            if x.untyped_storage()._cdata not in self.made:
                self.foreign[x.untyped_storage()._cdata] = (str(op), x)
        found = op(*args, **(kwargs or {}))
        for x in tensors_in(found):  # kept, so that no later storage takes the place of one
            self.made[x.untyped_storage()._cdata] = x
        return found


def tensors_in(tree) -> list[torch.Tensor]:
    return [x for x in tree_iter(tree) if isinstance(x, torch.Tensor)]


def held_by(thing, seen: set[int]) -> set[int]:
    """Storages of the tensors that can be reached through attributes and containers."""
    if id(thing) in seen or isinstance(thing, str | type | ModuleType | FunctionType):
        return set()
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return {thing.untyped_storage()._cdata}
    inside = list(thing.values()) if isinstance(thing, dict) else []
    inside += list(thing) if isinstance(thing, list | tuple | set) else []
    inside += list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    return set().union(*(held_by(part, seen) for part in inside))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("mode,choices", [("t2v", {}), ("t2vt", {}), ("v2t", {"refresh_every": 2})])
def test_what_a_captured_step_reads_is_held_by_the_step_or_the_model(mode, choices, kernels):
    """A graph reads tensors where they lay when it was captured. What a cache alone keeps may be
    freed and its memory given to others: replays would go on and be silently wrong."""
    run = make(model(torch.float32, kernels), mode, **choices)
    for kind in dict.fromkeys(run.kinds):
        run.step(kind)  # caches are warm when a step is captured
        with Reads() as reads:
            run.step(kind)
        held = held_by(run.step, set())
        lost = {op for place, (op, _) in reads.foreign.items() if place not in held}
        assert reads.foreign and not lost


def test_a_step_computes_no_tables():
    """They are the Step's from its construction on: none is made while a step is captured."""
    run = make(model(torch.float32), "v2t", refresh_every=2)
    forget_rotary()
    before = _rotary.cache_info().misses
    finish(run)
    assert _rotary.cache_info().misses == before


def test_texts_of_different_lengths_run_eagerly():
    graphs = Counted()
    finish(make(model(torch.float32, "auto"), "t2v", graphs=graphs, lengths=[2, 3]))
    assert not graphs.captures and not graphs.steps


def test_kinds_of_one_run_are_captured_one_by_one():
    graphs = Counted()
    finish(make(model(torch.float32, "auto"), "v2t", graphs=graphs, steps=5, refresh_every=2))
    assert [report.kind.cached for report in graphs.reports] == [False, True]


def test_another_model_is_captured_anew():
    graphs = Counted()
    nets = [model(torch.float32, "auto") for _ in range(2)]
    for net in nets:
        finish(make(net, "v2t", graphs=graphs))
    assert len(graphs.captures) == 2


def test_a_model_made_blind_is_captured_anew():
    graphs, net = Counted(), model(torch.float32, "auto")
    seeing = finish(make(net, "t2v", graphs=graphs)).latents
    net.hide_text_from_video()
    blind = finish(make(net, "t2v", graphs=graphs)).latents
    assert len(graphs.captures) == 2 and not torch.equal(seeing, blind)


def test_an_adopted_cache_is_not_allocated_twice(monkeypatch):
    graphs, net, made = Counted(), model(torch.float32, "auto"), []
    allocate = sample.Step.new_caches
    monkeypatch.setattr(sample.Step, "new_caches", lambda s: made.append(1) or allocate(s))
    for _ in range(3):
        finish(make(net, "v2t", graphs=graphs, refresh_every=2))
    assert len(made) == 1


def test_the_least_recently_used_goes_first():
    net, graphs = model(torch.float32, "auto"), Counted(limit=2)
    for steps in (2, 3, 2, 4):
        finish(make(net, "v2t", graphs=graphs, steps=steps))
    assert len(graphs.steps) == len(graphs.replays) == 2
    assert len(graphs.captures) == 3
    finish(make(net, "v2t", graphs=graphs, steps=2))
    assert len(graphs.captures) == 3, "2 steps was used after 3, which went"


def test_released_steps_do_not_run_and_new_ones_are_captured():
    net, graphs = model(torch.float32, "auto"), Counted()
    run = make(net, "v2t", graphs=graphs)
    graphs.release()
    with pytest.raises(ValueError, match="graphs: step must be one that adopt returned"):
        finish(run)
    finish(make(net, "v2t", graphs=graphs))
    assert len(graphs.captures) == 1 and len(graphs.reports) == 1


def test_a_capture_may_run_the_step_for_it_is_told_what_to_put_back():
    """`graphs.capture` runs a step once before it captures, and restores these tensors."""
    net = model(torch.float32, "auto")

    def warm(function, state, pool):
        before = [t.clone() for t in state]
        function()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        return function

    for choices in ({}, {"commit": "confidence"}, {"refresh_every": 2}):
        eager = finish(make(net, "v2t", **choices))
        replayed = finish(make(net, "v2t", graphs=Graphs(capture=warm), **choices))
        assert torch.equal(eager.tokens, replayed.tokens)


def test_a_run_that_failed_once_does_not_fail_the_next():
    net, graphs = model(torch.float32, "auto"), Counted()
    bias = net.blocks[1].ffn.down.bias
    run = make(net, "t2v", graphs=graphs)
    with torch.no_grad():
        bias[0] = torch.nan
    with pytest.raises(ArithmeticError, match="step 0, first in block 1"):
        finish(run)
    with torch.no_grad():
        bias[0] = 0
    assert finish(make(net, "t2v", graphs=graphs)).latents.isfinite().all()
