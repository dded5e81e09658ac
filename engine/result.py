"""What a run gives back, and what it says about itself."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.config import FRAME_STRIDE
from engine.errors import Cancelled, UsageError, go_on
from engine.planning import process_peak

TENSORS = ("latents", "tokens")  # what a callback may see and replace
SEEN = (*TENSORS, "committed")  # what it may see
FIRST = "until first frame"


@dataclass(frozen=True)
class Written:
    """A clip in the file `path`, uint8 frames of `shape` [N,H,W,3] before they were encoded."""

    path: Path
    shape: tuple[int, int, int, int]


@dataclass
class Result:
    """One clip, and how it was made.

    frames: uint8 [N,H,W,3], the pictures of this clip. In diffusers `output.frames[0]` is a video;
        here `frames[0]` is a picture, and the video is `video`. A `Written` in place of those that
        went to a file as they were decoded.
    caption: of modes t2vt and v2t, else None.
    seed: of the text's draws, and of the video's noise where settings["noise"] is "seed".
    timings: seconds by stage; and "until first frame", from the call to the first decoded frames.
    backends: the kernel of each operation.
    peak_memory: bytes, of the device, or of the process on a CPU; None on Windows.
    prompt: None where there was none.
    fps: frames a second.
    settings: the arguments that tell this run from others.
    drift: of an approximation against the exact path, where it was asked for.
    """

    frames: np.ndarray | Written
    caption: str | None
    seed: int
    timings: dict[str, float]
    backends: dict[str, str]
    peak_memory: int | None
    prompt: str | None = None
    fps: int = 16
    settings: dict = field(default_factory=dict)
    drift: dict[str, float] | None = None

    @property
    def video(self) -> np.ndarray | Written:
        """This clip, uint8 [N,H,W,3]: what diffusers has in `output.frames[0]`."""
        return self.frames

    def stages(self) -> str:
        return ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.timings.items())

    def save(self, path: str | Path) -> Path:
        """Writes the video (.mp4 or .gif) and a JSON sidecar beside it; returns the sidecar's
        path. Errors: UsageError where the frames went to a file already."""
        from engine.media import write_video

        if isinstance(self.frames, Written):
            raise UsageError(
                f"result: frames must be in memory to be saved; they went to {self.frames.path} as "
                "they were decoded. Copy that file, or generate without output_path."
            )
        write_video(path, self.frames, self.fps)
        return self.save_sidecar(path)

    def save_sidecar(self, path: str | Path) -> Path:
        """Writes all but the frames beside the video `path`; returns the sidecar's path."""
        from engine.media import write_sidecar

        record = {k: v for k, v in vars(self).items() if k != "frames"}
        return write_sidecar(
            path, record | {"shape": list(self.frames.shape), "versions": versions()}
        )


def versions() -> dict[str, str]:
    import torch

    import engine

    return {"engine": engine.__version__, "torch": torch.__version__}


