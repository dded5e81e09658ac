"""What a bulk run works through: the files of a folder, or the lines of a list.

A line that cannot be read is an item with an error, so that every line ends as a row.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import UsageError, require
from engine.files.reading import check_regular, read_bytes

VIDEOS = """.avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv""".split()
LONGEST = 1e6  # seconds


@dataclass(frozen=True)
class Item:
    """A video or a prompt.

    number: its place in the input, from 0 on.
    text: the video's path as the input has it, or the prompt.
    path: where the video is; "" of a prompt.
    start, end: seconds of the video between which clips are taken; None is the file's end.
    repeat: how many earlier items have the same text, start and end.
    error: why the line is no good.
    """

    number: int
    text: str
    path: str = ""
    start: float = 0.0
    end: float | None = None
    repeat: int = 0
    error: str | None = None

    def id(self, begin: float = 0.0) -> str:
        """16 hexadecimal digits that name the clip which begins at `begin` seconds, or the video
        made of a prompt. They depend on neither the item's place nor that of the files."""
        key = [self.text, self.start, self.end, self.repeat, round(begin, 6)]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def seed_of(seed: int, id: str) -> int:
    """The seed of an item, below 2**32, from that of the run."""
    return int(hashlib.sha256(f"{seed} {id}".encode()).hexdigest()[:8], 16)


def identity(items: Iterable[Item]) -> str:
    """A SHA-256 of all items in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.id()} {item.error}\n".encode())
    return digest.hexdigest()


def read_videos(source: str | Path) -> list[Item]:
    """The videos of an input, in the order of a folder's sorted paths or of the list's lines.

    source: a folder, which is searched with all folders in it for the endings in VIDEOS; or JSON
        lines or a parquet file with a `video`, whose path starts at the list's folder, and if
        wanted `start` and `end` in seconds.

    Errors: UsageError, ModelFileError for a list that cannot be read, MissingPackage for parquet.
    """
    source = Path(source)
    if source.is_dir():
        found = sorted(path.relative_to(source) for path in source.rglob("*") if _is_video(path))
        records = [{"video": path.as_posix()} for path in found]
        return _items(records, lambda record: _video(record, source), source, "video")

    records = _records(source, ("video", "start", "end"), ("a folder", ".jsonl", ".parquet"))
    return _items(records, lambda record: _video(record, source.parent), source, "video")


def read_prompts(source: str | Path) -> list[Item]:
    """The prompts of an input, in order.

    source: a .txt with a prompt a line, where empty lines do not count; or JSON lines or a parquet
        file with a `prompt`.

    Errors: as of `read_videos`.
    """
    source = Path(source)
    if source.suffix == ".txt":
        lines = read_bytes(source).decode("utf-8-sig", "surrogateescape").splitlines()
        records: Iterable = ({"prompt": line.strip()} for line in lines if line.strip())
    else:
        records = _records(source, ("prompt",), (".txt", ".jsonl", ".parquet"))
    return _items(records, _prompt, source, "prompt")


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS and path.name[0] != "." and path.is_file()


def _records(source: Path, names: tuple[str, ...], kinds: tuple[str, ...]) -> Iterator[object]:
    """Each line's object; of a line that is none, the error."""
    if source.suffix not in kinds or not source.is_file():
        raise UsageError(
            f"input: --input must be {', '.join(kinds[:-1])} or {kinds[-1]}; got {source}. "
            "Check its spelling."
        )

    if source.suffix == ".parquet":
        yield from _rows(source, names)
        return
    for line in read_bytes(source).removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield UsageError(f"the line must be JSON in UTF-8; got {error}.")


def _rows(source: Path, names: tuple[str, ...]) -> Iterator[dict]:
    parquet = require("pyarrow.parquet", "ray", "pyarrow")
    check_regular(source)
    try:
        file = parquet.ParquetFile(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"input: {source} must be a parquet file; got {error}.") from error
    columns = [name for name in names if name in file.schema_arrow.names]
    if names[0] not in columns:
        held = ", ".join(file.schema_arrow.names)
        raise UsageError(f"input: {source} must have a column {names[0]!r}; got {held}.")
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _items(records: Iterable, parse: Callable[[dict], Item], source: Path, name: str) -> list[Item]:
    """Numbered items. Errors: UsageError where there are none."""
    items, seen = [], Counter()
    for number, record in enumerate(records):
        try:
            item = parse(_object(record))
        except UsageError as error:
            text = record.get(name) if isinstance(record, dict) else None
            item = Item(number, shown(text) if isinstance(text, str) else "", error=str(error))

        key = item.text, item.start, item.end
        items.append(replace(item, number=number, repeat=seen[key]))
        seen[key] += 1
    if not items:
        raise UsageError(f"input: --input must hold at least one {name}; got none in {source}.")
    return items


def _object(record: object) -> dict:
    if isinstance(record, UsageError):
        raise record
    if not isinstance(record, dict):
        raise UsageError(f"the line must be a JSON object; got {type(record).__name__}.")
    return record


def _text(record: dict, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        got = repr(value) if name in record else "none"
        raise UsageError(f"{name} must be a text that is not empty; got {got[:80]}.")
    return value


def _video(record: dict, folder: Path) -> Item:
    path = _text(record, "video")
    start, end = record.get("start"), record.get("end")
    start = 0.0 if start is None else start
    if not (_is_time(start) and (end is None or (_is_time(end) and start < end))):
        raise UsageError(
            f"start and end must be seconds, 0 <= start < end; got {start!r:.40} and {end!r:.40}."
        )
    end = None if end is None else float(end)
    return Item(0, shown(path), str((folder / path).absolute()), float(start), end)


def _is_time(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= LONGEST


def _prompt(record: dict) -> Item:
    prompt = _text(record, "prompt")
    if shown(prompt) != prompt:
        raise UsageError("prompt must be Unicode text; got half a character in it.")
    return Item(0, prompt)


def shown(text: str) -> str:
    """The text, with escapes for what is no Unicode: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
