"""Settings that every test shares: a fixed seed, the longest files first where several run beside
each other, `gpu` tests skipped where there is no GPU, and Triton's interpreter there."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when univigu_kernels is imported

import contracts  # noqa: E402

from univigu_kernels import _compiled  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker
    torch.set_num_threads(1)


# A file goes to one worker: begun last, these kept one of two busy alone for the last 8 minutes.
LONGEST = (
    "model/test_model",
    "kernels/test_qknorm_rope",
    "bench/test_bench",
    "bench/test_bench_faults",
    "docs/test_docs",
    "parallel/test_parallel",
    "kernels/test_joint_attention_triton",
    "kernels/test_joint_attention",
    "kernels/test_vocab_sample",
    "kernels/test_routed_ffn",
    "toy/test_embedded",
    "kernels/test_trial",
    "kernels/test_fp8_ffn",
    "parallel/test_distributed_deaths",
    "kernels/test_ahead",
    "kernels/test_dispatch",
    "serve/test_runner",
    "files/test_checkpoint_deaths",
    "parallel/test_parallel_sampling",
)


def place(item) -> int:
    file = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:  # else in the order that was asked for
        items.sort(key=place)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=_compiled.build_info().get("instruction_sets", ["none"]))
def isa(request):
    """Compiled CPU kernels run with each instruction set of the machine in turn."""
    with _compiled.instruction_set(request.param):
        yield request.param


@pytest.fixture
def poisoned():
    with contracts.poisoned():
        yield


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
