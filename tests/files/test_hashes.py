"""Hashes beside weights: every changed byte is found and its file named, however tensors are cut
into files; sizes are compared at every loading."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_made import CFG, edit_json, make_model

from engine import ModelFileError, Pipeline, load_model, save_pretrained
from engine.config import EMBEDDED
from engine.files import check_hashes, faults, write_manifest
from engine.files.manifest import NAME, group_of
from engine.files.tensors import entries_of, file_chunks
from engine.weights import convert

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """One model in one file and in shards."""
    base = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = make_model()
    save_pretrained(model, base / "whole")
    save_pretrained(model, base / "shards", max_shard_bytes=20_000)
    return {path.name: path for path in base.iterdir()}


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["shards"], tmp_path / "m"))


@pytest.fixture
def whole(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["whole"], tmp_path / "w"))


def found(folder: Path) -> list[str]:
    """The faults of a folder that has a manifest."""
    said: list[str] = []
    list_ = faults(folder, said.append)
    assert not said
    return list_


def listed(folder: Path) -> dict:
    return json.loads((folder / NAME).read_text())


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*"))[number]


def test_what_is_written_is_what_reading_finds(made, tmp_path):
    for name, path in made.items():
        assert found(path) == []
        copy = Path(shutil.copytree(path, tmp_path / name))
        write_manifest(copy)
        written, read = listed(path), listed(copy)
        assert written == read and list(written["groups"]) == ["blocks.0", "blocks.1", "rest"]
        assert written["files"].keys() == {p.name for p in path.iterdir()} - {NAME}


def test_the_writer_writes_what_the_library_reads(tmp_path):
    """Every dtype of ours, sizes that leave odd offsets, no elements, no dimensions."""
    dtypes = torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.float16, torch.int64
    tensors = {f"{d}{n}": torch.randn(n, 3).to(d) for d in dtypes for n in (0, 1, 3)}
    tensors |= {"scalar": torch.tensor(2.5), "turned": torch.randn(3, 5).T}
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(file_chunks(entries_of(tensors), {"format": "pt"})))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].double(), tensor.double())


@pytest.mark.parametrize("part", range(0, 16))
def test_a_flipped_bit_anywhere_is_found(folder, part):
    """At sixteen places from the first byte of the header to the last byte of the data."""
    path = shard(folder, part % len(list(folder.glob("model-*"))))
    flip(path, min(part * path.stat().st_size // 15, path.stat().st_size - 1))
    (fault,) = found(folder)
    assert fault.startswith(f"{path}: must have the SHA-256")
    with pytest.raises(ModelFileError, match=path.name):
        load_model(folder, kernels="reference", verify=True)
    with pytest.raises(ModelFileError, match=path.name):
        convert(folder, folder.parent / "out", verify=True)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("group", ["blocks.0", "blocks.1", "rest"])
def test_a_fault_is_located_by_its_layer(whole, group):
    path = whole / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    name = next(name for name in header if name[0] != "_" and group_of(name) == group)
    flip(path, 8 + size + header[name]["data_offsets"][0])
    (fault,) = found(whole)
    assert f"got another in group {group}." in fault


def swap(folder):
    one, other = shard(folder, 0), shard(folder, 1)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return one, other


def rename_tensor(folder):
    path = shard(folder, 0)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[f"{name[:-1]}X"] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})
    return (path,)


def exchange_tensors(folder):
    """Two of one shape: names, shapes and sizes stay."""
    path = shard(folder, 1)
    tensors = load_file(path)
    shapes = {tensor.shape: name for name, tensor in tensors.items()}
    a, b = next((n, shapes[t.shape]) for n, t in tensors.items() if shapes[t.shape] != n)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, path, {"format": "pt"})
    return (path,)


def rewrite(content):
    def change(folder):
        path = shard(folder, 2)
        path.write_bytes(content(path.read_bytes()))
        return (path,)

    return change


def remove(name):
    def change(folder):
        (path,) = folder.glob(name)
        path.unlink()
        return (path,)

    return change


def add(name):
    def change(folder):
        shutil.copy(shard(folder, 0), folder / name)
        return (folder / name,)

    return change


def edit_config(name):
    def change(folder):
        edit_json(folder / name, spare=1)
        return (folder / name,)

    return change


CHANGES = {
    "two shards are swapped": swap,
    "a tensor is renamed": rename_tensor,
    "two tensors of one shape are exchanged": exchange_tensors,
    "a byte is lost": rewrite(lambda x: x[:-1]),
    "a byte is added": rewrite(lambda x: x + b"\0"),
    "a page is zero": rewrite(lambda x: x[:-4096] + bytes(4096)),
    "nothing is left": rewrite(lambda x: b""),
    "another shard's content": rewrite(lambda x: x[::-1]),
    "a shard is gone": remove("model-00002-of-*"),
    "the index is gone": remove(INDEX),
    "the config is gone": remove("config.json"),
    "a file is spare": add("other.safetensors"),
    "a torch file is spare": add("model.bin"),
    "the config is edited": edit_config("config.json"),
    "the index is edited": edit_config(INDEX),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_found_and_its_files_named(folder, change):
    files = change(folder)
    texts = found(folder)
    assert [text.partition(":")[0] for text in sorted(texts)] == sorted(map(str, files))
    with pytest.raises(ModelFileError, match=files[0].name):
        load_model(folder, kernels="reference", verify=True)


def put(*keys, value):
    """Sets a value in the manifest."""

    def change(manifest):
        at = manifest
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


OTHER = "0" * 64
EDITS = {  # what is done to the manifest -> what is said of which file
    "another hash": (put("files", "config.json", "sha256", value=OTHER), "config.json: must have"),
    "another size": (put("files", "config.json", "size", value=1), "config.json: must have 1 byte"),
    "a file more": (
        put("files", "b.safetensors", value={"size": 1, "sha256": OTHER}),
        "b.safetensors: must be in the folder",
    ),
    "another group": (put("groups", "blocks.1", value=OTHER), "another hash of blocks.1"),
    "a group more": (put("groups", "blocks.2", value=OTHER), "another hash of blocks.2"),
    "a group less": (lambda m: m["groups"].pop("blocks.0"), "another hash of blocks.0"),
    "no groups": (put("groups", value={}), "another hash of blocks.0, blocks.1, rest"),
    "a file less": (lambda m: m["files"].pop("model.safetensors"), "model.safetensors: must be in"),
    "outside": (
        put("files", "../b.json", value={"size": 1, "sha256": OTHER}),
        "sha256.json: must list plain names",
    ),
    "absolute": (
        put("files", "/etc/passwd", value={"size": 1, "sha256": OTHER}),
        "sha256.json: must list plain names",
    ),
    "dots": (put("files", "..", value={"size": 1, "sha256": OTHER}), "must list plain names"),
    "a hash that is none": (put("groups", "rest", value="x"), "must list plain names"),
    "a size that is none": (put("files", "config.json", "size", value=True), "must list plain"),
    "an entry that is none": (put("files", "config.json", value=[]), "must list plain names"),
    "another version": (put("format_version", value=2), "must list plain names"),
    "a key more": (put("spare", value=1), "must list plain names"),
}


@pytest.mark.parametrize(("edit", "said"), EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_found(whole, edit, said):
    manifest = listed(whole)
    edit(manifest)
    (whole / NAME).write_text(json.dumps(manifest))
    (fault,) = found(whole)
    assert said in fault and fault.startswith(str(whole))
    with pytest.raises(ModelFileError):
        load_model(whole, kernels="reference", verify=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"files": {}}', "\xff"])
def test_a_manifest_that_is_none_is_an_error_without_a_check_too(whole, content):
    (whole / NAME).write_bytes(content.encode("latin-1"))
    assert str(whole / NAME) in found(whole)[0]
    with pytest.raises(ModelFileError, match=NAME):
        load_model(whole, kernels="reference")


def test_groups_do_not_depend_on_files(made, tmp_path):
    groups = listed(made["whole"])["groups"]
    assert listed(made["shards"])["groups"] == groups
    model = load_model(made["whole"], kernels="reference")
    for limit in (1, 5_000, 11_111, 30_000, 10**9):
        save_pretrained(model, tmp_path / str(limit), max_shard_bytes=limit)
        assert listed(tmp_path / str(limit))["groups"] == groups
    convert(made["shards"], tmp_path / "round")
    assert listed(tmp_path / "round")["groups"] == groups
    convert(made["shards"], tmp_path / "cast", torch.bfloat16)
    cast = listed(tmp_path / "cast")["groups"]
    assert cast.keys() == groups.keys() and not cast.items() & groups.items()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("blocks.3.norm2.bias", "blocks.3"),
        ("blocks.12.ffn.net.0.proj.weight", "blocks.12"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0"),
        ("model.diffusion_model.blocks.5.self_attn.q.weight", "model.diffusion_model.blocks.5"),
        ("encoder.block.0.layer.1.layer_norm.weight", "encoder.block.0"),
        ("decoder.up_blocks.1.resnets.1.conv1.bias", "decoder.up_blocks.1"),
        ("text_embedding.0.weight", "text_embedding.0"),
        ("0.weight", "0"),
        ("patch_embedding.weight", "rest"),
        ("conv1.weight", "rest"),
        ("condition_embedder.linear_1.weight", "rest"),
        ("scale.1", "rest"),
        ("", "rest"),
    ],
)
def test_a_group_is_what_stands_before_the_first_number(name, group):
    assert group_of(name) == group


def test_sizes_are_compared_at_every_loading(folder):
    """A file that says it is whole: only the manifest knows of another size."""
    path = shard(folder, 1)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "pt", "note": "longer than it was"})
    with pytest.raises(ModelFileError, match=rf"{path.name}: must have \d+ bytes"):
        load_model(folder, kernels="reference")
    write_manifest(folder)
    assert load_model(folder, kernels="reference", verify=True).cfg == CFG


def test_documents_may_be_edited(whole):
    """Their bytes count when asked for alone."""
    (whole / "config.json").write_text((whole / "config.json").read_text() + "\n")
    assert load_model(whole, kernels="reference").cfg == CFG
    with pytest.raises(ModelFileError, match=r"config\.json: must have"):
        load_model(whole, kernels="reference", verify=True)


def test_a_folder_of_others_has_nothing_to_compare_with(whole, capsys):
    (whole / NAME).unlink()
    load_model(whole, kernels="reference", verify=True)
    assert f"{whole}: no {NAME}" in capsys.readouterr().err
    load_model(whole, kernels="reference")
    assert capsys.readouterr().err == ""


def test_one_file_is_compared_by_itself(folder):
    one, other = shard(folder, 0), shard(folder, 1)
    flip(other, -1)
    check_hashes([one])
    with pytest.raises(ModelFileError, match=other.name):
        check_hashes([other])
    with pytest.raises(ModelFileError, match=other.name):
        check_hashes([one, folder])


def test_a_pipe_is_no_file_to_wait_for(whole):
    (whole / "config.json").unlink()
    os.mkfifo(whole / "config.json")
    (fault,) = found(whole)
    assert fault.startswith(f"{whole / 'config.json'}: must be in the folder")
    with pytest.raises(ModelFileError, match="config.json: must be complete"):
        write_manifest(whole)
    for name in ("m.safetensors", "m.pth", "m.bin"):
        os.mkfifo(whole / name)
        with pytest.raises(ModelFileError, match=f"{name}: must be complete"):
            load_model(whole / name, kernels="reference")


PARTS = {
    "pipeline.json": "pipeline.json",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "vae's configuration": "vae/config.json",
    "text encoder": "text_encoder/model.safetensors",
    "text encoder's configuration": "text_encoder/config.json",
    "tokenizer": "tokenizer/tokenizer.json",
    "tokenizer's configuration": "tokenizer/tokenizer_config.json",
    "transformer": "transformer/model.safetensors",
    "transformer's configuration": "transformer/config.json",
}


@pytest.mark.parametrize("file", PARTS.values(), ids=PARTS)
def test_every_part_of_a_pipeline_is_compared(tmp_path, file):
    path = Path(shutil.copytree(EMBEDDED, tmp_path / "p"))
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:-2] + b" \n" if file.endswith("json") else content[:-1])
    with pytest.raises(ModelFileError, match=rf"{file}: must have"):
        Pipeline.from_pretrained(path, "cpu", verify=True)


def test_a_pipeline_as_it_was_written_loads(capsys):
    Pipeline.from_pretrained(EMBEDDED, "cpu", verify=True)
    assert capsys.readouterr().err == ""


def test_the_transformer_that_is_used_is_the_one_that_is_compared(tmp_path):
    path = Path(shutil.copytree(EMBEDDED, tmp_path / "p"))
    other = Path(shutil.copytree(path / "transformer", tmp_path / "other"))
    flip(path / "transformer" / "model.safetensors", -1)
    Pipeline.from_pretrained(path, "cpu", transformer_path=other, verify=True)
    flip(other / "model.safetensors", -1)
    with pytest.raises(ModelFileError, match=r"other/model\.safetensors: must have the SHA"):
        Pipeline.from_pretrained(EMBEDDED, "cpu", transformer_path=other, verify=True)
