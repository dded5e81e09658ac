"""Say what a video shows: exactly, then with the video's keys and values kept from the first step.

    python examples/caption.py clip.mp4

Run it from the root of the repository; examples/generate.py makes a clip.
"""

import sys

import engine

MODEL = "engine/assets/tiny"  # for videos of 9 frames of 64 x 64


def main(video: str = "clip.mp4") -> None:
    pipe = engine.Pipeline.from_pretrained(MODEL)

    exact = pipe.caption(video, num_inference_steps=24, progress=False)
    print(f"exact:  {exact.caption} ({exact.timings['denoise']:.2f} s)")

    # Approximate for a model whose video rows see the text, so ask for what it changed.
    frozen = pipe.caption(
        video, num_inference_steps=24, video_cache="frozen", report_drift=True, progress=False
    )
    print(f"frozen: {frozen.caption} ({frozen.timings['denoise']:.2f} s)")
    print(frozen.drift)


if __name__ == "__main__":
    main(*sys.argv[1:])
