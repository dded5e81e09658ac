"""Deaths: commands that write are killed, ended or interrupted at random moments, or meet a limit
of the disk. What has a final name is whole, a signal leaves nothing half written, and the same
command, given again, ends with the same files."""

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from checkpoint_runs import make_shard
from subjects import CFG, Subject, of_model
from trial import attempt

from engine.checkpoint import commit
from engine.cli import main
from engine.weights.checkpoints import verify

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
PATIENCE = 120.0  # seconds that a command may take
UNFINISHED = ("*.partial", ".saving-*", "*.writing", "*.removing")


@dataclass
class Job:
    """A command.

    line: folder -> its arguments.
    whole: what a run that nothing happened to leaves, by name below its folder.
    before: puts into a new folder what was there already, which may stay as well.
    old: the files of `before`, by name.
    """

    line: Callable[[Path], list]
    before: Callable[[Path], None] = lambda folder: None
    whole: dict[str, bytes] = field(default_factory=dict)
    old: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0


def start(line: list, folder: Path, limit: int = 0) -> tuple[int, float]:
    """A child that runs the command; its process id, and when the command had begun.

    limit: bytes that a file may have.
    """
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        sink = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(sink, descriptor)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.write(begun, b".")
        os._exit(main([str(token) for token in line]))

    os.read(ready, 1)
    os.close(ready)
    os.close(begun)
    return child, time.monotonic()


def ended(child: int, seconds: float) -> int | None:
    """The exit code; None where the child goes on for longer."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def finish(child: int) -> int:
    code = ended(child, PATIENCE)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return -1 if code is None else code


def files_of(folder: Path) -> dict[str, bytes]:
    """What has a final name, but logs and locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(path.match(p) or p[1:] in name or ".saving-" in name for p in UNFINISHED)
        kept = path.suffix in (".mp4", ".json", ".srt", ".safetensors") and "checkpoint" not in name
        if path.is_file() and kept and not hidden:
            found[name] = path.read_bytes()
    return found


def parts(data: bytes) -> tuple[dict, bytes]:
    """The header and the numbers of a safetensors file; metadata comes in any order."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def same(name: str, ours: bytes, theirs: bytes) -> bool:
    """Equal bytes; of JSON, which holds times, equal keys."""
    try:
        if name.endswith(".safetensors"):
            return parts(ours) == parts(theirs)
        if name.endswith(".json"):
            return keys(json.loads(ours)) == keys(json.loads(theirs))
    except ValueError:
        return False
    return ours == theirs


def keys(value: object) -> object:
    """The keys of an object, at any depth, and the lengths of lists."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value] if isinstance(value, list) else None


def jobs(root: Path, subjects: dict[str, Subject]) -> dict[str, Job]:
    shard = root / "train.safetensors"
    make_shard(shard, width=CFG.text_dim)
    ours, video = subjects["our folder"].path, subjects["video"].path
    fp8, pipeline = subjects["fp8 folder"].path, subjects["pipeline folder"].path

    def train(folder: Path) -> list:
        line = ["train", "--data", shard, "--init-from", ours, "--quiet", "--steps", 20]
        line += ["--batch-size", 2, "--save-every", 2, "--output-path", folder / "run"]
        return line + ["--resume"] * bool(commit.steps(folder / "run" / "checkpoint"))

    def generate(folder: Path) -> list:
        line = ["generate", "--prompt", "a red circle", "--mode", "t2vt", "--quiet"]
        line += ["--num-frames", 5, "--height", 32, "--width", 32, "--num-inference-steps", 8]
        return [*line, "--output-path", folder / "out.mp4"]

    def caption(folder: Path) -> list:
        line = ["caption", "--video", video, "--num-inference-steps", 8, "--quiet"]
        return [*line, "--output-path", folder / "out.srt"]

    def convert(folder: Path) -> list:
        return ["convert", "--model-path", ours, "--output-path", folder / "m"]

    def preprocess(folder: Path) -> list:
        line = ["preprocess", "--model-path", pipeline, "--synthetic", 8, "--quiet"]
        return [*line, "--output-path", folder / "shard.safetensors"]

    def there(folder: Path) -> None:
        if main(["convert", "--model-path", str(fp8), "--output-path", str(folder / "m")]):
            raise RuntimeError("the model that is replaced could not be written")

    return {
        "train": Job(train),
        "generate": Job(generate),
        "caption": Job(caption),
        "convert": Job(convert),
        "convert over a model": Job(convert, there),
        "preprocess": Job(preprocess),
    }


def measure(job: Job, folder: Path) -> None:
    """A run that nothing happens to."""
    folder.mkdir()
    job.before(folder)
    job.old = files_of(folder)
    child, begun = start(job.line(folder), folder)
    code = finish(child)
    job.seconds = time.monotonic() - begun
    job.whole = files_of(folder)
    if code or not job.whole:
        raise RuntimeError(f"{folder.name} ended with {code}: {(folder / 'printed').read_text()}")


