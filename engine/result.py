"""What a run gives back, and what it says about itself."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.errors import Cancelled, UsageError
from engine.planning import process_peak

TENSORS = ("latents", "tokens")  # what a callback may see and replace


@dataclass
class Result:
    """One clip, and how it was made.

    frames: uint8 [N,H,W,3], the pictures of this clip. In diffusers `output.frames[0]` is a video;
        here `frames[0]` is a picture, and the video is `video`.
    caption: of modes t2vt and v2t, else None.
    seed: of the text's draws, and of the video's noise where settings["noise"] is "seed".
    timings: seconds by stage.
    backends: the kernel of each operation.
    peak_memory: bytes, of the device, or of the process on a CPU; None on Windows.
    prompt: None where there was none.
    fps: frames a second.
    settings: the arguments that tell this run from others.
    drift: of an approximation against the exact path, where it was asked for.
    """

    frames: np.ndarray
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
    def video(self) -> np.ndarray:
        """This clip, uint8 [N,H,W,3]: what diffusers has in `output.frames[0]`."""
        return self.frames

    def stages(self) -> str:
        return ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.timings.items())

    def save(self, path: str | Path) -> Path:
        """Writes the video (.mp4 or .gif) and a JSON sidecar beside it; returns the sidecar's
        path."""
        from engine.media import write_sidecar, write_video

        write_video(path, self.frames, self.fps)
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


class Clock:
    """Wall seconds by stage."""

    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = round(now - self._last, 4), now


@dataclass(frozen=True)
class Watch:
    """Who follows a run: a progress bar; a callback and the names of the tensors that it gets; an
    Event that cancels. Errors: UsageError."""

    progress: bool
    callback: Callable | None = None
    tensors: Sequence[str] = TENSORS
    cancel: threading.Event | None = None

    def __post_init__(self):
        self.check("callback_on_step_end_tensor_inputs", self.tensors)

    def check(self, what: str, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in TENSORS]
        if unknown:
            raise UsageError(
                f"generate: {what} must be of {' and '.join(TENSORS)}; got {unknown[0]!r}. "
                "Leave it out."
            )

    def follow(self, pipe, run) -> None:
        """Runs an `engine.sample.Run` of the pipeline to its end. Errors: Cancelled, UsageError,
        NonFinite."""
        hidden = not (self.progress and pipe.first)
        for i in tqdm(run.steps(), total=len(run.schedule), disable=hidden, leave=False):
            self(pipe, run, i)

    def __call__(self, pipe, run, step: int) -> None:
        """What comes after a step of an `engine.sample.Run`. Errors: Cancelled, UsageError."""
        times = run.schedule.video_times
        if self.callback is not None:
            tensors = {name: getattr(run, name) for name in self.tensors}
            changed = self.callback(pipe, step, times[step], tensors) or {}
            self.check("what callback_on_step_end returns", changed)
            for name, value in changed.items():
                setattr(run, name, value)
        if self.cancel is not None and run.step.share.any(self.cancel.is_set()):
            raise Cancelled(f"sample: cancelled after step {step} of {len(times)}.")

    def end_if_cancelled(self) -> None:
        """What comes before a chunk is decoded, on the rank that decodes. Errors: Cancelled."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("generate: cancelled while decoding.")
