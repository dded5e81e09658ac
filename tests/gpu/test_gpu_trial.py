"""The trial on the card: every backend that runs there is proved and timed, once."""

import pytest
import torch

from univigu_kernels import bind, explain

pytestmark = pytest.mark.gpu
CASE = {"B": 1, "V": 1000, "T": 64, "C": 512, "D": 128, "H": 2, "K": 64, "F": 512}


@pytest.mark.parametrize("precision, training", [("bf16", False), ("bf16", True), ("fp8", False)])
def test_a_gpu_tries_once(precision, training, tmp_path, monkeypatch):
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = {"precision": precision, "case": CASE, "training": training}
    first, second = (bind("auto", "cuda", torch.bfloat16, **arguments) for _ in range(2))
    assert first.table == second.table

    tried = {choice.op: choice for choice in first.table if choice.times}
    assert "joint_attention" in tried, explain(first)
    assert all(choice.backend == choice.times[0][0] for choice in tried.values())
    ours = dict(tried["joint_attention"].times)
    assert "triton" in ours, explain(first)  # our own kernel is right here, or this says why not
