"""`univigu verify`, and `--verify` of the commands that load models."""

import json
import shutil

import pytest

from engine.config import EMBEDDED


@pytest.fixture
def copy(tmp_path):
    """A model with hashes, in a folder m of the test's own."""
    return shutil.copytree(EMBEDDED, tmp_path / "m")


def damage(folder, file="transformer/model.safetensors"):
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)


def test_a_model_as_it_was_written(run, copy):
    assert run("verify m") == (0, "m: every file is as it was written\n", "")
    assert run("verify m/transformer")[0] == 0
    assert run("verify m/vae/diffusion_pytorch_model.safetensors")[0] == 0


def test_every_fault_has_a_line_that_begins_with_its_file(run, copy):
    damage(copy)
    damage(copy, "vae/config.json")
    shutil.copy(copy / "pipeline.json", copy / "text_encoder" / "spare.bin")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    code, out, err = run("verify m")
    assert code == 4 and err.startswith("univigu: verify: m must be as it was written; got 4 fault")
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "m/text_encoder/spare.bin",
        "m/tokenizer/tokenizer.json",
        "m/transformer/model.safetensors",
        "m/vae/config.json",
    ]
    assert run("verify m/transformer/config.json")[0] == 0
    assert run("verify m/transformer/model.safetensors")[0] == 4


def test_a_manifest_for_a_folder_of_others(run, copy):
    """Without one there is a notice; with one, something to compare with."""
    for path in copy.rglob("sha256.json"):
        path.unlink()
    code, out, err = run("verify m")
    assert (code, out) == (0, "") and err.count("no sha256.json has hashes of it") == 6

    code, out, _ = run("verify m --write")
    parts = {"few_steps": 3, "text_encoder": 2, "tokenizer": 2, "transformer": 2, "vae": 2}
    wanted = [f"m/{part}/sha256.json: {count} files" for part, count in parts.items()]
    wanted.insert(0, "m/sha256.json: 1 files")
    assert (code, out.splitlines()) == (0, wanted)
    assert run("verify m")[0] == 0
    damage(copy)
    assert run("verify m")[0] == 4
    assert run("verify m --write")[0] == 0 and run("verify m")[0] == 0


def test_a_latent_shard(run, places, tmp_path):
    shutil.copy(places["shard"], tmp_path / "a.safetensors")
    said = "a.safetensors: every file is as it was written\n"
    assert run("verify a.safetensors") == (0, said, "")
    damage(tmp_path, "a.safetensors")
    code, _, err = run("verify a.safetensors")
    assert code == 4 and "a.safetensors must hold the data of its SHA-256" in err
    (tmp_path / "a.safetensors").write_bytes(places["shard"].read_bytes()[:1000])
    code, _, err = run("verify a.safetensors")
    assert code == 4 and "a.safetensors: must be complete" in err


@pytest.mark.parametrize("line", ["verify absent", "verify {empty}", "verify m/a.txt"])
def test_nothing_to_verify(run, tmp_path, line):
    code, out, err = run(line)
    assert (code, out) == (4, "") and err.count("\n") == 1


def test_hashes_are_made_for_folders_alone(run, copy):
    code, _, err = run("verify m/transformer/model.safetensors --write")
    assert code == 2 and "--write must go with the folder" in err


COMMANDS = [
    "generate --prompt 'a red circle moves left' --model-path m",
    "generate --prompt 'a red circle moves left' --transformer-path m/transformer",
    "caption --video {clip} --model-path m",
    "demo --output-path demo --model-path m",
    "evaluate --cases 1 --model-path m",
    "evaluate --cases 1 --transformer-path m/transformer",
    "convert --model-path m --output-path out",
    "convert --model-path m/transformer --output-path out --lora {folder}",
    "train --data {shard} --init-from m/transformer --output-path out --steps 1 --quiet",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compare_before_they_load(run, copy, line):
    damage(copy)
    code, out, err = run(f"{line} --verify")
    assert (code, out) == (4, "") and "/model.safetensors: must have the SHA-256" in err
    assert err.count("\n") == 1 + err.count("no sha256.json")


def test_a_run_and_its_adapter_have_hashes(run, tmp_path):
    line = "train --data {shard} --batch-size 1 --steps 2 --output-path run --quiet "
    assert run(line + "--preset tiny --lora-rank 2")[0] == 0
    for part in ("", "/model", "/adapter", "/checkpoint", "/checkpoint/step-00000002"):
        said = f"run{part}: every file is as it was written\n"
        assert run(f"verify run{part}") == (0, said, "")
    groups = json.loads((tmp_path / "run" / "adapter" / "sha256.json").read_text())["groups"]
    assert "transformer.blocks.0" in groups

    line = "convert --model-path run/model --lora run/adapter --output-path merged --verify"
    assert run(line) == (0, "merged\n", "")
    assert run("verify merged")[0] == 0
    damage(tmp_path / "run", "adapter/pytorch_lora_weights.safetensors")
    code, _, err = run(line)
    assert code == 4 and "pytorch_lora_weights.safetensors: must have the SHA-256" in err

    damage(tmp_path / "run", "checkpoint/step-00000002/state.json")
    for folder in ("run", "run/checkpoint"):
        code, out, _ = run(f"verify {folder}")
        assert code == 4 and "checkpoint: step-00000002/state.json must have the SHA" in out
    assert run("verify run/checkpoint --write")[0] == 2
