"""Captured sampling steps on a GPU: replay equals eager bit for bit, and the pool is given back."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import engine
from engine import sample
from engine.graphs import Graphs
from engine.run import Run
from engine.schedule import schedule
from engine.weights.merge import Adapters

pytestmark = pytest.mark.gpu
SIZES = [(1, 8, 8), (3, 16, 24), (5, 30, 52)]
RUNS = [
    ("t2v", {}),
    ("t2vt", {"text_steps": 6}),
    ("v2t", {}),
    ("v2t", {"refresh_every": 3}),
    ("v2t", {"commit": "confidence"}),
]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def net(request):
    torch.manual_seed(0)
    cfg = replace(engine.ModelConfig.preset("tiny"), heads=4, head_dim=128, vocab=1000, layers=3)
    made = engine.UniViGU(cfg, "cuda", request.param)
    torch.nn.init.normal_(made.text_head.linear.weight, std=0.05)
    return made.eval()


def start(net, size, mode, graphs=None, seed=0, text_steps=None, **choices) -> Run:
    plan = schedule(mode, 4, 3.0, "unipc", "exact", text_steps=text_steps)
    latents = sample.video_noise((16, *size), [seed], "cuda")
    tokens = sample.text_source(net, 24, [seed])
    context = torch.zeros(2, 1, 512, net.cfg.text_dim, device="cuda")
    context[0, :, :20], context[1, :, :1] = 0.5, -0.5
    if mode == "v2t":
        context.zero_()
    request = sample.Request(plan, latents, tokens, *context, 4.0, None, [seed], **choices)
    return Run(net, request, graphs)


def finish(*given, **choices):
    run = start(*given, **choices)
    for _ in run.steps():
        pass
    return run.latents, run.tokens


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode,choices", RUNS)
def test_replay_equals_eager(net, size, mode, choices):
    graphs = Graphs()
    for seed in (0, 1, 0):
        eager = finish(net, size, mode, seed=seed, **choices)
        replayed = finish(net, size, mode, graphs, seed, **choices)
        assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
    assert len(graphs.steps) == 1


@pytest.mark.parametrize("captured", [False, True])
def test_the_host_is_one_step_ahead_and_no_more(net, captured):
    """The device sleeps between two steps, so that a host which did not wait would be far ahead."""
    run = start(net, SIZES[0], "t2v", Graphs() if captured else None)
    marks, mark = [], run.pace.mark
    run.pace.mark = lambda: marks.append(mark()) or marks[-1]
    for i in run.steps():
        assert len(marks) == i + 1 and all(m.query() for m in marks[:i])
        assert run.done == (4 if i == 3 else i)
        assert i in (0, 3) or not marks[i].query()  # the last is waited for
        torch.cuda._sleep(50_000_000)


def test_release_gives_the_pool_back(net):
    def reserved():
        """Without cuBLAS's workspaces, of which every stream has its own."""
        torch.cuda.synchronize()
        vars(torch._C)["_cuda_clearCublasWorkspaces"]()  # of builds with CUDA alone
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before, graphs = reserved(), Graphs()
    finish(net, SIZES[2], "t2v", graphs)
    assert torch.cuda.memory_reserved() > before and graphs.reports[0].seconds > 0
    assert graphs.release() == 0
    assert reserved() <= before + (32 << 20)


def test_a_captured_step_sees_an_adapter_that_was_loaded_later(net, tmp_path):
    graphs, adapters, size = Graphs(), Adapters(), SIZES[0]
    plain, _ = finish(net, size, "t2v", graphs)
    width = net.cfg.dim
    factors = {"lora_A": (4, width), "lora_B": (width, 4)}
    stems = [f"transformer.blocks.{i}.attn1.to_q" for i in range(net.cfg.layers)]
    tensors = {f"{s}.{n}.weight": 0.1 * torch.randn(f) for s in stems for n, f in factors.items()}
    save_file(tensors, tmp_path / "style.safetensors")

    adapters.load(net, tmp_path / "style.safetensors", "style", 1.0)
    changed, _ = finish(net, size, "t2v", graphs)
    assert len(graphs.steps) == 1 and not torch.equal(changed, plain)
    assert torch.equal(changed, finish(net, size, "t2v")[0])
    adapters.delete(net)
    assert torch.equal(finish(net, size, "t2v", graphs)[0], plain)
