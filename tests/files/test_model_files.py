import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import ModelConfig, ModelFileError, UniViGU, UsageError, load_model, save_pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
CFG = ModelConfig(heads=2, head_dim=12, layers=2, ffn_dim=40, text_dim=20, freq_dim=16, vocab=30)


@pytest.fixture
def official():
    return load_file(GOLDEN / "univigu_small.weights.safetensors")


def save(folder, **options):
    save_pretrained(UniViGU(CFG, kernels="reference"), folder, **options)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_keep_to_the_limit_and_to_the_index(tmp_path):
    save(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: load_file(tmp_path / file) for file in set(index.values())}
    assert len(shards) > 3
    assert {p.name for p in tmp_path.iterdir()} == {
        *shards,
        "config.json",
        "model.safetensors.index.json",
        "sha256.json",
    }
    for file, tensors in shards.items():
        assert {name for name, where in index.items() if where == file} == tensors.keys()
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1


def test_overwriting_leaves_no_stale_shard(tmp_path):
    save(tmp_path, max_shard_bytes=20_000)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt", "sha256.json"}
    assert load_model(tmp_path, kernels="reference").cfg == CFG


def test_a_failed_save_leaves_the_old_model(tmp_path):
    save(tmp_path, max_shard_bytes=20_000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    broken = UniViGU(CFG, kernels="reference")
    broken.video_head.to("meta")  # the last tensors in the file have no data
    with pytest.raises(NotImplementedError):
        save_pretrained(broken, tmp_path, max_shard_bytes=20_000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("foreign", ["config.json", "other.safetensors", "model_index.json", None])
def test_save_leaves_other_models_alone(tmp_path, foreign):
    target = tmp_path / "target"
    if foreign is None:
        target.write_text("a file")
    else:
        target.mkdir()
        (target / foreign).write_text("{}")
    with pytest.raises(UsageError, match="must be a new folder"):
        save(target)
    assert target.read_text() == "a file" if foreign is None else os.listdir(target) == [foreign]


def edit_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def put(name, tensor):
    return lambda folder: edit_tensors(folder, lambda state: state.update({name: tensor}))


def drop(*names):
    return lambda folder: edit_tensors(folder, lambda state: [state.pop(n) for n in names])


def cut(folder, size=-1):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


FFN = [f"blocks.{i}.{e}.net.{j}" for i in (0, 1) for e in ("ffn", "ffn_t") for j in ("0.proj", "2")]
DAMAGE = {
    "missing": (drop("blocks.1.norm2.bias"), r"missing 1: blocks\.1\.norm2\.bias"),
    "missing-many": (
        drop(*(f"{name}.bias" for name in FFN)),
        r"missing 8: (blocks\S+, ){4}blocks\S+ and 3 more",
    ),
    "missing-block": (
        drop("blocks.0.ffn.net.0.proj.weight"),
        r"blocks\.0\.ffn\.net\.0\.proj\.weight must be in the file",
    ),
    "unexpected": (put("blocks.0.extra", torch.ones(1)), r"unexpected 1: blocks\.0\.extra"),
    "block-gap": (put("blocks.7.norm2.bias", torch.ones(24)), r"layers must be 3.*got 2"),
    "misshaped": (
        put("blocks.0.norm2.bias", torch.ones(25)),
        r"mis-shaped 1: blocks\.0\.norm2\.bias \[25\] instead of \[24\]",
    ),
    "misshaped-rank": (
        put("patch_embedding.weight", torch.ones(24)),
        r"patch_embedding\.weight must have 5 dimensions",
    ),
    "i2v-channels": (
        put("patch_embedding.weight", torch.ones(24, 36, 1, 2, 2)),
        r"image-to-video .*\[24, 36, 1, 2, 2\]: 36 input",
    ),
    "ints": (
        put("blocks.0.norm2.bias", torch.ones(24, dtype=torch.int64)),
        r"not floating point 1: blocks\.0\.norm2\.bias I64",
    ),
    "fp8": (
        put("blocks.0.norm2.bias", torch.ones(24).to(torch.float8_e4m3fn)),
        r"not floating point 1: blocks\.0\.norm2\.bias F8_E4M3",
    ),
    "duplicate": (
        put("_orig_mod.vocab_embed.weight", torch.ones(30, 24)),
        r"two tensors for vocab_embed\.weight",
    ),
    "no-tensors": (drop(*load_file(GOLDEN / "univigu_small.weights.safetensors")), "must be in"),
    "truncated": (cut, r"model\.safetensors: must be complete"),
    "truncated-header": (lambda f: cut(f, 100), r"model\.safetensors: must be complete"),
    "empty": (lambda f: cut(f, 0), r"model\.safetensors: must be complete"),
    "no-config": (lambda f: os.remove(f / "config.json"), "must hold config.json"),
    "config-garbage": (lambda f: (f / "config.json").write_bytes(b"\xff{"), "must be JSON"),
    "config-deep": (lambda f: (f / "config.json").write_text("[" * 200_000), "must be JSON"),
    "config-list": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object"),
    "config-contradicts": (config(layers=3), r"layers must be 2, as in the tensors; got 3"),
    "config-head-dim": (config(head_dim=24), r"head_dim must be 12"),
    "config-type": (config(ffn_dim="40"), r"ffn_dim must be a int.*got '40'"),
    "config-bool": (config(layers=True), r"layers must be a int.*got True"),
    "config-zero": (config(heads=0), r"heads must be a int, numbers positive; got 0"),
    "config-flow": (config(text_flow="x"), r"text_flow must be discrete or embedding"),
    "config-version": (config(format_version=2), r"format_version must be 1; got 2"),
    "config-unknown": (config(window=7), r"got window"),
    "config-eps": (config(format="", eps=1e-5), r"eps must be 1e-6; got 1e-05"),
    "two-models": (
        lambda f: shutil.copy(f / "model.safetensors", f / "diffusion_pytorch_model.safetensors"),
        "must hold exactly one",
    ),
    "no-weights": (lambda f: os.remove(f / "model.safetensors"), "got none"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelFileError, match=message) as error:
        load_model(tmp_path, kernels="reference")
    assert str(tmp_path) in str(error.value)


def remap(to):
    """Makes the index say that the first tensor is in the file `to`."""

    def damage(folder, files):
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map[next(iter(weight_map))] = to
        edit_json(index, weight_map=weight_map)

    return damage


def forget(folder, files):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[next(iter(weight_map))]
    edit_json(index, weight_map=weight_map)


def index_is(content):
    return lambda folder, files: (folder / "model.safetensors.index.json").write_text(content)


SHARDS = {
    "parent": (remap("../model-00001.safetensors"), "plain name"),
    "absolute": (remap("/etc/passwd.safetensors"), "plain name"),
    "backslash": (remap("..\\x.safetensors"), "plain name"),
    "not-safetensors": (remap("weights.pth"), "plain name"),
    "missing-shard": (lambda folder, files: os.remove(folder / files[1]), "got no model-00002"),
    "wrong-shard": (lambda f, files: remap(files[-1])(f, files), "unexpected: scale_shift_table_v"),
    "in-no-shard": (forget, r"unexpected: \w+"),
    "shard-lacks": (
        lambda f, files: save_file({"x": torch.ones(1)}, f / files[0]),
        "missing: .*unexpected: x",
    ),
    "swapped": (lambda f, files: shutil.copy(f / files[0], f / files[1]), "must hold exactly what"),
    "truncated": (
        lambda f, files: (f / files[1]).write_bytes((f / files[1]).read_bytes()[:-1]),
        "must be complete",
    ),
    "no-map": (index_is("{}"), "weight_map must map"),
    "map-of-lists": (index_is('{"weight_map": {"a": ["b"]}}'), "weight_map must map"),
    "garbage": (index_is("{"), "must be JSON"),
}


@pytest.mark.parametrize(("damage", "message"), SHARDS.values(), ids=SHARDS)
def test_damaged_shards_are_refused(tmp_path, damage, message):
    save(tmp_path, max_shard_bytes=20_000)
    damage(tmp_path, sorted(p.name for p in tmp_path.glob("model-*")))
    with pytest.raises(ModelFileError, match=message) as error:
        load_model(tmp_path, kernels="reference")
    assert str(tmp_path) in str(error.value)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_pickled_code_is_refused_and_not_run(tmp_path, official):
    marker = tmp_path / "ran"
    for content in ({"model": official, "extra": Bomb(str(marker))}, Bomb(str(marker))):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(ModelFileError, match="No code in it was run"):
            load_model(tmp_path / "m.pth", kernels="reference")
    assert not marker.exists()


def test_loading_pth_looks_up_no_pickled_class(tmp_path, official):
    torch.save({"model": official, "step": 3}, tmp_path / "m.pth")
    seen, watching = [], True

    def hook(event, arguments):
        if watching and event == "pickle.find_class":
            seen.append(arguments)

    sys.addaudithook(hook)
    load_model(tmp_path / "m.pth", kernels="reference")
    watching = False
    assert not seen


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "must hold a state dict.*got list"),
        ({"model": torch.ones(1)}, "must hold a state dict.*got Tensor"),
        ({"model": {"vocab_embed.weight": 3}}, "dense tensor; got 'vocab_embed.weight': int"),
        ({1: torch.ones(1)}, "dense tensor; got 1: Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "dense tensor; got 'a'"),
        ({"a": torch.ones(1).expand(10**9)}, "dense tensor; got 'a'"),
        ({"a": torch.empty(2, device="meta")}, "dense tensor; got 'a'"),
        ({}, "must be in the file"),
    ],
)
def test_odd_torch_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "m.pth", kernels="reference")


