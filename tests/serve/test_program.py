"""How the server's process starts: flags, keys, folders and models."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving import environment

from engine.cli.serve import Serve
from engine.config import EMBEDDED
from engine.errors import UsageError
from engine.serve import Settings, serve
from engine.serve.guard import read_key
from engine.serve.loading import ModelSource

SOURCE = ModelSource(name="tiny", path=str(EMBEDDED))


@pytest.mark.parametrize("name", Settings.RANGES)
def test_a_setting_out_of_its_range_names_its_flag(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"serve: {flag} must be .*; got -1"):
        Settings(**{name: -1})


def test_settings_pass_through_json():
    settings = Settings(data=Path("d"), allow_folder=(Path("a"), Path("b")), api_key_file=Path("k"))
    assert Settings.of_plain(settings.plain()) == settings
    assert Serve().settings == Settings()


def test_others_are_let_in_by_a_key_alone(tmp_path):
    with pytest.raises(UsageError, match="--api-key-file must be given"):
        serve(Settings(host="0.0.0.0", data=tmp_path / "data"), SOURCE)
    assert not (tmp_path / "data").exists()


def test_a_key_file_has_a_key(tmp_path):
    file = tmp_path / "key"
    file.write_text("\n\n")
    with pytest.raises(UsageError, match="must hold a key in its first line"):
        read_key(Settings(api_key_file=file))
    file.write_text("  first  \nsecond\n")
    assert read_key(Settings(api_key_file=file)) == "first"


def test_a_folder_has_one_server(server):
    with pytest.raises(UsageError, match="--data"):
        serve(Settings(data=server.data), SOURCE)
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("said", ["style", "=a", "../a=b", "a b=c"])
def test_an_adapter_has_a_name_and_a_path(said):
    with pytest.raises(UsageError, match="--lora must be NAME=PATH"):
        Serve(lora=(said,)).adapters()


def test_an_adapter_is_named_once():
    with pytest.raises(UsageError, match="once; got a twice"):
        Serve(lora=("a=b", "a=c")).adapters()
    assert Serve(lora=("a=/b", "c.d-e=/f")).adapters() == {"a": "/b", "c.d-e": "/f"}


def test_a_model_that_does_not_load_ends_the_server(tmp_path):
    """With the exit code of the same fault in `univigu generate`."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in EMBEDDED.rglob("*"):
        if path.is_file() and "transformer" not in path.parts:
            copy = folder / path.relative_to(EMBEDDED)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--model-path", str(folder)]
    command += ["--data", str(tmp_path / "data")]
    how = {"capture_output": True, "text": True, "timeout": 180, "env": environment()}
    ended = subprocess.run(command, **how)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert ended.stderr.splitlines()[-1].startswith(f"univigu: {folder}: a model folder must hold")
