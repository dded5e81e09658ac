"""Sampling on several ranks makes what one process makes, and the same on each, bit for bit."""

import threading
from dataclasses import replace
from functools import cache

import pytest
import torch
from parallel_runs import start_world
from safetensors.torch import load_file, save_file
from tiny_sampling import model

from engine import cli, sample
from engine.config import EMBEDDED, MeshConfig
from engine.errors import Cancelled, NonFinite, UsageError
from engine.parallel import Ranks, World
from engine.pipeline import Pipeline
from engine.run import Run
from engine.schedule import schedule

LAYOUTS = {  # processes: {name: (sp, cfg)}; two heads, so that sp 4 exchanges and gathers
    2: {"sp 2": (2, 1), "cfg 2": (1, 2)},
    4: {"sp 4": (4, 1), "cfg 2 x sp 2": (2, 2)},
}
LENGTHS, BLIND = {"text_lengths": [3, 6, 5]}, {"video_sees_text": False}
CASES = {  # name: (mode, model, choices)
    "t2v": ("t2v", {}, {}),
    "t2v, texts of different lengths": ("t2v", {}, LENGTHS),
    "t2v, no text rows": ("t2v", {}, {"rows": 0}),
    "t2v, no guidance": ("t2v", {}, {"guidance": 1.0}),
    "t2v, blind video": ("t2v", BLIND, LENGTHS),
    "t2vt": ("t2vt", {}, {"temperature": 0.7}),
    "t2vt, more steps of text": ("t2vt", {}, {"text_steps": 7}),
    "t2vt, noised again": ("t2vt", {}, {"solver": "lcm", "guidance": 1.0, "text_steps": 7}),
    "t2v, guided and noised again": ("t2v", {}, {"solver": "lcm"}),
    "t2vt, last argmax": ("t2vt", {}, {"sampler": "legacy"}),
    "t2vt, vectors": ("t2vt", {"text_flow": "embedding"}, {}),
    "t2vt, heads that no group divides": ("t2vt", {"heads": 3}, {"grid": (2, 4, 4)}),
    "t2vt, fewer text rows than ranks": ("t2vt", {}, {"rows": 1}),
    "v2t": ("v2t", {}, {"temperature": 0.7}),
    "v2t, blind video": ("v2t", BLIND, {}),
    "v2t, by confidence": ("v2t", {"mask_source": True}, {"commit": "confidence"}),
    "v2t, fewer text rows than ranks": ("v2t", {}, {"rows": 1}),
}


def make(
    net,
    mode,
    ranks=None,
    rows=7,
    grid=(3, 6, 10),
    guidance=3.0,
    sampler="exact",
    text_steps=None,
    solver="unipc",
    **choices,
) -> Run:
    """A run whose latents, on ranks but the first, are wrong: those of rank 0 count."""
    plan = schedule(mode, 4, 3.0, solver, sampler, text_steps)
    seeds = [5, 11, 2]

    g = torch.Generator().manual_seed(9)
    context, null = (torch.randn(3, 5, 8, generator=g) for _ in range(2))
    if mode == "v2t":
        context, guidance = torch.zeros_like(context), 1.0
    latents = sample.video_noise((16, *grid), seeds, "cpu")
    latents += 0 if ranks is None else ranks.world.rank

    request = sample.Request(
        plan,
        latents,
        sample.text_source(net, rows, seeds),
        context,
        null if guidance > 1 else None,
        guidance,
        seeds=seeds,
        **choices,
    )
    return Run(net, request, ranks=ranks)


def finish(case: str, ranks_of=lambda net: None) -> dict[str, torch.Tensor]:
    mode, changes, choices = CASES[case]
    net = model(torch.float32, "auto", **changes)
    run = make(net, mode, ranks_of(net), **choices)
    for _ in run.steps():
        pass
    return {f"{case}/latents": run.latents, f"{case}/tokens": run.tokens}


alone = cache(finish)


def block_named(ranks_of) -> int:
    """What the error says, where one rank alone has a text row, which spoils block 0."""
    net = model(torch.float32, "auto")
    with torch.no_grad():
        net.blocks[0].ffn_t.down.bias[0] = float("inf")
    with pytest.raises(NonFinite, match="step 0, first in block") as error:
        list(make(net, "v2t", ranks_of(net), rows=1).steps())
    return int(str(error.value).partition("block ")[2][0])