@pytest.mark.parametrize("data", [b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(200)])
def test_broken_torch_files_are_refused(tmp_path, data):
    (tmp_path / "m.pth").write_bytes(data)
    with pytest.raises(ModelFileError, match="undamaged torch file"):
        load_model(tmp_path / "m.pth", kernels="reference")
    torch.save({"model": {"a": torch.ones(9)}}, tmp_path / "n.pth")
    (tmp_path / "n.pth").write_bytes((tmp_path / "n.pth").read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="undamaged torch file"):
        load_model(tmp_path / "n.pth", kernels="reference")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_an_empty_file_is_no_model(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ModelFileError, match=f"{name}: must be complete.*got an empty file"):
        load_model(tmp_path / name, kernels="reference")


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "existing folder or file"), ("m.txt", "must end in"), ("folder", "exactly one of")],
)
def test_unusable_paths_are_refused(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.txt").write_bytes(b"x")
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / name, kernels="reference")


def test_lone_file_with_broken_metadata_is_refused(tmp_path, official):
    save_file(official, tmp_path / "m.safetensors", {"config": "{"})
    with pytest.raises(ModelFileError, match="metadata config: must be JSON"):
        load_model(tmp_path / "m.safetensors", kernels="reference")


def test_a_missing_layer_in_a_file_without_config(tmp_path, official):
    kept = {name: t for name, t in official.items() if not name.startswith("blocks.0.attn2.to_k")}
    kept |= {"blocks.9.norm2.bias": kept.pop("blocks.1.norm2.bias")}
    save_file(kept, tmp_path / "m.safetensors")
    message = r"missing \d+: .*blocks\.0\.attn2\.to_k.*unexpected 1: blocks\.9\.norm2\.bias"
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "m.safetensors", kernels="reference")
