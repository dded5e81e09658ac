"""Captions with times as files: JSON Lines, SubRip (.srt), WebVTT (.vtt)."""

import json
from pathlib import Path

from engine.errors import UsageError
from engine.files.writing import replacing


def write_captions(path: str | Path, records: list[dict]) -> None:
    """Write one caption a line (.jsonl) or a cue (.srt, .vtt), as the suffix of `path` says.

    records: "video", "start" and "end" in seconds, "caption"; other keys are left out.

    The file appears complete or not at all. Errors: UsageError for another suffix.
    """
    path = Path(path)
    form = FORMS.get(path.suffix.lower())
    if form is None:
        raise UsageError(
            f"captions: the file must end in {', '.join(FORMS)}; got {path.name!r}. Rename it."
        )
    with replacing(path) as partial:
        partial.write_text(form(records), "utf-8")


def _lines(records: list[dict]) -> str:
    kept = [
        {key: record[key] for key in ("video", "start", "end", "caption")} for record in records
    ]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)


def _subrip(records: list[dict]) -> str:
    cues = [
        f"{number}\n{_span(record, ',')}\n{_text(record)}\n"
        for number, record in enumerate(records, 1)
    ]
    return "\n".join(cues)


def _webvtt(records: list[dict]) -> str:
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    cues = [f"{_span(record, '.')}\n{_text(record).translate(escapes)}\n" for record in records]
    return "\n".join(["WEBVTT\n", *cues])


def _text(record: dict) -> str:
    """One line, for an empty one would end the cue."""
    return " ".join(record["caption"].split())


def _span(record: dict, point: str) -> str:
    return " --> ".join(_clock(record[key], point) for key in ("start", "end"))


def _clock(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, seconds = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{point}{thousandths:03}"


FORMS = {".jsonl": _lines, ".srt": _subrip, ".vtt": _webvtt}
