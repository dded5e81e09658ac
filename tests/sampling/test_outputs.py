"""Clips that are written while they are decoded: the bytes of `Result.save`, and nothing left where
it ends early."""

import json
import threading

import numpy as np
import pytest
import torch

from engine import Pipeline
from engine.config import EMBEDDED
from engine.errors import Cancelled, NonFinite, UsageError
from engine.result import FIRST, Written

PROMPTS = ["a red circle moves left", "a blue square moves up"]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, "cpu")


def generate(pipe, prompt=PROMPTS[0], **settings):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False} | settings
    return pipe.generate(prompt, **settings)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_the_bytes_are_those_of_save(pipe, tmp_path, suffix):
    saved, streamed = tmp_path / f"saved{suffix}", tmp_path / f"streamed{suffix}"
    kept = generate(pipe, mode="t2vt")
    kept.save(saved)
    result = generate(pipe, mode="t2vt", output_path=streamed)

    assert result.frames == Written(streamed, (9, 64, 64, 3)) and result.caption == kept.caption
    assert streamed.read_bytes() == saved.read_bytes()
    said = [json.loads(path.with_suffix(".json").read_text()) for path in (saved, streamed)]
    assert said[0]["timings"].keys() == kept.timings.keys() == said[1]["timings"].keys() - {"file"}
    for record in said:
        del record["timings"], record["peak_memory"]
    assert said[0] == said[1] and said[1]["shape"] == [9, 64, 64, 3]

    with pytest.raises(UsageError, match=f"went to {streamed}.*Copy that file"):
        result.save(tmp_path / "again.mp4")


def test_each_clip_of_a_list_has_its_file(pipe, tmp_path):
    paths = [tmp_path / "a.mp4", str(tmp_path / "b.mp4")]
    for result, alone in zip(
        generate(pipe, PROMPTS, output_path=paths, seed=[3, 5]), "ab", strict=True
    ):
        assert result.frames.path == tmp_path / f"{alone}.mp4"
        own = generate(pipe, result.prompt, seed=result.seed)
        own.save(tmp_path / "own.mp4")
        assert (tmp_path / f"{alone}.json").is_file()
        assert (tmp_path / "own.mp4").read_bytes() == result.frames.path.read_bytes()


def test_the_first_frame_is_timed_and_the_file_begun_before_the_last_is_decoded(pipe, tmp_path):
    begun = []
    hook = pipe.vae.decoder.register_forward_hook(
        lambda *_: begun.append(len([*tmp_path.glob(".*.partial")]))
    )
    with hook:
        timings = generate(pipe, output_path=tmp_path / "clip.mp4").timings
    assert begun == [0, 1, 1]  # of three latent frames; the file waits for the size of the first
    first = timings[FIRST]
    assert timings["encode"] + timings["denoise"] < first
    assert first < sum(timings.values()) - first + 0.01
    assert list(timings) == ["encode", "denoise", FIRST, "decode", "file"]


class Interrupt(threading.Event):
    """An event of which asking is interrupted, as by a signal, the second time in the decoder."""

    asked = 0

    def is_set(self):
        self.asked += 1
        if self.asked == 3:  # after the only step, and before the first two latent frames
            raise KeyboardInterrupt
        return False


class SetLate(Interrupt):
    def is_set(self):
        self.asked += 1
        return self.asked == 3


@pytest.mark.parametrize("cancel, error", [(SetLate, Cancelled), (Interrupt, KeyboardInterrupt)])
def test_a_decode_that_ends_early_leaves_the_old_file(pipe, tmp_path, cancel, error):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    pipe.encode(PROMPTS[:1])  # kept, so that nothing is asked while it would be encoded
    with pytest.raises(error):
        generate(pipe, output_path=path, cancel=cancel())
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_frames_that_are_no_numbers_are_never_a_file(pipe, tmp_path):
    """NaN in the last latent frame, when two chunks are encoded."""

    def spoil(pipe, step, time, tensors):
        latents = tensors["latents"].clone()
        latents[:, :, -1] = torch.nan
        return {"latents": latents}

    with pytest.raises(NonFinite, match="No video was written"):
        generate(pipe, output_path=tmp_path / "clip.mp4", callback_on_step_end=spoil)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "prompt, names, said",
    [
        (PROMPTS[0], ["a.mp4", "b.mp4"], "1 files, one for each clip; got .*a.mp4, .*b.mp4"),
        (PROMPTS, "a.mp4", "2 files"),
        (PROMPTS, ["a.mp4", "a.mp4"], "2 files"),
        (PROMPTS, [], "2 files.*got none"),
        (PROMPTS[0], "a.avi", r"end in \.mp4 or \.gif"),
        (PROMPTS[0], "absent/a.mp4", "folder of .* must exist"),
    ],
)
def test_bad_outputs_are_refused_before_anything_runs(pipe, tmp_path, prompt, names, said):
    paths = tmp_path / names if isinstance(names, str) else [tmp_path / name for name in names]
    ran = []
    with pipe.text.encoder.register_forward_hook(lambda *_: ran.append(1)):
        with pytest.raises(UsageError, match=said):
            generate(pipe, prompt + "." if isinstance(prompt, str) else prompt, output_path=paths)
    assert not ran and [*tmp_path.iterdir()] == []


def test_without_a_file_the_frames_are_there(pipe):
    result = generate(pipe)
    assert isinstance(result.frames, np.ndarray) and result.frames.shape == (9, 64, 64, 3)
    assert list(result.timings) == ["encode", "denoise", FIRST, "decode"]
