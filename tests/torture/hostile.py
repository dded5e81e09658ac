"""Hostile files: what an attacker would send in place of a file of every kind that is read.

None may run code, read outside of its folder, take more than a trial's time and memory, or raise
anything but an engine's error.
"""

import json
import os
import random
import shutil
import socket
from functools import partial
from pathlib import Path

from corruptions import bare_copy
from hostile_documents import DOCUMENTS, VALUES, document
from hostile_videos import video
from hostile_weights import WEIGHTS, bomb, pickled, safetensors
from subjects import Subject
from trial import MARKER, Trial, attempt

from engine.cli import main

MAY_BE_ABSENT = (
    "pipeline.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "adapter_config.json",
    "tokenizer/tokenizer_config.json",
    "step-00000002/manifest.json",  # an earlier checkpoint is read
    "step-00000002/state.json",
)
DEVICES = "/dev/zero", "/dev/random", "/dev/full", "/proc/self/mem", "/proc/kmsg", "/dev/stdin"


def special(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """No file where a file should be."""
    places = [*WEIGHTS.items(), ("video", ""), ("torch file", "m.pth")]
    places += [(name, file) for name, files in DOCUMENTS.items() for file in files]
    name, inner = dice.choice(places)
    subject = subjects[name]
    path = bare_copy(subject, folder)
    file = path / inner if inner else path
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)

    kind = dice.choice(["pipe", "folder", "socket", "loop", "dangling", *DEVICES])
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(file.parent)  # its address holds 107 bytes
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(file.name)
        os.chdir(here)
    else:
        target = {"loop": file.name, "dangling": folder / "nowhere"}.get(kind, kind)
        file.symlink_to(target)
    what = f"no file: {kind} for {inner or name}"
    return Trial(what, partial(subject.load, path), refuse=inner not in MAY_BE_ABSENT)


