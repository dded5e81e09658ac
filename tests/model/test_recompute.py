"""What the backward pass computes again, what the step keeps in memory, and that it compiles."""

from dataclasses import replace

import parallel_runs as runs
import pytest
import torch
from tiny_training import config, model
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from engine.config import MeshConfig
from engine.recompute import KEPT, POLICIES
from engine.train.dry_run import Allocations, Footprint, footprint, pretended, report
from engine.train.objective import Objective, draw
from engine.train.step import advance, backward, draws_of
from univigu_kernels import bind

ROWS = runs.make_batch((2, 4, 8), 8)


def gradients(policy: str, kernels: str) -> dict[str, torch.Tensor]:
    net = engine.UniViGU(model(layers=2).cfg, kernels=kernels)
    settings = config(recompute=policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.1)
    state = engine.TrainState.create(net, settings)
    losses = backward(state, ROWS, draws_of(state, ROWS))
    return {"losses": losses} | {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("kernels", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("policy", ["attention", "block"])
def test_gradients_are_bit_equal(policy, kernels):
    request = "attention=sdpa" if kernels == "sdpa" else kernels
    if kernels == "sdpa":
        request = "joint_attention=sdpa,cross_attention=sdpa"
    plain, found = gradients("none", request), gradients(policy, request)
    for name, expected in plain.items():
        assert torch.equal(found[name], expected), name


class Calls(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition(".")[0]
        self.count[name] = self.count.get(name, 0) + 1
        return op(*args, **(kwargs or {}))


def counted(policy: str, kernels: str) -> tuple[int, int]:
    """How often attention ran forward in a step of two layers, and the norm of q and k."""
    net = engine.UniViGU(model(layers=2).cfg, kernels=kernels)
    net.recompute = policy
    rows = draw(ROWS, config(), net, 0)
    with Calls() as calls:
        sum(Objective(net, config())(ROWS, rows)).backward()
    attention = sum(n for name, n in calls.count.items() if name in KEPT)
    return attention, calls.count["aten::mse_loss"]


@pytest.mark.parametrize("kernels", ["auto", "joint_attention=sdpa,cross_attention=sdpa"])
def test_attention_runs_once_where_it_is_kept(kernels):
    if kernels == "auto" and "cpu" not in str(bind("auto", "cpu", torch.float32)):
        pytest.skip("the compiled extension is not built")
    assert counted("none", kernels)[0] == counted("attention", kernels)[0] == 4
    assert counted("block", kernels)[0] == 8


def test_every_policy_is_a_setting():
    for policy in POLICIES:
        assert replace(config(), recompute=policy).recompute == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_forward_and_backward_compile_without_a_break(policy):
    net = model(layers=2)
    net.recompute = policy
    plain, rows = Objective(net, config()), draw(ROWS, config(), net, 0)
    expected = plain(ROWS, rows)
    sum(expected).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(plain, fullgraph=True, backend="aot_eager_decomp_partition")(ROWS, rows)
    sum(found).backward()
    torch.testing.assert_close(found, expected)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, before[name], atol=1e-6, rtol=1e-4, msg=name)


def test_nothing_in_a_step_waits_for_the_device():
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            assert op.name() not in ("aten::_local_scalar_dense", "aten::nonzero"), op
            return op(*args, **(kwargs or {}))

    state = engine.TrainState.create(model(), config(muon_lr=0.01, micro_batch_size=2))
    draws = draws_of(state, ROWS)  # on the host, before anything is on its way
    with torch.random.fork_rng(), NoReading():
        advance(state, ROWS, draws)


def test_allocations_are_counted_while_they_live():
    with Allocations() as memory:
        a = torch.zeros(1000)
        b = a + 1
        assert memory.live == 8000
        view = b[10:]
        del b
        assert memory.live == 8000
        del view
        assert memory.live == 4000 and memory.peak == 8000
        a.untyped_storage().resize_(0)
        assert memory.live == 0


def test_the_vocabulary_of_256k_never_becomes_logits():
    """256 tokens: their fp32 logits would be 262 MB, and twice that in the backward pass."""
    D, N, T = 8, 256_384, 256
    loss = bind("auto", "cpu", torch.float32).vocab_loss
    h, weight = torch.randn(1, T, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    bias, targets = torch.zeros(N, requires_grad=True), torch.randint(N, (1, T))
    with Allocations() as memory:
        loss(h, weight, bias, targets, -100).mean().backward()
    gradients = 4 * (N * D + N + T * D)
    assert memory.peak - gradients < 64e6


def sizes(cfg, policy: str, world=None, latents=(2, 4, 8)) -> Footprint:
    settings = config(recompute=policy, batch_size=4)
    return footprint(cfg, settings, torch.float32, latents, 8, 5, world)


def test_the_footprint_of_a_step_is_that_of_a_real_one():
    cfg = model(layers=2).cfg
    for policy in POLICIES:
        predicted = sizes(cfg, policy)
        with Allocations() as memory:
            state = engine.TrainState.create(engine.UniViGU(cfg), config(recompute=policy))
            engine.train_step(state, ROWS)
            resident = memory.peak = memory.live
            engine.train_step(state, ROWS)
        assert abs(predicted.state - resident) < 0.02 * resident
        assert abs(predicted.peak - memory.peak) < 0.05 * memory.peak


def test_recomputing_and_sharding_need_less():
    cfg, large = replace(engine.ModelConfig.preset("tiny"), layers=4, text_dim=8), (8, 16, 16)
    none, attention, block = (sizes(cfg, policy, latents=large) for policy in POLICIES)
    assert none.peak > 1.5 * attention.peak > 1.5 * block.peak and none.state == block.state
    with pretended(MeshConfig(), 4) as world:
        sharded = sizes(cfg, "none", world)
    assert sharded.state < 0.4 * none.state


def test_a_dry_run_says_what_each_policy_needs():
    text = report(
        model().cfg, config(), torch.bfloat16, ((16, 2, 4, 8), (8,), (5, 8)), MeshConfig(sp=2), 4
    )
    first, _, *rows = text.splitlines()
    assert first.startswith("Predicted, not measured: rank 0 of 4") and "sp 2" in first
    assert [row.split()[0] for row in rows] == list(POLICIES)
