"""Make a video and its caption from a prompt.

    python examples/generate.py
    python examples/generate.py "a green square moves up" square.mp4

Run it from the root of the repository.
"""

import sys

import engine

MODEL = "engine/assets/tiny"  # or a diffusers Wan folder; for that, use 50 steps and guidance 5


def main(prompt: str = "a red circle moves left", target: str = "clip.mp4") -> None:
    pipe = engine.Pipeline.from_pretrained(MODEL)

    clip = pipe.generate(
        prompt, mode="t2vt", num_inference_steps=32, guidance_scale=3.0, seed=0, progress=False
    )
    clip.save(target)  # and a .json beside it, with seed, settings and versions

    print(f"{target}: {clip.caption}")
    print(clip.stages())


if __name__ == "__main__":
    main(*sys.argv[1:])
