"""`convert` from every layout that is read, into every number format: what it writes is what
`load_model` takes from the source."""

import shutil
from functools import partial

import pytest
import torch
from checkpoint_runs import make_shard, save_two
from safetensors.torch import load_file, save_file
from weights_made import GOLDEN, assert_same, original_name, stock_of

from engine import load_model
from engine.weights import convert, open_model

BF16 = torch.bfloat16
WRITTEN = {
    "keep": {},
    "same": {"dtype": BF16},
    "other": {"dtype": torch.float16},
    "fp8": {"precision": "fp8"},
}


def diffusers(root, shard="10GB"):
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1, "ffn_dim": 64}
    wan = WanTransformer3DModel(**sizes, text_dim=16, freq_dim=16).to(BF16)
    wan.save_pretrained(root / "wan", max_shard_size=shard)
    return root / "wan"


def original(root):
    """The state dict of one in the release's names."""
    state = load_file(diffusers(root) / "diffusion_pytorch_model.safetensors")
    return {original_name(name): x for name, x in state.items()}


def original_safetensors(root):
    save_file(original(root), root / "wan2.1.safetensors")
    return root / "wan2.1.safetensors"


def torch_file(root, name, nested):
    torch.save(nested(original(root)), root / name)
    return root / name


def official(root):
    state = {n: x.to(BF16) for n, x in golden().items()}
    save_file(state, root / "univigu.safetensors", {"config": '{"heads": 4, "head_dim": 24}'})
    return root / "univigu.safetensors"


def golden():
    return load_file(GOLDEN / "univigu_small.weights.safetensors")


def official_pth(root):
    torch.save({"model": golden()}, root / "univigu.pth")
    return root / "univigu.pth"


def ours(root, **how):
    convert(GOLDEN / "univigu_masked.weights.safetensors", root / "ours", **how)
    return root / "ours"


def checkpoint(root):
    return save_two(root / "run" / "checkpoint", make_shard(root / "shard.safetensors"))


SOURCES = {
    "diffusers": diffusers,
    "diffusers-sharded": partial(diffusers, shard="40KB"),
    "original-safetensors": original_safetensors,
    "original-pth": partial(torch_file, name="wan.pth", nested=dict),
    "original-bin-nested": partial(torch_file, name="wan.bin", nested=lambda x: {"model": x}),
    "official": official,
    "official-pth": official_pth,
    "ours": ours,
    "ours-bf16": partial(ours, dtype=BF16),
    "checkpoint": checkpoint,
}


@pytest.fixture(scope="module", params=SOURCES.values(), ids=SOURCES)
def source(request, tmp_path_factory):
    torch.manual_seed(0)
    return request.param(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """A Wan model gets 60 embeddings, not 256384."""
    monkeypatch.setattr(open_model, "__defaults__", (60,))


@pytest.mark.parametrize("how", WRITTEN.values(), ids=WRITTEN)
def test_convert_writes_what_the_source_loads_as(source, tmp_path, how):
    convert(source, tmp_path / "out", **how)
    dtype, precision = how.get("dtype"), how.get("precision")
    load = partial(load_model, kernels="reference", dtype=dtype or torch.float32)
    written, read = load(tmp_path / "out"), load(source, precision=precision)
    assert written.cfg == read.cfg and written.ops.precision == read.ops.precision
    assert_same(written.state_dict(), read.state_dict())
    if not how:
        assert_same(stock_of(tmp_path / "out"), stock_of(source) | constant(tmp_path / "out"))


def constant(folder):
    """What every folder of ours has beside the parameters."""
    name = "rotary_emb_text.inv_freq"
    return {name: stock_of(folder)[name]}


@pytest.mark.parametrize("form", ["fp8-folder", "in-place"])
def test_our_fp8_folders_are_written_again_as_they_are(tmp_path, form):
    first = ours(tmp_path, precision="fp8")
    before = stock_of(first)
    again = first if form == "in-place" else tmp_path / "again"
    convert(first, again)
    assert_same(stock_of(again), before)


def test_text_twins_are_written_beside_what_they_copy(tmp_path):
    """In one shard both read the same bytes of the source."""
    folder = diffusers(tmp_path)
    convert(folder, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["blocks.0.ffn_t.net.2.weight"], state["blocks.0.ffn.net.2.weight"])
    shutil.rmtree(folder)
    assert load_model(tmp_path / "out", kernels="reference").cfg.vocab == 60


def test_tensors_of_a_torch_file_that_overlap_are_written_apart(tmp_path):
    state = golden()
    shared = torch.randn(2 * 96)
    state |= {"blocks.0.norm2.weight": shared[:96], "blocks.0.norm2.bias": shared[48:144]}
    torch.save(state, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), state)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    state = golden()
    state["blocks.1.ffn.net.2.weight"][0, 0] = 7e4
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"ffn\.net\.2\.weight must fit in float16.*7e\+04"):
        convert(tmp_path / "m.safetensors", tmp_path / "out", dtype=torch.float16)
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix == ".safetensors"]
    convert(tmp_path / "m.safetensors", tmp_path / "out", dtype=BF16)
