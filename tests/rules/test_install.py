"""What a user gets: the wheel's contents, imports that cost nothing, help that answers at once."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import engine

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "triton")
VERBS = (
    "demo",
    "generate",
    "caption",
    "train",
    "preprocess",
    "convert",
    "evaluate",
    "profile",
    "env",
)
NOUNS = {"ModelConfig", "UniViGU", "Pipeline", "TrainState", "TrainConfig"}
NOUNS |= {"Batch", "LatentSet", "World"}
ERRORS = {"UsageError", "MissingPackage", "ModelFileError", "NonFinite"}
FUNCTIONS = {"load_model", "save_pretrained", "train_step", "fit", "explain"}
FUNCTIONS |= {"load_checkpoint", "save_checkpoint"}


def python(code: str, *args: str, cwd: Path = ROOT, path: str | None = None):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONPATH": path} if path else {}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, with no compiler on the PATH."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    skipped = (".*", "__pycache__", "build", "dist", "*.egg-info", "golden", "runs", "demo-out")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*skipped))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w"]
    env = os.environ | {"PATH": str(Path(sys.executable).parent)}
    env = {key: value for key, value in env.items() if key not in ("CC", "CXX", "CUDA_HOME")}
    result = subprocess.run([*command, out], cwd=source, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_and_nothing_else(wheel):
    assert wheel.name == f"univigu_engine-{engine.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    trees = [(ROOT / "engine", ROOT), (ROOT / "kernels" / "univigu_kernels", ROOT / "kernels")]
    wanted = {
        path.relative_to(base).as_posix()
        for folder, base in trees
        for path in folder.rglob("*")
        if path.suffix in (".py", ".safetensors", ".json", ".html")
    }
    assert names == wanted


def test_wheel_names_the_command_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (commands,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "univigu = engine.cli:program" in archive.read(commands).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


def test_wheel_imports_without_triton(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys
sys.modules["triton"] = None
import engine, univigu_kernels
from engine import UniViGU, explain
print(engine.__file__, univigu_kernels.__file__)
"""
    result = python(code, cwd=tmp_path, path=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert all(place.startswith(str(tmp_path)) for place in result.stdout.split())


def test_import_engine_is_light():
    code = f"import sys, engine; print([name for name in {HEAVY} if name in sys.modules])"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_light(verb):
    code = f"""
import sys
from engine.cli import main
sys.argv[0] = "univigu"
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print("loaded", [name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""
    result = python(code, *filter(None, [verb]), "--help")
    assert result.returncode == 0, result.stderr
    assert "usage: univigu" in result.stdout
    assert result.stdout.rstrip().endswith("loaded []")


def test_public_names():
    assert set(engine.__all__) == NOUNS | ERRORS | FUNCTIONS
    assert set(engine.__all__) <= set(dir(engine))
    with pytest.raises(AttributeError, match="nonsense"):
        engine.nonsense  # noqa: B018


@pytest.mark.parametrize("name", sorted(NOUNS | ERRORS | FUNCTIONS))
def test_public_name_loads(name):
    assert getattr(engine, name).__name__ == name


def test_no_clash_with_the_hub_package_called_kernels(tmp_path):
    """Ours must not be the `kernels` package that transformers takes names from.

    The stand-in offers what transformers asks for: classes, and decorators that change nothing.
    """
    if not (find_spec("diffusers") and find_spec("transformers")):
        pytest.skip("needs the extra `models`")
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package, info = tmp_path / "kernels", tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    (package / "layer").mkdir(parents=True)
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (info / "METADATA").write_text(metadata)
    (package / "__init__.py").write_text("""
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {})
    return lambda *args, **kwargs: lambda target: target
""")
    (package / "layer" / "__init__.py").touch()
    (package / "layer" / "mode.py").write_text("class Mode:\n    TRAINING = INFERENCE = 1\n")
    code = """
import kernels
from diffusers import WanPipeline
from transformers import UMT5EncoderModel
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(), kernels.__file__)
"""
    result = python(code, path=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", str(package / "__init__.py")]
