"""Clips and captions from many threads on one Pipeline, each compared with the same one alone."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from engine import Pipeline
from engine.config import EMBEDDED
from engine.toy.scenes import words

THREADS = 8
KINDS = "t2v", "t2vt", "caption"


def request(pipe: Pipeline, dice: random.Random) -> tuple[str, partial]:
    """A kind, and a call of `pipe` that returns a result."""
    kind = dice.choice(KINDS)
    settings = {"seed": dice.randrange(2**31), "progress": False}
    settings |= {"num_inference_steps": dice.randint(1, 4), "temperature": dice.choice([0, 1.0])}
    frames, height, width = 4 * dice.randint(0, 2) + 1, *dice.choices([16, 32, 64], k=2)
    if kind == "caption":
        pixels = np.random.default_rng(settings["seed"]).integers(
            0, 256, (frames, height, width, 3)
        )
        settings |= {"video_cache": dice.choice(["exact", "frozen"])}
        return kind, partial(pipe.caption, pixels.astype(np.uint8), **settings)

    settings |= {"num_frames": frames, "height": height, "width": width, "mode": kind}
    settings |= {"guidance_scale": dice.choice([1.0, 5.0])}
    prompt = " ".join(dice.choices(words(), k=dice.randint(1, 5)))
    return kind, partial(pipe.generate, prompt, **settings)


def same(a, b) -> bool:
    """Bit for bit."""
    frames = [result.frames for result in (a, b)]
    if any(x is None for x in frames):
        return frames == [None, None] and a.caption == b.caption
    return a.caption == b.caption and np.array_equal(*frames)


def run(_, count: int, seed: int, __, say) -> dict:
    """`count` requests, one after another and then from THREADS threads in another order."""
    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu")
    requests = [request(pipe, random.Random(f"clip {seed} {n}")) for n in range(count)]
    alone = [call() for _, call in requests]
    order = random.Random(f"clips {seed}").sample(range(count), count)
    with ThreadPoolExecutor(THREADS) as pool:
        together = dict(zip(order, pool.map(lambda n: requests[n][1](), order), strict=True))

    kinds, faults = {}, []
    for number, (kind, _) in enumerate(requests):
        kinds[kind] = kinds.get(kind, 0) + 1
        if not same(alone[number], together[number]):
            faults.append({"number": number, "kind": kind, "wrong": "another than alone"})
            say(f"clip {faults[-1]}")
    return {"trials": count, "threads": THREADS, "by kind": kinds, "faults": faults}
