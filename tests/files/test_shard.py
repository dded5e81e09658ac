"""One shard: what is refused when it is opened, and the hash of its data."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import config, model

import engine
from engine.cli import main
from engine.config import EMBEDDED
from engine.data import LatentSet, data_fingerprint, verify_shard
from engine.data.shard import RANKS
from engine.errors import ModelFileError, UsageError
from engine.pipeline import Pipeline
from engine.toy import preprocess_scenes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A shard of six clips, as `univigu preprocess` writes it."""
    path = tmp_path_factory.mktemp("made") / "six.safetensors"
    parts = Pipeline.without_model(EMBEDDED)
    preprocess_scenes(parts, data_fingerprint(EMBEDDED), path, 6, 0, 16)
    return path


@pytest.fixture
def changed(made, tmp_path):
    """Writes the shard again with other tensors, or another info, under a name -> its path."""

    def changed(name="six", info=None, **tensors):
        with safe_open(made, "pt") as file:
            known = json.loads(file.metadata()["info"])
        path = tmp_path / f"{name}.safetensors"
        metadata = {"info": json.dumps(known | (info or {}))}
        save_file(load_file(made) | tensors, path, metadata)
        return path

    return changed


NUMBERS = [  # (tensor, its first number, what is said)
    ("prompt_tokens", -1, "prompt_tokens of .* from 0 to .*; got -1 to"),
    ("prompt_tokens", -(2**63), "got -9223372036854775808 to"),
    ("prompt_tokens", 2**31, "got .* to 2147483648"),
    ("prompt_tokens", 2**32 + 3, "got .* to 4294967299"),  # 3, where it is cut to 32 bits
    ("caption_tokens", -7, "caption_tokens of .* got -7 to"),
    ("caption_tokens", 2**63 - 1, "got .* to 9223372036854775807"),
    ("caption_tokens", 2**40, "got .* to 1099511627776"),
    ("prompt_lengths", -1, "prompt_lengths of .* from 0 to 16; got -1 to"),
    ("prompt_lengths", 17, "from 0 to 16; got .* to 17"),
    ("prompt_lengths", 2**32, "got .* to 4294967296"),
    ("context_index", -1, "context_index of .* got -1 to"),
    ("context_index", 6, "context_index of .* got .* to 6"),
    ("context_index", 2**32, "got .* to 4294967296"),
]


@pytest.mark.parametrize("name, value, said", NUMBERS)
def test_a_number_out_of_range_is_refused(made, changed, name, value, said):
    tensor = load_file(made)[name].long()
    tensor.view(-1)[0] = value
    with pytest.raises(ModelFileError, match=said):
        LatentSet(changed(**{name: tensor}))


def test_numbers_at_the_ends_of_their_ranges_are_taken(made, changed):
    lengths = torch.tensor([0, 16, 1, 2, 3, 4])
    tokens = torch.full((6, 16), 2**31 - 1)
    data = LatentSet(changed(prompt_lengths=lengths, caption_tokens=tokens))
    batch = data.batch(torch.arange(6))
    assert torch.equal(batch["prompt_lengths"], lengths)
    assert torch.equal(batch["caption_tokens"], tokens)


SHAPES = {
    "3 channels": {"latents": torch.zeros(6, 3, 3, 8, 8)},
    "no channels": {"latents": torch.zeros(6, 0, 3, 8, 8)},
    "no frames": {"latents": torch.zeros(6, 16, 0, 8, 8)},
    "odd rows": {"latents": torch.zeros(6, 16, 3, 7, 8)},
    "odd columns": {"latents": torch.zeros(6, 16, 3, 8, 9)},
    "no text": {
        k: torch.zeros(6, 0, dtype=torch.int64) for k in ("prompt_tokens", "caption_tokens")
    },
    "no context": {"contexts": torch.zeros(6, 0, 64), "null_context": torch.zeros(0, 64)},
    "no width": {"contexts": torch.zeros(6, 16, 0), "null_context": torch.zeros(16, 0)},
}


@pytest.mark.parametrize("tensors", SHAPES.values(), ids=SHAPES.keys())
def test_a_shape_that_no_model_takes_is_refused(changed, tensors):
    with pytest.raises(ModelFileError, match="must hold latents .N,16,F,Y,X."):
        LatentSet(changed(**tensors))


def bound(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


NO_FILES = {
    "nothing": lambda path: None,
    "pipe": os.mkfifo,
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path}.p")),
    "folder": os.mkdir,
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "socket": bound,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "terminal": lambda path: path.symlink_to("/dev/ptmx"),
    "broken link": lambda path: path.symlink_to(f"{path}.gone"),
    "link to itself": lambda path: path.symlink_to(path),
    "empty": Path.touch,
    "text": lambda path: path.write_text("not a shard" * 99),
    "endless header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f{}"),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES.keys())
def test_what_is_no_shard_is_refused_and_not_waited_for(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 108 characters
    make(Path("a.safetensors"))
    with pytest.raises(ModelFileError, match="^data: a.safetensors must be a latent shard; got "):
        LatentSet("a.safetensors")


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "six.safetensors/inside"])
def test_a_path_that_no_file_can_have_is_refused(made, monkeypatch, name):
    monkeypatch.chdir(made.parent)
    with pytest.raises(ModelFileError, match="must be a latent shard"):
        LatentSet(name)


