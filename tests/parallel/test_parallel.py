"""Several processes compute what one does: losses, gradients and ten steps, in every layout."""

import json
from pathlib import Path

import parallel_runs as runs
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import config, model

import engine
from engine.config import MeshConfig
from engine.errors import UsageError
from engine.parallel.sequence import Rows, boxes, cut, packing

CURVE = Path(__file__).parents[1] / "golden" / "loss_curve.json"
CLOSE = 1e-5  # relative, fp32


@pytest.fixture(scope="module")
def single():
    found = {"curve": runs.curve()}
    for case in runs.CASES:
        found |= {f"{case}/{name}": x for name, x in runs.gradients(case).items()}
    return found


@pytest.fixture(scope="module", params=sorted(runs.LAYOUTS))
def world(request, tmp_path_factory):
    """{layout: tensors} of all layouts of so many processes, which are started once."""
    folder = tmp_path_factory.mktemp("world")
    layouts = runs.LAYOUTS[request.param]
    for process in runs.start_world(request.param, runs.rank_program, layouts, folder):
        process.join(120)
        assert process.exitcode == 0
    return {name: load_file(folder / f"{name}.safetensors") for name in layouts}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the tensor; to one where all of it is zero but for rounding."""
    size = expected.norm()
    return ((found - expected).norm() / (size if size > 1e-7 else 1)).item()


@pytest.mark.parametrize("case", runs.CASES)
def test_losses_and_gradients_are_those_of_one_process(single, world, case):
    names = [name for name in single if name.startswith(f"{case}/")]
    processes = 2 if len(world) == 3 else 4
    for layout, found in world.items():
        if case in runs.cases_of(processes, runs.LAYOUTS[processes][layout][2]):
            assert len([name for name in found if name.startswith(f"{case}/")]) == len(names)
            for name in names:
                assert apart(found[name], single[name]) < CLOSE, f"{layout}: {name}"


def test_ten_steps_follow_the_stored_curve(single, world):
    stored = torch.tensor(json.loads(CURVE.read_text()))
    assert stored[-1].sum() < stored[0].sum()
    for layout, found in {"one process": single, **world}.items():
        assert apart(found["curve"], stored) < CLOSE, layout


def test_bf16_masters_and_gradients_are_as_good_as_those_of_one_process(world, single):
    truth = single["even/losses"], single["even/norm"]
    for layout, found in world.items():
        alone = runs.narrow_errors(None)
        there = found["bf16"]
        assert (there <= 2 * alone + 1e-3).all(), (layout, there, alone)
    assert truth[0].isfinite().all()


@pytest.mark.parametrize(
    "grid,ranks,largest",
    [
        ((21, 30, 52), 8, 4095),  # 2 x 4 cuts of height and width: equal boxes
        ((21, 30, 52), 3, 10920),
        ((3, 3, 5), 4, 18),
        ((1, 1, 7), 4, 2),
    ],
)
def test_boxes_tile_the_grid_and_are_as_even_as_can_be(grid, ranks, largest):
    seen = torch.zeros(grid)
    found = boxes(grid, ranks)
    for box in found:
        seen[box] += 1
        assert seen[box].numel() > 0
    assert len(found) == ranks and (seen == 1).all()
    assert max(seen[box].numel() for box in found) == largest


def test_a_grid_that_is_too_small_for_the_ranks_is_refused():
    with pytest.raises(UsageError, match=r"sp must cut the latent grid \(1, 2, 2\).*got 5"):
        boxes((1, 2, 2), 5)


def test_packing_puts_video_before_text():
    parts = [Rows(2, 1), Rows(1, 2)]
    assert packing(parts) == [0, 1, 3, 2, 4, 5]
    assert packing(parts, capacity=4) == [0, 1, 4, 2, 5, 6]
    assert cut(5, 3) == [slice(0, 1), slice(1, 3), slice(3, 5)]


@pytest.mark.parametrize(
    "mesh,processes,shape",
    [
        (MeshConfig(), 6, (1, 6, 1, 1)),
        (MeshConfig(dp_replicate=2, sp=2), 8, (2, 2, 2, 1)),
        (MeshConfig(dp_shard=1, sp=-1, cfg=2), 4, (1, 1, 2, 2)),
    ],
)
def test_one_dimension_takes_what_the_others_leave(mesh, processes, shape):
    assert mesh.shape(processes) == shape


@pytest.mark.parametrize(
    "mesh,processes",
    [
        (MeshConfig(sp=3), 4),
        (MeshConfig(dp_shard=1), 2),
        (MeshConfig(sp=-1), 4),
        (MeshConfig(cfg=3), 3),
        (MeshConfig(sp=0), 1),
    ],
)
def test_dimensions_that_are_not_the_processes_are_refused(mesh, processes):
    with pytest.raises(UsageError, match="must be the"):
        mesh.shape(processes)


def test_draws_of_a_sample_do_not_depend_on_who_draws_them():
    from engine.train.objective import draw

    net, rows = model(), runs.make_batch((2, 4, 4), 7)
    whole = draw(rows, config(), net, 3)
    half = {k: v if k == "null_context" else v[2:] for k, v in rows.items()}
    ours = draw(half, config(), net, 3, first=2, total=4)
    for name, mine, theirs in zip(whole._fields, ours, whole, strict=True):
        assert torch.equal(mine, theirs[2:]), name
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_a_world_needs_the_modules_of_no_other_process():
    assert engine.TrainState.create(model(), config()).sharding is None
