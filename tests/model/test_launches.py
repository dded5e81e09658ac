"""How many kernels a frozen caption step and a block launch: the numbers on docs/joint-block.md are
those of the code."""

import re
from pathlib import Path

import launches
import pytest
import torch

from univigu_kernels._triton import supports_triton

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/joint-block.md").read_text(encoding="utf-8")
SPLIT = "linear=split,routed_ffn=split"
pytestmark = pytest.mark.skipif(
    supports_triton(torch.device("cpu"), torch.float32) is not None,
    reason="needs Triton's interpreter",
)


def stands(what: str) -> int:
    """The number of launches now that the page's table gives for a row."""
    (number,) = re.findall(rf"^\| {re.escape(what)} \| [\d-]+ \| (\d+) \|", PAGE, re.M)
    return int(number)


def layer_and_rest(request: str = "") -> tuple:
    one, two = (launches.frozen_step(layers, request) for layers in (1, 2))
    layer = two - one
    return layer, one - layer


def test_a_frozen_step_launches_what_the_page_says():
    layer, rest = layer_and_rest()
    assert layer.total() == stands("layer of a frozen step, context empty"), layer
    assert rest.total() == stands("embedding, head and bookkeeping of a frozen step"), rest
    assert layer["residual_adaln_forward"] == 2, "attention and cross-attention close at once"


def test_split_products_of_a_frozen_step():
    layer, _ = layer_and_rest(SPLIT)
    assert layer.total() == stands('the same with every product on the backend "split"'), layer
    assert (layer["split_product"], layer["split_reduce"]) == (4, 2)


def test_a_block_launches_what_the_page_says():
    forward, backward = launches.block_passes()
    assert forward.total() == stands("block, forward, with a prompt"), forward
    assert backward.total() == stands("block, backward"), backward
    assert backward["zeros"] <= 1, "no gradient is made for a result that has none"


def test_views_and_allocations_are_no_launches():
    with launches.TorchOperations() as noted:
        x = torch.empty(4, 6)
        x.view(2, 12).transpose(0, 1).split(3)[0].unsqueeze(0).expand(5, -1, -1)
        assert noted.names == []
        x.add(1).mul_(2)
        torch.cat([x, x])
    assert noted.names == ["add", "mul_", "cat"]
