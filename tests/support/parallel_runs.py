"""Layouts of processes that must compute what one process does, and the program of their ranks."""

import os
import socket
import sys
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import config, lively

from engine.config import MeshConfig
from engine.parallel import World
from engine.train import TrainState, train_step
from engine.train.step import backward, collect, draws_of
from engine.weights import save_pretrained

LAYOUTS = {  # processes: {name: (dp_replicate, dp_shard, sp)}
    2: {"fsdp": (1, 2, 1), "replicas": (2, 1, 1), "sequence": (1, 1, 2)},
    4: {
        "fsdp": (1, 4, 1),
        "hybrid": (2, 2, 1),
        "fsdp x sequence": (1, 2, 2),
        "sequence": (1, 1, 4),
    },
}
SIZES = {"latents": (2, 4, 4), "rows": 7}
DISTILL = {"stage": "distill", "student_steps": (2,), "teacher_steps": 4}
CASES = {  # name: (size, model, training); two heads, so that four ranks exchange and gather
    "even": ({"latents": (2, 4, 8), "rows": 8}, {}, {}),
    "uneven": ({"latents": (3, 6, 10), "rows": 7}, {}, {}),
    "fewer text rows than ranks": ({"latents": (2, 4, 4), "rows": 1}, {}, {}),
    "heads that no group divides": (SIZES, {"heads": 3}, {}),
    "blind video": (SIZES, {"video_sees_text": False}, {"recompute": "block"}),
    "embedding": (SIZES, {"text_flow": "embedding"}, {"stage": "recall"}),
    "kl": (SIZES, {"mask_source": True}, {"text_loss": "kl"}),
    "micro-batches": (SIZES, {}, {"micro_batch_size": 1, "recompute": "attention"}),
    "adapters": (SIZES, {}, {"lora_rank": 2}),
    "frozen": (SIZES, {}, {"freeze": "blocks.*.ffn.*,*attn*,patch*"}),
    "distill": (SIZES, {}, DISTILL),
    "distill, matched": (SIZES, {}, DISTILL | {"matching": 0.5, "warmup": 0}),
}
FOUR = ("uneven", "fewer", "heads", "blind", "micro-batches", "distill", "distill,")


def cases_of(processes: int, sp: int) -> list[str]:
    """All on two; on four those that differ there; of ranks that share samples no teacher's."""
    names = list(CASES) if processes == 2 else [c for c in CASES if c.split()[0] in FOUR]
    return names if sp == 1 else [name for name in names if not name.startswith("distill")]


def make_batch(latents: tuple[int, int, int], rows: int, samples: int = 4) -> dict:
    g = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(samples, 16, *latents, generator=g),
        "prompt_tokens": torch.randint(37, (samples, rows), generator=g),
        "prompt_lengths": torch.randint(1, rows + 1, (samples,), generator=g),
        "caption_tokens": torch.randint(37, (samples, rows), generator=g),
        "context": torch.randn(samples, 5, 8, generator=g),
        "null_context": torch.randn(5, 8, generator=g),
    }


def share(batch: dict, world: World | None) -> dict:
    """This rank's samples."""
    if world is None:
        return batch
    return {
        k: v if k == "null_context" else v.chunk(world.data_size)[world.data_rank]
        for k, v in batch.items()
    }


def make_state(
    changes: dict, settings: dict, world: World | None, dtype=torch.float32
) -> TrainState:
    net = lively(dtype, **changes)
    teacher = deepcopy(net) if settings.get("stage") == "distill" else None
    return TrainState.create(net, config(**settings), world, teacher=teacher)


def gradients(case: str, world: World | None = None) -> dict[str, torch.Tensor]:
    """Losses and whole gradients of one step."""
    size, changes, settings = CASES[case]
    state = make_state(changes, settings, world)
    rows = share(make_batch(**size), world)
    losses = backward(state, rows, draws_of(state, rows))
    norm = collect(state, losses)
    found = {"losses": losses, "norm": norm}
    for name, master in state.masters.items():
        rows = master.grad
        found[name] = rows if world is None else state.sharding.whole(name, rows)
    return found


def curve(world: World | None = None) -> torch.Tensor:
    """Both losses of ten steps, with Muon."""
    state = make_state({}, {"steps": 10, "muon_lr": 0.01, "lr": 1e-3}, world)
    rows = share(make_batch(**CASES["uneven"][0]), world)
    found = []
    for _ in range(10):
        metrics = train_step(state, rows)
        found.append(torch.stack([metrics["loss_video"], metrics["loss_text"]]))
    return torch.stack(found)


