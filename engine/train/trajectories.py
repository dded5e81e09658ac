"""What a teacher did, written ahead of stage distill: its latents where the student steps, and its
captions.

    <folder>/trajectories.json                             whose they are, and of which settings
             sha256.json                                   hashes of that
             steps-00000000/trajectories.safetensors       of training steps 0, 1, ...
                            sha256.json                    hashes of it, and of each sample in it
             steps-00000028/...

A folder of steps is written aside and gets its name when it is on the disk, so one that is there is
whole. What is in it depends on the settings and its place alone: a run that goes on after a kill
ends with the bytes of an undisturbed one.

Legend: B samples, K steps of the student, T text rows.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.lock import locked
from engine.config import ModelConfig, TrainConfig, read_fields
from engine.data import LatentSet, stream
from engine.errors import ModelFileError, UsageError
from engine.files.hashes import save_manifest, write_manifest
from engine.files.manifest import Manifest, hash_groups, read_manifest
from engine.files.reading import about, read_json
from engine.files.tensors import digest_of, entries_of, file_chunks, read_safetensors
from engine.files.writing import publish, replacing, save_errors, sync, write_hashed

FORMAT = {"format": "univigu-trajectories", "format_version": 1}
RECORD, TENSORS, UNFINISHED = "trajectories.json", "trajectories.safetensors", ".writing"
DECIDING = (  # settings that a training must share with what was written for it
    "seed",
    "batch_size",
    "student_steps",
    "teacher_steps",
    "guidance_scale",
    "flow_shift",
    "t2v_share",
    "v2t_share",
)
BYTES, MOST_SAMPLES = 2**26, 2**12  # of a folder of steps, which has one step at least


class Taught(NamedTuple):
    """What a teacher did with some samples.

    path: fp32 [B,K+1,16,F,Y,X], its latents where the student's steps begin and end.
    told: int64 [B,T], what it says of the clips that it ended with.
    """

    path: Tensor
    told: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> "Taught":
        """Takes them from a batch. Errors: UsageError where they are not in it."""
        missing = [name for name in cls._fields if name not in batch]
        if missing:
            raise UsageError(
                "train: a batch must hold path and told where the teacher's trajectories were "
                f"written ahead; got no {missing[0]}. Add those of `Trajectories.batch(step)`."
            )
        return cls(*(batch[name] for name in cls._fields))


def place_of(folder: Path, step: int, length: int) -> Path:
    """The folder that holds a training step, where each has `length` of them."""
    return folder / f"steps-{step // length * length:08d}"


def name_of(step: int, sample: int, what: str) -> str:
    """The name of a tensor; those of one sample are a group of their own in sha256.json."""
    return f"step-{step:08d}.{sample:05d}.{what}"


class Trajectories:
    """Trajectories of a folder. Every sample is compared with its hash when it is read.

    cfg: of the teacher.
    fingerprint: of the teacher, as `engine.train.lora.fingerprint` makes it.
    data: the `LatentSet.identity` that they start from.
    steps: how many training steps they are for.

    Errors: ModelFileError for a folder that is not as it was written, or not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        record = read_record(self.folder / RECORD)
        with about(self.folder / RECORD):
            self.cfg = read_fields(ModelConfig, record["model"])
        self.settings, self.data = record["settings"], record["data"]
        self.steps, self.length = record["steps"], record["length"]
        self.fingerprint = record["teacher"]

        for step in range(0, self.steps, self.length):
            if not place_of(self.folder, step, self.length).is_dir():
                raise ModelFileError(
                    f"{self.folder}: must hold all {self.steps} training steps; got none from step "
                    f"{step} on. Give the command that writes them again, to go on."
                )
        self._opened = lru_cache(2)(self._open)

    def check(self, config: TrainConfig) -> None:
        """Errors: UsageError for a training that would have had other runs, or asks the teacher of
        more than it did."""
        if config.matching:
            raise UsageError(
                "train: matching must be 0 with trajectories, for it asks a teacher of the "
                f"student's clips; got {config.matching:g}. Give --teacher instead."
            )

        ours = deciding(config)
        for name in DECIDING:
            if ours[name] != self.settings[name]:
                raise UsageError(
                    f"train: {name} must be that of {self.folder}, {self.settings[name]}; got "
                    f"{ours[name]}. Give that, or write trajectories for this one."
                )
        if config.steps > self.steps:
            raise UsageError(
                f"train: steps must be at most the {self.steps} of {self.folder}; got "
                f"{config.steps}. Lower --steps, or write more."
            )

    def check_data(self, data: LatentSet) -> None:
        """Errors: UsageError for data that they do not start from."""
        if data.identity != self.data:
            raise UsageError(
                f"train: data must be those of {self.folder}, {self.data}; got {data.identity}. "
                "Give the same --data, in the same order."
            )

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
        """A rank's share of a training step, on the CPU: what goes with the batch of its data, see
        `Taught`. Errors: ModelFileError for bytes that are not those of their hash."""
        count = self.settings["batch_size"] // ranks
        samples = range(rank * count, (rank + 1) * count)
        read = [self._read(step, sample) for sample in samples]
        return {name: torch.stack([one[name] for one in read]) for name in Taught._fields}

    def _read(self, step: int, sample: int) -> dict[str, Tensor]:
        place = place_of(self.folder, step, self.length)
        entries, manifest = self._opened(place)
        names = {what: name_of(step, sample, what) for what in Taught._fields}
        held = {name: entries[name] for name in names.values() if name in entries}

        found = hash_groups((name, digest_of(entry)) for name, entry in held.items())
        if len(held) < len(names) or not found.items() <= manifest.groups.items():
            raise ModelFileError(
                f"{place / TENSORS}: sample {sample} of step {step} must have the SHA-256 that "
                "sha256.json says; got another. Remove the folder, and write it again."
            )
        return {what: held[name].read() for what, name in names.items()}

    def _open(self, place: Path) -> tuple[dict, Manifest]:
        manifest = read_manifest(place)
        if manifest is None:
            raise ModelFileError(f"{place}: must hold sha256.json; got none. Write it again.")
        return read_safetensors(place / TENSORS)[0], manifest