def cancelled_by_the_last(world: World) -> None:
    """The last rank alone knows that the call was cancelled, from the first text on. Were it to
    end there, the others would wait for its first step."""
    pipe = Pipeline.from_pretrained(EMBEDDED, world=world)
    cancel = threading.Event()
    if world.rank == world.size - 1:
        cancel.set()
    with pytest.raises(Cancelled, match="after step 0 of 2"):
        pipe.generate("a red circle", num_inference_steps=2, cancel=cancel, progress=False)


def rank_program(size: int, folder) -> None:
    """What this rank found, in all layouts of as many processes."""
    world, found = World.start(MeshConfig(1, 1, size), "cpu", timeout=60), {}
    for layout, (sp, cfg) in LAYOUTS[size].items():
        arranged = replace(world, config=MeshConfig(1, 1, sp, cfg))
        ranks = {heads: Ranks(arranged, model(heads=heads)) for heads in (2, 3)}

        def ranks_of(net, ranks=ranks):
            return ranks[net.cfg.heads]

        for case in CASES:
            found |= {f"{layout}/{name}": x for name, x in finish(case, ranks_of).items()}
        found[f"{layout}/bad block"] = torch.tensor(block_named(ranks_of))
        found[f"{layout}/any"] = torch.tensor(
            [make(model(), "v2t", ranks[2]).step.share.any(r == world.rank) for r in (-1, size - 1)]
        )
        if sp > 1:
            with pytest.raises(UsageError, match="refresh_every must be 1 where several ranks"):
                make(model(), "v2t", ranks[2], refresh_every=2)
    if size == 2:
        cancelled_by_the_last(arranged)
    replicas = replace(world, config=MeshConfig(size, 1))
    with pytest.raises(UsageError, match=f"dp_shard must be 1.*got {size} shares"):
        Ranks(replicas, model())
    save_file(found, folder / f"{world.rank}.safetensors")
    world.stop()


@pytest.fixture(scope="module", params=LAYOUTS)
def world(request, tmp_path_factory):
    """What each rank found."""
    folder, size = tmp_path_factory.mktemp("world"), request.param
    processes = start_world(size, rank_program, size, folder)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    return [load_file(folder / f"{rank}.safetensors") for rank in range(size)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_make_what_one_makes(world, case):
    for layout in LAYOUTS[len(world)]:
        for name, truth in alone(case).items():
            found = world[0][f"{layout}/{name}"]
            if truth.is_floating_point():
                assert (found - truth).abs().max() <= 1e-5 * truth.abs().max(), (layout, name)
            else:
                assert torch.equal(found, truth), (layout, name)


def test_all_ranks_are_equal_to_the_bit(world):
    for other in world[1:]:
        assert other.keys() == world[0].keys()
        for name, value in world[0].items():
            assert torch.equal(other[name], value), name


def test_what_stops_one_rank_stops_all_and_is_named_alike(world):
    for layout in LAYOUTS[len(world)]:
        assert world[0][f"{layout}/bad block"] == 0
        assert world[0][f"{layout}/any"].tolist() == [False, True]


@pytest.mark.parametrize(
    "flags,words",
    [
        ("generate --prompt x --sp 2", "torchrun --nproc-per-node 2 -m engine"),
        ("generate --prompt x --sp 2 --cfg-parallel", "torchrun --nproc-per-node 4 -m engine"),
        ("generate --prompt x --sp 0", "--sp must be at least 1"),
        ("generate --prompt x --sp 2 --estimate", "--estimate must be for one process; got 2"),
        ("caption --video {clip} --sp 2", "torchrun --nproc-per-node 2 -m engine"),
    ],
)
def test_one_process_says_how_to_start_more(flags, words, tmp_path, capsys):
    (tmp_path / "clip.mp4").touch()
    assert cli.main(flags.format(clip=tmp_path / "clip.mp4").split()) == 2
    assert words in capsys.readouterr().err


def test_a_kept_video_needs_whole_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun sets it")
    (tmp_path / "clip.mp4").touch()
    flags = f"caption --video {tmp_path / 'clip.mp4'} --sp 2 --video-cache frozen"
    assert cli.main(flags.split()) == 2
    assert "--video-cache must be exact with --sp; got frozen" in capsys.readouterr().err
