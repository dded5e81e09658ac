"""A pipeline folder from anywhere: what is missing, spare, damaged or outside is refused by name,
and nothing in it runs, asks or reaches the network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import Pipeline
from engine.config import EMBEDDED
from engine.errors import ModelFileError

WEIGHTS = {
    "vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.up_blocks.1.resnets.1.conv1.bias"),
    "text_encoder": ("text_encoder/model.safetensors", "encoder.final_layer_norm.weight"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(
        EMBEDDED, tmp_path / "m", ignore=shutil.ignore_patterns("transformer", "sha256.json")
    )


FAULTS = {  # what is done to the tensors (t) under a key (k) -> what is said
    "missing": (lambda t, k: t.pop(k), "got no {key} .1 missing, 0 unexpected"),
    "unexpected": (
        lambda t, k: t.update(spare=t[k].clone()),
        "got spare besides .0 missing",
    ),
    "of another shape": (lambda t, k: t.update({k: t[k][:3].clone()}), "{key} .* must be floats"),
    "integers": (lambda t, k: t.update({k: t[k].int()}), "{key} .* got torch.int32"),
    "none of the model": (lambda t, k: (t.clear(), t.update(nothing=torch.zeros(1))), "got no "),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_are_those_of_the_configuration(folder, part, fault):
    change, said = FAULTS[fault]
    name, key = WEIGHTS[part]
    tensors = load_file(folder / name)
    change(tensors, key)
    save_file(tensors, folder / name)
    with pytest.raises(ModelFileError, match=f"^{part}: .*{said.format(key=key)}"):
        Pipeline.without_model(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_files_that_are_cut_or_no_safetensors(folder, part):
    path = folder / WEIGHTS[part][0]
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\x80\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=f"^{part}: .*must be complete and readable"):
            Pipeline.without_model(folder)
    path.unlink()
    torch.save({}, path.with_name("pytorch_model.bin"))
    with pytest.raises(ModelFileError, match=f"^{part}: .* got neither"):
        Pipeline.without_model(folder)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("content", ["", "{bad", "[]", "{}", "[" * 100_000])
def test_configurations_that_are_none(folder, part, content):
    (folder / part / "config.json").write_text(content)
    with pytest.raises(ModelFileError, match=part):
        Pipeline.without_model(folder)


def sharded(folder: Path, part: str) -> tuple[Path, dict[str, str]]:
    """Splits the part's file into two shards -> (index, weight map), the index not yet written."""
    path = folder / WEIGHTS[part][0]
    tensors = load_file(path)
    path.unlink()
    names = [path.with_name(f"{path.stem}-0000{i}-of-00002.safetensors") for i in (1, 2)]
    halves = list(tensors)[::2], list(tensors)[1::2]
    for name, keys in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in keys}, name)
    places = {key: n.name for n, keys in zip(names, halves, strict=True) for key in keys}
    return path.with_name(f"{path.name}.index.json"), places


@pytest.mark.parametrize("part", WEIGHTS)
def test_shards_are_one_file_in_pieces(folder, part):
    plain = Pipeline.without_model(folder)
    index, places = sharded(folder, part)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    loaded = Pipeline.without_model(folder)
    for a, b in ((plain.vae, loaded.vae), (plain.text.encoder, loaded.text.encoder)):
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("part", WEIGHTS)
def test_an_index_names_files_beside_it_and_what_they_hold(folder, tmp_path, part):
    index, places = sharded(folder, part)
    first = next(iter(places))
    shutil.copy(index.parent / places[first], tmp_path / "outside.safetensors")
    wrong = {
        "got '../../outside.safetensors'": places | {first: "../../outside.safetensors"},
        "got '/": places | {first: str(tmp_path / "outside.safetensors")},
        f"unexpected: {first}": {k: v for k, v in places.items() if k != first},
        "got no absent.safetensors": places | {first: "absent.safetensors"},
        "weight_map must map": [1],
    }
    for said, weight_map in wrong.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelFileError, match=f"^{part}: .*{said}"):
            Pipeline.without_model(folder)


def test_two_names_of_one_table_must_agree(folder):
    name, _ = WEIGHTS["text_encoder"]
    tensors = load_file(folder / name)
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
    save_file(both, folder / name)
    Pipeline.without_model(folder)
    both["encoder.embed_tokens.weight"][0, 0] += 1
    save_file(both, folder / name)
    with pytest.raises(ModelFileError, match="embed_tokens.weight .* must equal shared.weight"):
        Pipeline.without_model(folder)


def test_a_loaded_model_is_not_the_file(folder):
    """It may be written again while the model runs."""
    pipe = Pipeline.without_model(folder)
    before = [p.clone() for p in pipe.vae.parameters()]
    path = folder / WEIGHTS["vae"][0]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x00" * 1000)
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.vae.parameters(), strict=True))


EVIL = """
import sys
from pathlib import Path

folder, seen = Path(sys.argv[1]), []


def hook(event, arguments):
    name = str(arguments[0]) if arguments else ""
    if event.startswith(("socket.", "subprocess.", "os.system", "os.fork", "os.exec")):
        seen.append((event, name))
    if event == "import" and name.startswith(("evil", "transformers", "diffusers")):
        seen.append((event, name))
    if event in ("open", "exec", "compile") and name.endswith(".py") and str(folder) in name:
        seen.append((event, name))


from engine import Pipeline

pipe = Pipeline.from_pretrained(folder, "cpu")  # torch and its parts are imported by now
pipe.generate("a red circle", num_inference_steps=1, progress=False)
sys.addaudithook(hook)
pipe = Pipeline.from_pretrained(folder, "cpu")
pipe.generate("a red circle", num_inference_steps=1, progress=False)
print(seen, [name for name in ("transformers", "diffusers", "evil") if name in sys.modules])
"""


def test_a_tokenizer_folder_runs_no_code_and_asks_nothing(tmp_path):
    """auto_map and a module beside it, with a terminal's yes waiting on stdin."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "m")
    config = folder / "tokenizer" / "tokenizer_config.json"
    evil = {"AutoTokenizer": ["evil.EvilTok", "evil.EvilTok"]}
    changed = json.loads(config.read_text()) | {"tokenizer_class": "EvilTok", "auto_map": evil}
    config.write_text(json.dumps(changed))
    (folder / "tokenizer" / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    for part in ("vae", "text_encoder"):
        file = folder / part / "config.json"
        auto = {"auto_map": {"AutoModel": "evil.Evil"}}
        file.write_text(json.dumps(json.loads(file.read_text()) | auto))
        shutil.copy(folder / "tokenizer" / "evil.py", folder / part / "evil.py")

    done = subprocess.run(
        [sys.executable, "-c", EVIL, str(folder)],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] []\n" and not (tmp_path / "RAN").exists()
