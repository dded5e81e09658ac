"""What the same call gives without a server."""

import json
import random
from itertools import product
from pathlib import Path

import numpy as np

from engine.config import EMBEDDED
from engine.media import read_video
from engine.pipeline import Pipeline

PROMPTS, SEEDS = ("a red circle moves left", "a blue square moves down"), range(5)
SHAPE = {"num_frames": 5, "height": 32, "width": 32}
ASKED = {"seconds": "0.5", "size": "32x32"}  # SHAPE, as a client says it
QUICK = {"num_inference_steps": 1, "guidance_scale": 1}


class Alone:
    """The clips and captions of all requests that `draw` gives, each made once.

    folder: where it may write.
    """

    def __init__(self, folder: Path):
        self.folder, self.made = folder, {}
        pipe = Pipeline.from_pretrained(EMBEDDED)
        for prompt, seed, mode in product(PROMPTS, SEEDS, ("t2v", "t2vt")):
            asked = {"prompt": prompt, "seed": seed, "mode": mode}
            result = pipe.generate(**asked, **SHAPE, **QUICK, progress=False)
            result.save(folder / "alone.mp4")
            frames = read_video(folder / "alone.mp4").frames
            self.made[prompt, seed, mode] = frames, result.caption

    def draw(self, random: random.Random) -> dict:
        """The fields of a request."""
        prompt, seed, mode = random.choice(list(self.made))
        return {"prompt": prompt, "seed": seed, "mode": mode} | ASKED | QUICK

    def compare(self, asked: dict, video: dict, file: bytes) -> str | None:
        """What is wrong with a video as the client got it; None: nothing."""
        frames, caption = self.made[asked["prompt"], asked["seed"], asked["mode"]]
        if video["status"] != "completed":
            return f"{video['id']}: {video['status']}, {json.dumps(video['error'])}"
        if (video["prompt"], video["seed"]) != (asked["prompt"], asked["seed"]):
            return f"{video['id']}: asked for {asked}, described as {video}"
        if video["caption"] != caption:
            return f"{video['id']}: caption {video['caption']!r}, alone {caption!r}"

        path = self.folder / f"{video['id']}.mp4"
        path.write_bytes(file)
        found = read_video(path).frames
        path.unlink()
        return None if np.array_equal(found, frames) else f"{video['id']}: other frames than alone"