def narrow_errors(world: World | None) -> torch.Tensor:
    """How far gradients in bf16 are from those in fp32, by parameter, relative to its largest."""
    rows = share(make_batch(**CASES["even"][0]), world)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        state = make_state({}, {"micro_batch_size": 1}, world, dtype)
        collect(state, backward(state, rows, draws_of(state, rows)))
        found.append({name: master.grad for name, master in state.masters.items()})
        assert all(master.dtype == torch.float32 for master in state.masters.values())
    whole = [
        {n: g if world is None else state.sharding.whole(n, g) for n, g in grads.items()}
        for grads in found
    ]
    return torch.stack([(whole[1][n] - g).norm() / (g.norm() + 1e-6) for n, g in whole[0].items()])


BAD = ("latents", "context", "loss", "rows of a gradient", "a whole gradient")


def spoil(what: str, state: TrainState, rows: dict, patch: pytest.MonkeyPatch) -> dict:
    """Puts NaN, or an infinite loss, into this rank's part of the next step. -> its batch."""
    if what in rows:
        return rows | {what: torch.full_like(rows[what], float("nan"))}
    plain = backward

    def spoiled(*arguments):
        losses = plain(*arguments)
        if what == "loss":
            return losses / 0
        name = "blocks.0.ffn.up.weight" if what.startswith("rows") else "blocks.0.norm2.weight"
        state.sharding.local(name, state.model.get_parameter(name).grad).view(-1)[0] = float("nan")
        return losses

    patch.setattr("engine.train.step.backward", spoiled)
    return rows


def skips(world: World) -> list[str]:
    """What went wrong where one rank's step is not finite; checked on every rank."""
    every = {"condition_dropout": 0.0, "t2v_share": 0.0, "v2t_share": 0.0}  # sample counts
    state = make_state({}, {"muon_lr": 0.01, **every}, world)
    rows = share(make_batch(**CASES["even"][0]), world)
    train_step(state, rows)

    def everything() -> list[torch.Tensor]:
        moments = [x for o in state.optimizers for m in o.state.values() for x in m.values()]
        kept = [*state.masters.values(), *state.ema.values(), *moments]
        return [x.detach().clone() for x in kept]

    wrong, count = [], 0
    for rank in sorted({0, world.size - 1}):
        for what in BAD:
            before, given, count = everything(), rows, count + 1
            with pytest.MonkeyPatch.context() as patch:
                if world.rank == rank:
                    given = spoil(what, state, rows, patch)
                train_step(state, given)
            same = all(map(torch.equal, before, everything()))
            if not same or state.skipped.item() != count:
                wrong.append(f"{what} of rank {rank}, seen by rank {world.rank}")
    before = everything()
    train_step(state, rows)
    if any(map(torch.equal, before[:3], everything()[:3])) or state.skipped.item() != count:
        wrong.append(f"the step after them on rank {world.rank}")
    return wrong


def adapter_program(folder: Path) -> None:
    """Ranks with shards of the factors train an adapter and save it, and what it is merged into."""
    world = World.start(MeshConfig(1, 2, 1), "cpu", timeout=60)
    state = make_state({}, {"lora_rank": 2, "ema": 0.0}, world)
    rows = share(make_batch(**SIZES), world)
    for _ in range(3):
        train_step(state, rows)
    state.save_adapter(folder / "adapter")
    merged = state.ema_model(torch.float32)
    if world.rank == 0:
        save_pretrained(merged, folder / "model")
    world.stop()


def rank_program(layouts: dict[str, tuple[int, int, int]], folder: Path) -> None:
    """Every case in every layout; what rank 0 found goes into the folder."""
    first = None
    for name, layout in layouts.items():
        if first is None:
            world = first = World.start(MeshConfig(*layout), "cpu", timeout=60)
        else:  # the same processes in another arrangement
            world = World(MeshConfig(*layout), first.device, first.store, first.rank, first.size)
        found = {"curve": curve(world), "bf16": narrow_errors(world)}
        for case in cases_of(world.size, world.config.sp):
            found |= {f"{case}/{key}": x for key, x in gradients(case, world).items()}
        wrong = skips(world)
        assert not wrong, wrong
        if world.rank == 0:
            found = {key: x.detach().contiguous() for key, x in found.items()}
            save_file(found, folder / f"{name}.safetensors")
    first.stop()


def _rank(target, rank: int, size: int, port: int, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    target(*arguments)


def start_world(size: int, target, *arguments) -> list:
    """The processes of a world, each of which runs `target`, forked from one that has imported the
    engine."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["parallel_runs"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        processes = [
            context.Process(target=_rank, args=(target, rank, size, port, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
    return processes
