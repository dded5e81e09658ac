"""The output of a bulk run: parts that a kill leaves whole, and the one file made of them.

Items are worked through in groups of `group_size`, and the rows of a group are written in numbered
parts, OUTPUT.parts/GROUP-NUMBER.jsonl; the name of its last ends in -last.jsonl. What the groups
are and which items a batch has depend on the input and the settings alone, so a run that goes on
after a kill computes what an undisturbed one would have.
"""

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from engine.bulk.items import Item
from engine.checkpoint.lock import locked
from engine.errors import ModelFileError, UsageError, require
from engine.files.manifest import NAME, read_manifest
from engine.files.reading import file_errors, read_json
from engine.files.writing import publish, replacing, save_errors, sync
from engine.media import write_sidecar

SETTINGS = "settings.json"
ROWS = 8  # batches of a group, where each file gives one clip
_PART = re.compile(r"(\d{6,})-(\d{6,})(-last)?\.jsonl")


def model_identity(paths: Iterable[str | Path]) -> str:
    """Sixteen hexadecimal digits that tell models and adapters apart, from the names of their files
    and the SHA-256 that a sha256.json has of each; of a file without one, from its size and time.

    paths: folders, of which the files count, or files.

    Errors: ModelFileError.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.parent
        manifest = read_manifest(folder)
        hashes = {} if manifest is None else manifest.files
        with file_errors(path):
            for file in sorted(folder.iterdir()) if path.is_dir() else [path]:
                if not file.is_file() or file.name == NAME or file.name[0] == ".":
                    continue
                stat, entry = file.stat(), hashes.get(file.name)
                said = entry["sha256"] if entry else f"{stat.st_size} {stat.st_mtime_ns}"
                digest.update(f"{file.name} {said}\n".encode())
    return digest.hexdigest()[:16]


class Output:
    """One output, and what is known of it so far.

    path: the file that all rows end in, .jsonl or .parquet.
    settings: what decides the rows, as plain JSON.
    columns: name and type of each of a row's values, "string", "double" or "int64".
    """

    def __init__(self, path: Path, settings: dict, columns: dict[str, str]):
        self.path, self.columns = path.absolute(), columns
        self.settings = json.loads(json.dumps(settings))
        self.folder = self.path.with_name(self.path.name + ".parts")
        self.sidecar = self.path.with_suffix(".json")

    @contextmanager
    def begun(self) -> Iterator[dict[str, int] | None]:
        """Hold the output for this run; yields the counts of `join` where all of it was there
        already, else None.

        Errors: UsageError where another run writes it, where its settings are others, and where
        the file is not one of these runs; MissingPackage for parquet.
        """
        if self.path.suffix == ".parquet":
            require("pyarrow.parquet", "ray", "pyarrow")
        counts = self._finished()
        if counts is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            yield counts
            return

        with save_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            sync(self.folder.parent)
        with locked(self.folder):
            place = self.folder / SETTINGS
            if place.exists():
                self._compare(read_json(place), self.folder)
            else:
                with save_errors(place), replacing(place) as partial:
                    partial.write_text(json.dumps(self.settings, indent=2) + "\n", "utf-8")
            yield None

    def _finished(self) -> dict[str, int] | None:
        if not self.path.exists():
            return None
        said = read_json(self.sidecar) if self.sidecar.exists() else {}
        if "bulk" in said:
            self._compare(said["bulk"], self.path)
            return {name: said[name] for name in ("rows", "errors")}
        if not (self.folder / SETTINGS).exists():
            raise UsageError(
                f"{self.path}: must be new or the output of a run like this one; got a file "
                "without its settings beside it. Choose another --output-path."
            )
        return None  # a kill came between the file and its sidecar

    def _compare(self, found: dict, place: Path) -> None:
        names = [n for n in found | self.settings if found.get(n) != self.settings.get(n)]
        if names:
            said = "; ".join(
                f"{name} was {found.get(name)!r:.60} and is {self.settings.get(name)!r:.60}"
                for name in names[:4]
            )
            raise UsageError(
                f"{place}: must have been written with the same settings; {said}. Give those, "
                f"or remove it, or choose another --output-path."
            )

    @cached_property
    def group_size(self) -> int:
        return ROWS * self.settings["batch_size"]

    def group_of(self, item: Item) -> int:
        return item.number // self.group_size

    def missing(self, items: list[Item]) -> list[list[Item]]:
        """The groups of which a part is not there."""
        done = self._whole_groups()
        starts = range(0, len(items), self.group_size)
        groups = (items[start : start + self.group_size] for start in starts)
        return [group for group in groups if self.group_of(group[0]) not in done]

    def _whole_groups(self) -> dict[int, int]:
        """The number of the last part of each group that has all its parts."""
        ends, held = {}, defaultdict(set)
        for path in self.folder.iterdir():
            if found := _PART.fullmatch(path.name):
                group, number = int(found[1]), int(found[2])
                held[group].add(number)
                if found[3]:
                    ends[group] = number
        return {group: end for group, end in ends.items() if held[group] >= set(range(end))}

    def part(self, group: int, number: int, last: bool) -> Path:
        return self.folder / f"{group:06d}-{number:06d}{'-last' * last}.jsonl"

    def read(self, part: Path) -> list[dict]:
        """The rows of a part that is there. Errors: ModelFileError."""
        try:
            with file_errors(part):
                return [json.loads(line) for line in part.read_bytes().splitlines()]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelFileError(
                f"{part}: must be as it was written; got {error}. Remove it and run again."
            ) from error

    def write(self, part: Path, rows: list[dict]) -> None:
        """Write a part, on the disk when this returns. Errors: ModelFileError."""
        with save_errors(part), replacing(part) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def join(self, items: list[Item]) -> dict[str, int]:
        """Write the rows of all parts into one file, in the order of the input, then its sidecar,
        and remove the parts; returns the counts of rows and errors. Errors: ModelFileError."""
        from engine.result import versions

        counts, joined = {"rows": 0, "errors": 0}, self.folder / "joined"
        with save_errors(self.path):
            with self._writer(joined) as write:
                for rows in self._groups(items):
                    counts["rows"] += len(rows)
                    counts["errors"] += sum(row["error"] is not None for row in rows)
                    write(rows)
            publish(joined, self.path)

        with save_errors(self.sidecar):
            write_sidecar(self.path, {"bulk": self.settings, **counts, "versions": versions()})
        shutil.rmtree(self.folder, ignore_errors=True)
        return counts

    def _groups(self, items: list[Item]) -> Iterator[list[dict]]:
        """The rows of each group in order, without their places."""
        ends = self._whole_groups()
        for group in range(-(-len(items) // self.group_size)):
            if group not in ends:
                raise ModelFileError(
                    f"{self.folder}: must hold the parts of group {group}; got none. With Ray on "
                    "several machines, --output-path must be on a file system that all share."
                )
            rows = []
            for number in range(ends[group] + 1):
                rows += self.read(self.part(group, number, number == ends[group]))
            rows.sort(key=lambda row: row.pop("at"))
            yield rows

    @contextmanager
    def _writer(self, path: Path) -> Iterator:
        """A function that appends rows to a file of this output's kind."""
        if self.path.suffix == ".jsonl":
            with path.open("w", encoding="utf-8") as file:
                yield lambda rows: file.writelines(
                    json.dumps(row, ensure_ascii=False) + "\n" for row in rows
                )
            return

        arrow = require("pyarrow", "ray")
        parquet = require("pyarrow.parquet", "ray", "pyarrow")
        kinds = {"string": arrow.string(), "double": arrow.float64(), "int64": arrow.int64()}
        schema = arrow.schema([(name, kinds[kind]) for name, kind in self.columns.items()])
        with parquet.ParquetWriter(path, schema) as writer:
            yield lambda rows: writer.write_table(arrow.Table.from_pylist(rows, schema))
