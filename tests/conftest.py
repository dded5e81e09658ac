"""Settings that every test shares: a fixed seed, `gpu` tests skipped where there is no GPU, and
Triton kernels in its interpreter there."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when univigu_kernels is imported

import contracts  # noqa: E402

from univigu_kernels import _compiled  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
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