def outside(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """An index that names a whole file elsewhere, in every spelling."""
    name = dice.choice(["our folder in shards", "diffusers folder"])
    subject = subjects[name]
    (folder / "in").mkdir()
    path = bare_copy(subject, folder / "in")
    index = next(path.glob("*.index.json"))
    said = json.loads(index.read_text())
    file = dice.choice(sorted(set(said["weight_map"].values())))
    shutil.move(path / file, folder / file)
    (folder / "in" / file).write_bytes((folder / file).read_bytes())

    spelling = dice.choice(
        [
            f"../{file}",
            f"../../{file}",
            str(folder / file),
            f"file://{folder / file}",
            f"./../{file}",
            f"x/../../{file}",
            f"..\\{file}",
            f"../{file}\0",
            f"\uff0e\uff0e/{file}",
            f"../{file}\n",
            f"~/{file}",
            f"$PWD/../{file}",
            f"//localhost{folder / file}",
            "/dev/zero",
            "/proc/self/mem",
            "",
            ".",
            "..",
        ]
    )
    renamed = {k: spelling if v == file else v for k, v in said["weight_map"].items()}
    index.unlink()
    index.write_text(json.dumps(said | {"weight_map": renamed}))
    return Trial(f"outside: {spelling[-40:]!r}, {name}", partial(subject.load, path))


def code(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """A folder that asks for its own code to be run, or for libraries to fetch some."""
    subject = subjects["pipeline folder"]
    path = bare_copy(subject, folder)
    part = dice.choice(["tokenizer", "vae", "text_encoder", "transformer"])
    name = "tokenizer_config.json" if part == "tokenizer" else "config.json"
    file = path / part / name
    said = json.loads(file.read_text())
    wish = dice.choice(
        [
            {"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}},
            {"auto_map": {"AutoConfig": "someone/repository--evil.Evil"}},
            {"attn_implementation": "someone/kernel:attention"},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            {"custom_pipeline": "evil", "trust_remote_code": True},
            {"tokenizer_class": "evil.Evil", "chat_template": "{{ ''.__class__.__mro__ }}"},
            {"_class_name": ["evil", "Evil"], "_module": "evil"},
            {"architectures": ["evil.Evil"], "_name_or_path": "http://127.0.0.1:9/evil"},
        ]
    )

    file.unlink()
    file.write_text(json.dumps(said | wish))
    for place in (path, path / part):
        for module in ("evil.py", "__init__.py", "modeling_evil.py", "sitecustomize.py"):
            (place / module).write_text(f"open({str(folder / MARKER)!r}, 'w').close()\n")
    what = f"code: {next(iter(wish))} in {part}"
    return Trial(what, partial(subject.load, path), refuse=False)


def preprocessed(model: Path, manifest: Path, target: Path) -> str:
    """The command's exit code; an internal error is raised."""
    line = ["preprocess", "--model-path", model, "--manifest", manifest, "--quiet"]
    code = main([str(token) for token in [*line, "--output-path", target, "--max-bad", "1"]])
    if code == 1:
        raise RuntimeError("preprocess ended with an internal error")
    return str(code)


def manifest(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """Lines of data that point elsewhere or are none."""
    shutil.copy(subjects["video"].path, folder / "video.mp4")
    os.mkfifo(folder / "pipe")
    good = {"video": "video.mp4", "prompt": "a red circle", "caption": "a red circle"}
    what, value = dice.choice(VALUES)
    key = dice.choice(["video", "prompt", "caption", "start", "end"])
    lines = [json.dumps({k: v for k, v in good.items() if k != key})[:-1]]
    lines[0] += f", {json.dumps(key)}: {value}}}"
    if dice.random() < 0.4:
        what = dice.choice(
            ["/dev/zero", "pipe", "http://127.0.0.1:9/x.mp4", "/proc/self/mem", ".."]
        )
        lines, key = [json.dumps(good | {"video": what})], "video"
    file = folder / "manifest.jsonl"
    file.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    call = partial(preprocessed, subjects["pipeline folder"].path, file, folder / "out.safetensors")
    return Trial(f"manifest: {key} is {what}", call, refuse=False)


MAKERS = {
    "torch files with code": pickled,
    "safetensors that lie": safetensors,
    "zip bombs": bomb,
    "pipes, devices, links": special,
    "indexes that point outside": outside,
    "JSON documents": document,
    "requests to run code": code,
    "videos": video,
    "manifests": manifest,
}
SHARES = (3, 4, 1, 3, 2, 6, 1, 4, 1)  # of the trials


def judge(trial: Trial, folder: Path, scratch: Path) -> tuple[str, str]:
    """(verdict, what was wrong)."""
    outcome = attempt(trial.call, scratch)
    if (folder / MARKER).exists() or (scratch / MARKER).exists() or Path(MARKER).exists():
        return "fault", "its code was run"
    if outcome.fault:
        return "fault", outcome.fault
    if outcome.error is not None:
        wide = "\n" in outcome.error or len(outcome.error) > 2000
        return ("refused", "") if not wide else ("fault", f"no one line: {outcome.error[:300]}")
    return ("fault", "it loaded") if trial.refuse else ("loaded, without harm", "")


def run(subjects: dict[str, Subject], count: int, seed: int, root: Path, say) -> dict:
    """`count` hostile files."""
    order = [name for name, share in zip(MAKERS, SHARES, strict=True) for _ in range(share)]
    kinds, faults = {}, []
    for number in range(count):
        dice = random.Random(f"hostile {seed} {number}")
        name, folder = order[number % len(order)], root / f"hostile-{number}"
        folder.mkdir()
        trial = MAKERS[name](dice, subjects, folder)
        verdict, wrong = judge(trial, folder, root)
        counts = kinds.setdefault(name, {})
        counts[verdict] = counts.get(verdict, 0) + 1
        if wrong:
            faults.append({"number": number, "what": trial.what, "wrong": wrong})
            say(f"hostile {faults[-1]}")
        shutil.rmtree(folder)
    return {"trials": count, "by kind": kinds, "faults": faults}