def left(job: Job, folder: Path, models: set[str], scratch: Path) -> str:
    """What is wrong with the files that an end at this moment left; "" for nothing."""
    for name, data in files_of(folder).items():
        known = [files[name] for files in (job.whole, job.old) if name in files]
        if not any(same(name, data, whole) for whole in known):
            return f"{name} is half written or another"
    for path in commit.steps(folder / "run" / "checkpoint").values():
        verify(path)  # an error of its own ends the run: it is what is to be shown
    if (folder / "m").is_dir() and any((folder / "m").iterdir()):
        outcome = attempt(partial(of_model, folder / "m"), scratch)
        if outcome.fault or outcome.value not in (None, *models):
            return f"the model loads as neither: {outcome}"
    return ""


def again(job: Job, folder: Path) -> str:
    """What is wrong after the command was given again."""
    child, _ = start(job.line(folder), folder)
    code = finish(child)
    if code:
        return f"given again it ended with {code}: {(folder / 'printed').read_text()}"
    found = files_of(folder)
    if found.keys() != job.whole.keys():
        return f"files are {sorted(found)}, not {sorted(job.whole)}"
    wrong = [name for name in found if not same(name, found[name], job.whole[name])]
    return f"{wrong[0]} is another than without the end" if wrong else ""


def kill(job: Job, folder: Path, dice: random.Random, models: set[str], scratch: Path):
    """(the signal, what was wrong), or None where the command was faster."""
    folder.mkdir()
    job.before(folder)
    number = dice.choice(SIGNALS)
    child, begun = start(job.line(folder), folder)
    code = ended(child, max(0.002, dice.uniform(0, job.seconds)))
    if code is not None:
        return None
    os.kill(child, number)
    code = finish(child)
    if code == 0:
        return None

    said = (folder / "printed").read_text()
    expected = -number if number == signal.SIGKILL else 128 + number
    if code != expected or "Traceback" in said:
        return number.name, f"ended with {code}, not {expected}: {said}"
    unfinished = [p.name for pattern in UNFINISHED for p in folder.rglob(pattern)]
    if number != signal.SIGKILL and unfinished and "run" not in os.listdir(folder):
        return number.name, f"left {unfinished}"
    wrong = left(job, folder, models, scratch) or again(job, folder)
    return number.name, wrong


def fill(job: Job, folder: Path, dice: random.Random, models: set[str], scratch: Path):
    """(what ends it, what was wrong), or None where all files were small enough."""
    folder.mkdir()
    job.before(folder)
    largest = max(map(len, job.whole.values()))
    limit = dice.randint(min(1024, largest // 2), largest)
    child, _ = start(job.line(folder), folder, limit)
    code = finish(child)
    said = (folder / "printed").read_text()
    if code == 0:
        return None
    if code not in (2, 4) or "Traceback" in said or not said.strip():
        return "full disk", f"at {limit} bytes it ended with {code}: {said}"
    unfinished = [p.name for pattern in UNFINISHED for p in folder.rglob(pattern)]
    if unfinished and "run" not in os.listdir(folder):
        return "full disk", f"left {unfinished}"
    return "full disk", left(job, folder, models, scratch) or again(job, folder)


ORDER = ("convert", "train", "generate", "train", "caption", "train", "preprocess")
ORDER += ("convert over a model",)


def run(act: Callable, subjects: dict, count: int, seed: int, root: Path, say) -> dict:
    """`count` ends, in turn over the commands. act: `kill` or `fill`."""
    known = jobs(root, subjects)
    needed = [name for name in known if name in ORDER[:count] or name == "convert"]
    for name in needed:
        measure(known[name], root / name.replace(" ", "-"))
    models = {of_model(root / "convert" / "m"), of_model(subjects["fp8 folder"].path)}

    by_command, by_end, faults, done, number = {}, {}, [], 0, 0
    while done < count:
        dice = random.Random(f"{act.__name__} {seed} {number}")
        name, folder = ORDER[done % len(ORDER)], root / f"{act.__name__}-{number}"
        number += 1
        found = act(known[name], folder, dice, models, root)
        shutil.rmtree(folder)
        if found is None:
            continue
        done += 1
        end, wrong = found
        by_command[name] = by_command.get(name, 0) + 1
        by_end[end] = by_end.get(end, 0) + 1
        if wrong:
            faults.append({"number": number - 1, "command": name, "end": end, "wrong": wrong})
            say(f"{act.__name__} {faults[-1]}")
    return {"trials": done, "by command": by_command, "by end": by_end, "faults": faults}


run_kills, run_full_disks = partial(run, kill), partial(run, fill)