INFOS = ["[" * 100_000, '{"format_version": ' + "9" * 5000 + "}", '{"sha256": 7}', '"', "7"]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info[:20])
def test_an_info_that_says_nothing_of_a_shard_is_refused(made, tmp_path, info):
    save_file(load_file(made), tmp_path / "a.safetensors", {"info": info})
    with pytest.raises(ModelFileError, match="a.safetensors"):
        LatentSet(tmp_path / "a.safetensors")


def test_a_shard_is_checked_against_its_hash(made, changed, tmp_path):
    assert verify_shard(made)
    assert f"six.safetensors (6, SHA-256 {LatentSet(made).shards[0].sha256[:16]})" in (
        LatentSet(made).identity
    )
    assert not verify_shard(changed("old", info={"sha256": ""}))
    assert LatentSet(tmp_path / "old.safetensors").identity == "old.safetensors (6)"


@pytest.mark.parametrize("name", RANKS)
def test_a_changed_bit_of_any_tensor_is_found(made, changed, tmp_path, name):
    tensor = load_file(made)[name].clone()
    tensor.view(-1).view(torch.uint8)[0] ^= 1
    path = changed(**{name: tensor})
    with pytest.raises(ModelFileError, match="six.safetensors must hold the data of its SHA-256"):
        LatentSet(made, path).verify()


def test_the_same_bytes_under_another_shape_are_other_data(made, changed):
    latents = load_file(made)["latents"]
    with pytest.raises(ModelFileError, match="SHA-256"):
        verify_shard(changed(latents=latents.view(6, 16, 3, 16, 4)))


def test_each_process_of_a_machine_reads_its_share(made, changed):
    wrong = changed("wrong", latents=load_file(made)["latents"].flip(0))
    old = changed("old", info={"sha256": ""})
    data = LatentSet(made, wrong, old)
    assert data.verify(0, 3) == [] and data.verify(2, 3) == [old]
    for rank, ranks in ((0, 1), (1, 2), (1, 3)):
        with pytest.raises(ModelFileError, match="wrong.safetensors"):
            data.verify(rank, ranks)


def train(data, folder, steps, **choices):
    """Trains a new run, or goes on with that in the folder, up to so many steps -> the state."""
    settings = config(steps=steps, batch_size=2)
    state = engine.TrainState.create(model(text_dim=64), settings)
    if (folder / "checkpoint").exists():
        engine.load_checkpoint(state, folder / "checkpoint")
    engine.fit(state, LatentSet(data), folder, progress=False, **choices)
    return state


def test_a_run_goes_on_with_the_data_that_it_began_with_alone(made, changed, tmp_path):
    train(made, tmp_path / "run", 1)
    flipped = load_file(made)["latents"].flip(0)
    with pytest.raises(ModelFileError, match="six.safetensors must hold the data of its SHA-256"):
        train(changed(latents=flipped), tmp_path / "run", 2)

    other = changed(info={"sha256": "0" * 64})
    with pytest.raises(UsageError, match="data must be the shards of the run, .*SHA-256 .*got .*0"):
        train(other, tmp_path / "run", 2)
    with pytest.raises(UsageError, match="data must be the shards of the run"):
        train(changed(info={"sha256": ""}), tmp_path / "run", 2)
    assert train(changed(), tmp_path / "run", 2).step == 2


def test_a_run_on_shards_without_a_hash_goes_on_as_before(changed, tmp_path):
    old = changed(info={"sha256": ""})
    assert train(old, tmp_path / "run", 1).data == "six.safetensors (6)"
    assert train(old, tmp_path / "run", 2).step == 2


def test_a_new_run_checks_the_hashes_where_it_is_asked_to(made, changed, tmp_path, capsys):
    wrong = changed("wrong", latents=load_file(made)["latents"].flip(0))
    assert train(wrong, tmp_path / "unasked", 1).step == 1
    with pytest.raises(ModelFileError, match="wrong.safetensors"):
        train(wrong, tmp_path / "asked", 1, verify=True)
    assert not list((tmp_path / "asked").iterdir())

    train(changed("old", info={"sha256": ""}), tmp_path / "old", 1, verify=True)
    assert "old.safetensors: made without a hash" in capsys.readouterr().err

    line = f"train --preset tiny --steps 1 --batch-size 2 --quiet --data {wrong} --verify"
    assert main([*line.split(), "--output-path", str(tmp_path / "run")]) == 4
    assert "wrong.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"text_dim": 8}, {"vocab": 20}], ids=str)
def test_training_refuses_tokens_and_contexts_that_the_model_does_not_take(made, tmp_path, change):
    state = engine.TrainState.create(model(**{"text_dim": 64} | change), config(batch_size=2))
    with pytest.raises(UsageError, match="made for text_dim .* tokens; got 64 and token"):
        engine.fit(state, LatentSet(made), tmp_path, progress=False)
