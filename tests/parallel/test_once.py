"""What one rank makes for all: the trial that chooses kernels."""

import json
from pathlib import Path

import parallel_runs as runs

from engine.config import MeshConfig
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
