"""What one rank makes for all: the trial that chooses kernels, the check of hashes."""

import json
import os
import shutil
from pathlib import Path

import parallel_runs as runs
import pytest

from engine import ModelFileError, Pipeline
from engine.config import EMBEDDED, MeshConfig
from engine.files import hashes
from engine.parallel import World
from univigu_kernels import _trial

CASE = {"B": 1, "V": 200, "T": 24, "C": 20, "D": 64, "H": 2, "K": 32, "F": 144}


def rank_program(folder: Path) -> None:
    """Each rank has a home of its own, so that none reads what another remembers."""
    world = World.start(MeshConfig(), "cpu", timeout=60)
    home = folder / f"home{world.rank}"
    asked = "univigu_kernels.joint_attention", "training", CASE, "cpu", "float32", ("cpu", "sdpa")
    trial = _trial.shared(_trial.Request(*asked), home, world.once)
    (folder / f"{world.rank}.json").write_text(json.dumps([trial.times, trial.rejected]))
    assert isinstance(trial.times[0], tuple)
    world.stop()


def test_all_ranks_have_the_trial_of_one(tmp_path):
    for process in runs.start_world(3, rank_program, tmp_path):
        process.join(120)
        assert process.exitcode == 0
    found = [(tmp_path / f"{rank}.json").read_text() for rank in range(3)]
    assert found[0] == found[1] == found[2] and len(json.loads(found[0])[0]) == 2
    assert [path.name for path in tmp_path.glob("home*")] == ["home0"]


def verifying(folder: Path, on_a_node: int) -> None:
    """Loads a good folder and a damaged one, with `on_a_node` ranks on each node."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % on_a_node)
    world, read = World.start(MeshConfig(cfg=2), "cpu", timeout=60), []
    hash_file = hashes._hash_file
    hashes._hash_file = lambda path: (read.append(path.name), hash_file(path))[1]
    Pipeline.from_pretrained(folder / "good", verify=True, world=world)
    try:
        Pipeline.from_pretrained(folder / "bad", verify=True, world=world)
        said = ""
    except ModelFileError as error:
        said = str(error)
    (folder / f"{rank}.json").write_text(json.dumps([len(read), said]))
    world.stop()


@pytest.mark.parametrize("on_a_node", [1, 2])
def test_hashes_are_checked_once_on_a_node(tmp_path, on_a_node):
    for name in ("good", "bad"):
        shutil.copytree(EMBEDDED, tmp_path / name)
    path = tmp_path / "bad" / "vae" / "config.json"
    path.write_text(path.read_text() + " ")
    for process in runs.start_world(2, verifying, tmp_path, on_a_node):
        process.join(120)
        assert process.exitcode == 0

    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(f"{path}: must have" in said for _, said in found)
    files = 2 * sum(len(hashes._held(part)) for part in hashes.parts_of(EMBEDDED))
    assert [count for count, _ in found] == ([files, 0] if on_a_node == 2 else [files, files])