def read_record(path: Path) -> dict:
    """What trajectories.json says. Errors: ModelFileError."""
    record = read_json(path)
    numbers = [record.get("steps"), record.get("length")]
    words = [record.get("data"), record.get("teacher")]
    settings, model = record.get("settings"), record.get("model")

    whole = record.items() >= FORMAT.items() and isinstance(model, dict)
    whole = whole and all(type(number) is int and number > 0 for number in numbers)
    whole = whole and all(isinstance(word, str) for word in words)
    if not whole or not isinstance(settings, dict) or settings.keys() != {*DECIDING}:
        raise ModelFileError(
            f"{path}: must be as univigu trajectories wrote it; got something else. Write it again."
        )
    return record


def deciding(config: TrainConfig) -> dict:
    """The settings that decide what a teacher does, as plain JSON."""
    return json.loads(json.dumps({name: getattr(config, name) for name in DECIDING}))


def write(
    lead: Callable[[dict[str, Tensor], int], Taught],
    record: dict,
    data: LatentSet,
    config: TrainConfig,
    folder: Path,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> None:
    """Writes what is not there yet of the trajectories for all of `config.steps`.

    lead: of the batch of a training step and its number, what the teacher does.
    record: what else tells these trajectories from others; plain JSON.

    Errors: UsageError for a folder of other settings, or one that another process writes to;
    ModelFileError where nothing can be written.
    """
    length = length_of(config, data)
    own = {"settings": deciding(config), "steps": config.steps, "length": length}
    with save_errors(folder):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    with locked(folder):
        begin(folder, FORMAT | own | record)
        starts = range(0, config.steps, length)
        wanted = [first for first in starts if not place_of(folder, first, length).is_dir()]
        steps = [n for first in wanted for n in range(first, min(first + length, config.steps))]

        coming = stream(data, steps, config.batch_size, config.seed)
        with closing(coming):
            held: dict[str, Tensor] = {}
            for step, (_, batch) in zip(progress(steps), coming, strict=True):
                for what, rows in zip(Taught._fields, lead(batch, step), strict=True):
                    held |= {name_of(step, n, what): x for n, x in enumerate(rows.cpu())}
                if (step + 1) % length == 0 or step + 1 == config.steps:
                    save(place_of(folder, step, length), held)
                    held = {}


def length_of(config: TrainConfig, data: LatentSet) -> int:
    """How many training steps are in a folder."""
    sample = 4 * (max(config.student_steps) + 1) * torch.Size(data.largest[0]).numel()
    most = min(BYTES // (sample * config.batch_size), MOST_SAMPLES // config.batch_size)
    return max(1, min(most, config.steps))


def begin(folder: Path, record: dict) -> None:
    """Writes the record, or compares the one that is there. Errors: UsageError."""
    for leftover in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover)
    path = folder / RECORD
    if path.exists():
        found, ours = read_json(path), json.loads(json.dumps(record))
        names = [name for name in ours | found if found.get(name) != ours.get(name)]
        if names:
            raise UsageError(
                f"{folder}: must be a new folder, or one of the same {', '.join(names)}; got "
                f"another. Give those of {RECORD}, or choose another --output-path."
            )
    else:
        with save_errors(path), replacing(path) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    if read_manifest(folder) is None:
        write_manifest(folder)


def save(place: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a folder of steps, whole or not at all. Errors: ModelFileError."""
    fresh, digests = place.with_name(place.name + UNFINISHED), {}
    with save_errors(place):
        fresh.mkdir()
        entry = write_hashed(fresh / TENSORS, file_chunks(entries_of(tensors), digests=digests))
        save_manifest(Manifest({TENSORS: entry}, hash_groups(digests.items())), fresh)
        publish(fresh, place)