def peak_memory(device: object) -> int | None:
    """The most bytes so far: of a CUDA device's allocator since its peak was reset, else of this
    process. None where the system does not say."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return process_peak()


def results_of(pipe, frames, captions, seeds, prompts, clock, settings, drift=None) -> list[Result]:
    """A result for each clip of a run of the pipeline, from what each of them has."""
    backends = {choice.op: choice.backend for choice in pipe.model.ops.table}
    run = clock.laps, backends, peak_memory(pipe.device)
    drift, settings = drift or [None] * len(seeds), settings | pipe.adapters.said
    settings |= {} if pipe.decoder is None else {"decoder": pipe.decoder.name}
    clips = zip(frames, captions, seeds, prompts, drift, strict=True)
    return [
        Result(frame, caption, seed, *run, prompt, pipe.config.fps, settings, measured)
        for frame, caption, seed, prompt, measured in clips
    ]


class Clock:
    """Wall seconds by stage; a stage that comes again adds up."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = round(self.laps.get(stage, 0.0) + now - self._last, 4)
        self._last = now

    def decoding(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The chunks; when the first of the call is there, and how long they all took, is kept."""
        for chunk in chunks:
            self.laps.setdefault(FIRST, round(time.perf_counter() - self._start, 4))
            yield chunk
        self.lap("decode")


@dataclass(frozen=True)
class Watch:
    """Who follows a run: a progress bar; a callback and the names of the tensors that it gets; an
    Event that cancels. Errors: UsageError.

    call: the method that was called, as messages name it.
    """

    progress: bool
    callback: Callable | None = None
    tensors: Sequence[str] = TENSORS
    cancel: threading.Event | None = None
    call: str = "generate"

    def __post_init__(self):
        self.check("callback_on_step_end_tensor_inputs", self.tensors, SEEN)

    def check(self, what: str, names: Iterable[str], known: Sequence[str]) -> None:
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UsageError(
                f"{self.call}: {what} must be of {' and '.join(known)}; got {unknown[0]!r}. "
                "Leave it out."
            )

    def follow(self, pipe, run) -> None:
        """Runs an `engine.run.Run` of the pipeline to its end; the bar shows what the device has
        done. Errors: Cancelled, UsageError, NonFinite."""
        hidden = not (self.progress and pipe.first)
        with tqdm(total=len(run.schedule), disable=hidden, leave=False) as bar:
            for i in run.steps():
                bar.update(run.done - bar.n)
                self(pipe, run, i)

    def __call__(self, pipe, run, step: int) -> None:
        """What comes after a step of an `engine.run.Run`. Errors: Cancelled, UsageError."""
        times = run.schedule.video_times
        if self.callback is not None:
            tensors = {name: getattr(run, name) for name in self.tensors}
            changed = self.callback(pipe, step, times[step], tensors) or {}
            self.check("what callback_on_step_end returns", changed, TENSORS)
            for name, value in changed.items():
                setattr(run, name, value)
        if self.cancel is not None and run.step.share.any(self.cancel.is_set()):
            raise Cancelled(f"sample: cancelled after step {step} of {len(times)}.")

    def encoding(self, pipe) -> Callable[[], None]:
        """The check of what is encoded before the steps. Several ranks end together, after a step:
        one that ended here would leave the others waiting for it."""
        return go_on if pipe.ranks is not None else partial(self.end_if_cancelled, "encoding")

    def end_if_cancelled(self, stage: str) -> None:
        """What comes before each piece that is encoded or, on the rank that does it, decoded.
        Errors: Cancelled."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled(f"{self.call}: cancelled while {stage}.")


@dataclass(frozen=True)
class Outputs:
    """Where the clips of a run go.

    paths: a file for each; None: memory.
    """

    paths: list[Path] | None

    def decode(self, pipe, latents, watch: Watch, clock: Clock) -> Sequence[np.ndarray | Written]:
        """The frames [N,H,W,3] of each clip of latents [B,16,F,Y,X]. Those that go to files are
        decoded clip by clip, and encoded meanwhile."""
        from engine.media import write_video

        check = partial(watch.end_if_cancelled, "decoding")
        if self.paths is None:
            return np.concatenate([*clock.decoding(pipe.decode_chunks(latents, check))], 1)

        for clip, path in zip(latents.split(1), self.paths, strict=True):
            chunks = clock.decoding(pipe.decode_chunks(clip, check))
            write_video(path, (chunk[0] for chunk in chunks), pipe.config.fps)
            clock.lap("file")
        _, _, frames, height, width = latents.shape
        shape = FRAME_STRIDE * (frames - 1) + 1, 8 * height, 8 * width, 3
        return [Written(path, shape) for path in self.paths]

    def describe(self, results: list[Result]) -> list[Result]:
        """The results, after a sidecar was written beside each file."""
        for result in results:
            if isinstance(result.frames, Written):
                result.save_sidecar(result.frames.path)
        return results
