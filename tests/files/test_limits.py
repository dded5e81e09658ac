"""What would take memory or time without end is refused before it does: compressed pickles, pipes,
steps, rows and prompts by the billion."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engine
from engine.cli import main
from engine.config import EMBEDDED, MOST_ROWS, STEPS
from engine.files.tensors import MOST_TENSORS

PEAK = """
import resource, sys, engine
for path in ("nowhere.pth", sys.argv[1]):  # the first time imports torch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        engine.load_model(path)
    except engine.ModelFileError as error:
        said = str(error)
print(said)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def bomb(path, size: int, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("m/version", "3\n")
        file.writestr("m/data.pkl", b"\0" * size)
    return path


def test_a_compressed_pickle_is_refused_before_it_is_inflated(tmp_path):
    """256 MiB in 256 KiB took three times its size."""
    path = bomb(tmp_path / "model.pth", 1 << 28)
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    said, kilobytes = found.stdout.splitlines()
    assert "uncompressed; got m/data.pkl of 268435456 bytes in" in said
    assert int(kilobytes) < 1 << 14


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.bin", "m.ckpt"])
def test_every_method_under_every_name(tmp_path, method, name):
    with pytest.raises(engine.ModelFileError, match="uncompressed; got m/data.pkl of 1048576"):
        engine.load_model(bomb(tmp_path / name, 1 << 20, method))


def test_what_torch_saves_is_stored(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "m.pth")
    with pytest.raises(engine.ModelFileError, match="patch_embedding"):
        engine.load_model(tmp_path / "m.pth")


DOCUMENTS = """pipeline.json vae/config.json text_encoder/config.json transformer/config.json
tokenizer/tokenizer.json transformer/sha256.json vae/sha256.json model_index.json""".split()


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/proc/self/mem"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_is_no_file_is_not_read(tmp_path, name, kind):
    folder = shutil.copytree(EMBEDDED, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(kind)
    with pytest.raises(engine.ModelFileError, match=name.split("/")[0]):
        engine.Pipeline.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_more_tensors_than_any_model_has(tmp_path, name):
    many = {f"t{i}": torch.zeros(0) for i in range(MOST_TENSORS + 1)}
    (save_file if name.endswith("s") else torch.save)(many, tmp_path / name)
    with pytest.raises(engine.ModelFileError, match=f"{name}: must hold at most 16384 tensors"):
        engine.load_model(tmp_path / name)


@pytest.mark.parametrize("length", [10, 1400, 10**7])
def test_a_message_is_a_line_with_its_rule_and_its_next_step(tmp_path, length):
    folder = shutil.copytree(EMBEDDED, tmp_path / "m")
    said = json.loads((folder / "pipeline.json").read_text()) | {"latent_space": "x" * length}
    (folder / "pipeline.json").write_text(json.dumps(said))
    with pytest.raises(engine.ModelFileError) as caught:
        engine.Pipeline.from_pretrained(folder, "cpu")
    text = str(caught.value)
    assert "pipeline.json must be a pipeline configuration" in text and len(text) <= 1510
    assert ("x" * length in text) == (length == 10)

    error = engine.UsageError("the rule; got " + "x" * length + ". The next step.")
    assert str(error).startswith("the rule; got x") and str(error).endswith("x. The next step.")


@pytest.fixture(scope="module")
def pipe():
    return engine.Pipeline.from_pretrained(EMBEDDED, "cpu")


@pytest.mark.parametrize(
    "choice, most",
    [
        ({"num_inference_steps": 10**9}, STEPS.high),
        ({"num_inference_steps": STEPS.high + 1}, STEPS.high),
        ({"text_steps": 10**26, "mode": "t2vt"}, STEPS.high),
        ({"text_rows": 10**26, "mode": "t2vt"}, MOST_ROWS),
        ({"text_rows": MOST_ROWS + 1}, MOST_ROWS),
        ({"prompt": "a" * 100_001}, 100_000),
        ({"negative_prompt": "red " * 25_001}, 100_000),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_what_a_call_may_ask(pipe, choice, most):
    with pytest.raises(engine.UsageError, match=f"must (be|have) (at most|between . and) {most}"):
        pipe.generate(**{"prompt": "a red circle", "progress": False} | choice)


def test_a_caption_has_the_same_limits(pipe):
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    for choice in ({"num_inference_steps": STEPS.high + 1}, {"text_rows": MOST_ROWS + 1}):
        with pytest.raises(engine.UsageError, match="must be between"):
            pipe.caption(clip, progress=False, **choice)


@pytest.mark.parametrize("flags", ["--num-inference-steps 1000000000", f"--text-rows {10**26}"])
def test_the_command_line_has_them(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--prompt", "x", "--mode", "t2vt", "--quiet", *flags.split()]
    assert main(command) == 2
    assert "must be between" in capsys.readouterr().err and os.listdir(tmp_path) == []
