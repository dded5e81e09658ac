"""What a run gives back, and what it says about itself."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Result:
    """frames uint8 [N,H,W,3]; timings in seconds by stage; peak_memory in bytes (device, or process
    on a CPU); drift of an approximation against the exact path, where it was asked for."""

    frames: np.ndarray
    caption: str | None
    seed: int
    timings: dict[str, float]
    backends: dict[str, str]
    peak_memory: int
    prompt: str | None = None
    fps: int = 16
    settings: dict = field(default_factory=dict)
    drift: dict[str, float] | None = None

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
    from importlib.metadata import version

    import engine

    return {"engine": engine.__version__} | {
        n: version(n) for n in ("torch", "diffusers", "transformers")
    }


class Clock:
    """Wall seconds by stage."""

    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = round(now - self._last, 4), now
