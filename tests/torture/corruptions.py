"""Corruptions: seeded damage to a copy of every kind of input. A damaged one is refused by an error
that names the file, or loads as the whole one does, or differs in a way that a hash finds. Half of
them are tried without the hashes, which are then asked where the load differs."""

import os
import random
import shutil
from functools import partial
from pathlib import Path

from subjects import Subject
from trial import attempt

PAGE = 4096


def flip(data: bytearray, dice: random.Random) -> bytearray:
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return data


def flip_in_header(data: bytearray, dice: random.Random) -> bytearray:
    data[dice.randrange(min(256, len(data)))] ^= 1 << dice.randrange(8)
    return data


def truncate(data: bytearray, dice: random.Random) -> bytearray:
    return data[: dice.randrange(len(data))]


def zero_page(data: bytearray, dice: random.Random) -> bytearray:
    begin = dice.randrange(0, len(data), PAGE)
    data[begin : begin + PAGE] = bytes(len(data[begin : begin + PAGE]))
    return data


def insert(data: bytearray, dice: random.Random) -> bytearray:
    place = dice.randint(0, len(data))
    data[place:place] = dice.randbytes(dice.randint(1, 16))
    return data


IN_PLACE = {
    "bits flipped": flip,
    "a bit of the header flipped": flip_in_header,
    "truncated": truncate,
    "a page zeroed": zero_page,
    "bytes inserted": insert,
}
AMONG_FILES = ("another file's content", "two files swapped", "a copy beside it", "missing")


def like(victim: Path, files: list[Path]) -> list[Path]:
    """The other files with the victim's suffix and another content."""
    same = [file for file in files if file.suffix == victim.suffix and file != victim]
    return [file for file in same if file.read_bytes() != victim.read_bytes()]


def write(path: Path, data: bytes) -> None:
    """In place of the link to the whole file."""
    path.unlink()
    path.write_bytes(data)


def damage(kind: str, victim: Path, files: list[Path], dice: random.Random) -> list[Path]:
    """Returns the files that are others now."""
    whole = victim.read_bytes()
    others = like(victim, files)
    if kind in IN_PLACE:
        damaged = IN_PLACE[kind](bytearray(whole), dice)
        write(victim, damaged)
        return [victim] if damaged != whole else []
    if kind == "missing":
        victim.unlink()
    elif kind == "a copy beside it":
        shutil.copy(victim, victim.with_name(f"copy-{victim.name}"))
    elif others:
        other = dice.choice(others)
        write(victim, other.read_bytes())
        if kind == "two files swapped":
            write(other, whole)
            return [victim, other]
    return [victim] if kind in ("missing", "a copy beside it") or others else []


def copied(subject: Subject, folder: Path) -> Path:
    """A copy whose files are links: those that are damaged are written in their place."""
    target = folder / subject.path.name
    if subject.path.is_dir():
        return shutil.copytree(subject.path, target, copy_function=os.link)
    os.link(subject.path, target)
    return target


def without_hashes(path: Path) -> dict[Path, bytes]:
    """Takes the manifests of hashes out of a folder, as others publish theirs; returns them."""
    found = {file: file.read_bytes() for file in path.rglob("sha256.json")}
    for file in found:
        file.unlink()
    return found


def bare_copy(subject: Subject, folder: Path) -> Path:
    """A copy without hashes, by which all that is changed would be known."""
    path = copied(subject, folder)
    without_hashes(path)
    return path


def names(error: str, victims: list[Path]) -> bool:
    """Whether the error is one line that names a file, its folder or the part that it is of."""
    return "\n" not in error and any(v.name in error or v.parent.name in error for v in victims)


def judge(
    subject: Subject, path: Path, victims: list, hashes: dict, wholes: list, folder: Path
) -> tuple[str, str]:
    """(verdict, what was wrong). hashes: manifests that were taken out, until they are asked."""
    outcome = attempt(partial(subject.load, path), folder)
    for file, content in hashes.items():
        file.write_bytes(content)
    if outcome.fault:
        return "fault", outcome.fault
    if outcome.error is not None:
        named = names(outcome.error, victims)
        return ("refused", "") if named else ("fault", f"names no file: {outcome.error}")
    if outcome.value in wholes:
        return "equal", ""
    if subject.verified is None:
        return "differs, and nothing holds its hash", ""

    checked = attempt(partial(subject.verified, path), folder)
    if checked.error is not None and names(checked.error, victims):
        return "found by its hash", ""
    return "fault", f"not found by its hash: {checked}"


def run(
    subjects: dict[str, Subject], count: int, seed: int, folder: Path, say, first: int = 0
) -> dict:
    """`count` corruptions in turn over the subjects, numbered from `first` on. Returns counts by
    subject and verdict, by kind of damage, and the faults, each with what makes it again."""
    wholes: dict[str, list] = {}
    for name, subject in subjects.items():
        for path in filter(None, (subject.path, subject.earlier)):
            outcome = attempt(partial(subject.load, path), folder)
            if outcome.value is None:
                raise RuntimeError(f"{name}: the whole one must load; got {outcome}")
            wholes.setdefault(name, []).append(outcome.value)

    verdicts, kinds, faults = {}, {}, []
    done, number = 0, first
    while done < count:
        dice = random.Random(f"corruption {seed} {number}")
        name = list(subjects)[number % len(subjects)]
        number += 1
        subject, trial = subjects[name], folder / f"trial-{number}"
        trial.mkdir()
        path = copied(subject, trial)
        files = subject.victims(path)
        victim, kind = dice.choice(files), dice.choice([*IN_PLACE, *AMONG_FILES])
        if victims := damage(kind, victim, files, dice):
            hashes = without_hashes(path) if dice.random() < 0.5 else {}
            verdict, wrong = judge(subject, path, victims, hashes, wholes[name], folder)
            counts = verdicts.setdefault(name, {})
            counts[verdict] = counts.get(verdict, 0) + 1
            kinds[kind] = kinds.get(kind, 0) + 1
            if wrong:
                made = {"number": number - 1, "subject": name, "file": victim.name, "kind": kind}
                faults.append(made | {"wrong": wrong})
                say(f"corruption {made}: {wrong}")
            done += 1
        shutil.rmtree(trial)
    return {"trials": done, "by subject": verdicts, "by kind": kinds, "faults": faults}
