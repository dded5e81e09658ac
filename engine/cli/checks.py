"""Checks of the command line that need no model, so that nothing fails after an hour that could
have failed at once. Errors: UsageError; `check_shard`, `check_decoder` and `adapters`
ModelFileError too."""

import math
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.config import HIGHEST, check_grid, one_grid
from engine.errors import ModelFileError, UsageError

SEEDS = 2**32  # training multiplies a seed by 1e6, and torch takes 64 bits


def check_count(flag: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"usage: {flag} must be at least 1; got {value}.")


def check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise UsageError(f"usage: --seed must be between 0 and {SEEDS - 1}; got {seed}.")


def check_video_steps(settings: dict) -> None:
    """Checks guidance, shift, text steps and grids of `univigu generate`; None is left out."""
    scale, shift = settings["guidance_scale"], settings["flow_shift"]
    if scale is not None and not math.isfinite(scale):
        raise UsageError(f"generate: --guidance-scale must be finite; got {scale}.")
    if shift is not None and not 0 < shift < math.inf:
        raise UsageError(f"generate: --flow-shift must be positive; got {shift}.")
    if settings["text_steps"] is not None:
        check_count("--text-steps", settings["text_steps"])
    one_grid(settings)
    for name in HIGHEST:
        if settings[name] is not None:
            check_grid(name, settings[name])


def check_folder(path: Path) -> None:
    """A folder that exists or can be made: nothing on the way to it is a file."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"output: --output-path must be a folder; got the file {place}.")


def check_file(path: Path) -> None:
    """A file that can be made or replaced."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"output: --output-path must be in a folder that exists and is writable; got {path}. "
            "Create the folder."
        )
    if path.is_dir():
        raise UsageError(f"output: --output-path must be a file; got the folder {path}.")


def check_captions_output(path: Path | None, videos: int) -> None:
    if path is None:
        return
    if path.suffix not in (".json", ".jsonl", ".srt", ".vtt"):
        raise UsageError(
            "output: --output-path must end in .json, .jsonl, .srt or .vtt; "
            f"got {path.name!r}. Rename it."
        )
    if path.suffix in (".srt", ".vtt") and videos > 1:
        raise UsageError(
            f"output: subtitles must be of one video; got {videos}. Write .json or .jsonl."
        )
    check_file(path)


def seconds(flag: str, text: str) -> float:
    """Seconds of "5", "2.5s", "1m" or "1h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|h|)", text)
    if found is None or not float(found[1]):
        raise UsageError(f"usage: {flag} must be a time such as 5s, 2m or 1h; got {text!r}.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def check_json_output(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix != ".json":
        raise UsageError(f"output: --output-path must end in .json; got {path.name!r}. Rename it.")
    check_file(path)


def check_video_output(path: Path, height: int, width: int) -> None:
    """Writes one black frame in the format of `path`: suffix, size, packages and encoder are tried
    before the run. Errors: MissingPackage too."""
    import numpy as np

    from engine.media import write_video

    check_file(path)
    with TemporaryDirectory() as folder:
        frame = np.broadcast_to(np.uint8(0), (1, height, width, 3))
        write_video(Path(folder, path.name), frame, fps=16)


def check_decoder(path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise ModelFileError(f"generate: --decoder-path must be a file; got {path}. Check it.")


def find_device(name: str):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:1"."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise UsageError(
            f"device: --device must be auto or one of {', '.join(known)}; got {name!r}. "
            "See univigu env."
        )
    return torch.device(name)


def video_cache(text: str) -> str | int:
    """What `Pipeline.caption` takes for --video-cache."""
    if text in ("exact", "frozen"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"usage: --video-cache must be exact, frozen or a number of steps; got {text!r}."
        )
    return int(text)


def adapters(texts: tuple[str, ...]) -> list[tuple[Path, float]]:
    """Paths and scales of --lora; a scale is what follows the last colon, if that is a number."""
    found = []
    for text in texts:
        path, _, tail = text.rpartition(":")
        try:
            scale = float(tail) if path else 1.0
        except ValueError:  # a colon of the path's own
            path, scale = "", 1.0
        path = Path(path or text)
        if not math.isfinite(scale):
            raise UsageError(f"usage: --lora must have a finite scale; got {text!r}.")
        if not path.exists():
            raise ModelFileError(
                f"usage: --lora must be a file or folder, and :SCALE if not 1; got {text!r}, and "
                f"no {path}. Check the spelling."
            )
        found.append((path, scale))
    return found


def check_kernels(request: str, device, dtype, precision: str = "bf16") -> None:
    """Binds the kernels once: a request that cannot be met is a mistake of the user."""
    from univigu_kernels import bind

    try:
        bind(request, device, dtype, precision)
    except ValueError as error:
        raise UsageError(f"--kernels or UNIVIGU_KERNELS: {error}") from error


def check_shard(data, cfg, config, folder: Path | None = None, ranks: int = 1) -> None:
    """A LatentSet that a ModelConfig can be trained on with a TrainConfig by so many ranks, and
    that was made with the pipeline folder, if one is given."""
    from engine.data import data_fingerprint
    from engine.media.parts import find_folder

    data.indices(0, config.batch_size, config.seed, 0, ranks)
    data.check_model(cfg)
    if folder is not None:
        now = data_fingerprint(find_folder(folder))
        stale = [name for name in now if data.made_with.get(name) != now[name]]
        if stale:
            raise ModelFileError(
                f"train: --data must be made with the parts of {folder}; got another "
                f"{', '.join(stale)}. Run univigu preprocess again."
            )


def check_teacher(stage: str, teacher: Path | None, trajectories: Path | None = None) -> None:
    if teacher is not None and trajectories is not None:
        raise UsageError(
            f"train: one of --teacher and --trajectories must be given; got {teacher} and "
            f"{trajectories}."
        )
    if (teacher is None and trajectories is None) == (stage == "distill"):
        given = f"--teacher {teacher or 'none'}"
        if trajectories is not None:
            given = f"--trajectories {trajectories}"
        raise UsageError(
            "train: --teacher must go with --stage distill, and it with one, or with "
            f"--trajectories; got --stage {stage} and {given}."
        )
