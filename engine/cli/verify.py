"""The command that compares files with their hashes. See `engine.cli.commands`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from engine.errors import ModelFileError, UsageError


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare every byte of a model with the SHA-256 that were written with it."""

    folder: Positional[Path]
    """A model, a pipeline, an adapter, a run's checkpoints, one file of a model, a latent shard, or
    a model's id in Hugging Face's cache."""
    write: bool = False
    """Read the files and write sha256.json beside them, for later checks to compare with."""

    def run(self) -> None:
        from engine.files.hashes import parts_of, write_manifest
        from engine.files.manifest import NAME
        from engine.weights.checkpoints import is_checkpoint
        from engine.weights.files import find_model

        path = find_model(self.folder)
        if is_checkpoint(path) or path.is_file():
            if self.write:
                raise UsageError(
                    f"verify: --write must go with the folder of a model; got {path}. Leave it "
                    "out: a checkpoint has hashes of its own, and a file's are in its folder."
                )
            self.compare([path])
            return

        parts = parts_of(path)
        if not parts:
            raise ModelFileError(f"verify: {path} must hold files of a model; got none.")
        if not self.write:
            checkpoints = [path / "checkpoint"] if is_checkpoint(path / "checkpoint") else []
            self.compare(parts + checkpoints)
            return
        for part in parts:
            print(f"{part / NAME}: {len(write_manifest(part).files)} files")

    def compare(self, parts: list[Path]) -> None:
        """Prints what is wrong, a line for each file. Errors: ModelFileError where anything is."""
        from engine.data import verify_shard
        from engine.files.hashes import faults
        from engine.weights.checkpoints import damage, is_checkpoint, steps

        found, notices = [], []
        for part in parts:
            if is_checkpoint(part):
                found += filter(None, map(damage, steps(part).values() or [part]))
            elif is_shard(part):
                if not verify_shard(part):
                    notices.append(f"{part}: no hash of its data; it was made without one.")
            else:
                found += faults(part, notices.append)

        for notice in notices:
            print(notice, file=sys.stderr)
        for fault in found:
            print(fault)
        if found:
            raise ModelFileError(
                f"verify: {self.folder} must be as it was written; got {len(found)} faults, which "
                "the lines above name."
            )
        if len(notices) < len(parts):
            print(f"{self.folder}: every file is as it was written")


def is_shard(path: Path) -> bool:
    """Whether a file's metadata are those of a latent shard. Errors: ModelFileError for a
    safetensors file that cannot be read and has no manifest beside it to say more."""
    from engine.files.manifest import read_manifest
    from engine.files.tensors import read_safetensors

    if not path.is_file() or path.suffix != ".safetensors" or read_manifest(path.parent):
        return False
    return "info" in read_safetensors(path)[1]
