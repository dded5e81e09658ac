"""A file's clip in chunks: they are what `read_clips` gives, decoded one ahead, and a VAE makes the
same latents of them."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import Pipeline
from engine.config import EMBEDDED, PipelineConfig
from engine.errors import Cancelled, ModelFileError, UsageError
from engine.media import StreamedClip, read_clips, write_video
from engine.media.clip import _ahead
from engine.media.inputs import clips_of

CONFIG = PipelineConfig(num_frames=9, height=16, width=32, fps=8)
SIZES = [1] + [4] * 20


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """90 noisy frames at 8 a second."""
    path = tmp_path_factory.mktemp("streamed") / "noise.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (90, 24, 48, 3), np.uint8)
    write_video(path, frames, 8)
    return path


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, "cpu")


def decoders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("univigu-decode")]


@pytest.mark.parametrize("frames", [1, 5, 9, 81])
def test_latents_are_those_of_the_whole_clip(file, pipe, frames):
    config = replace(CONFIG, num_frames=frames)
    whole = next(read_clips(file, config))
    clips = clips_of(file, config)
    latents = pipe.encode_chunks(clips.chunks, clips.shape)

    assert torch.equal(latents, pipe.encode_video(whole.frames[None]))
    taken, source = clips.taken()
    assert np.array_equal(taken[0], whole.frames) and source == {"source": whole.source}


@pytest.mark.parametrize(
    "start, end, frames, whole",
    [(0.0, None, 81, True), (2.5, None, 9, True), (0.0, 0.8, 81, False), (9.0, None, 81, False)],
)
def test_chunks_are_those_frames(file, start, end, frames, whole):
    """What is left over after the last whole chunk is dropped."""
    config = replace(CONFIG, num_frames=frames)
    clip = StreamedClip(file, config, start, end, whole)
    chunks, expected = [*clip.chunks()], next(read_clips(file, config, start, end, None, whole))

    assert torch.equal(torch.cat(chunks), expected.frames)
    assert [len(chunk) for chunk in chunks] == SIZES[: len(chunks)]
    found = clip.taken()
    assert (found.start, found.end, found.source) == (start, expected.end, expected.source)


def test_a_clip_whose_chunks_nobody_took_is_decoded_when_it_is_wanted(file):
    expected = next(read_clips(file, CONFIG, 1.0))
    assert torch.equal(StreamedClip(file, CONFIG, 1.0).taken().frames, expected.frames)


def test_the_next_chunk_is_made_while_one_is_in_use():
    made = [threading.Event() for _ in range(3)]

    def chunks():
        for n, event in enumerate(made):
            event.set()
            yield torch.full((1,), n)

    ahead = _ahead(chunks())
    assert next(ahead).item() == 0 and made[1].wait(10) and not made[2].is_set()
    assert [chunk.item() for chunk in ahead] == [1, 2]


def test_a_stream_that_is_closed_ends_its_thread_and_its_file(file, monkeypatch):
    from engine.media import clip as module

    opened, closed = module.open_video, []

    class Seen:
        def __init__(self, path):
            self.inner = opened(path)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            closed.append(True)
            return self.inner.__exit__(*error)

    monkeypatch.setattr(module, "open_video", Seen)
    chunks = StreamedClip(file, replace(CONFIG, num_frames=81)).chunks()
    next(chunks)
    assert decoders() and not closed
    chunks.close()
    assert closed == [True] and not decoders()


def test_a_cancelled_caption_leaves_no_thread(file, pipe):
    class Third(threading.Event):
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked == 3

    cancel = Third()
    clip = StreamedClip(file, replace(CONFIG, num_frames=81))
    with pytest.raises(Cancelled, match="caption: cancelled while encoding"):
        pipe.caption(clip, num_inference_steps=1, cancel=cancel, progress=False)
    assert cancel.asked == 3 and not decoders()


def test_a_file_that_ends_in_damage_is_an_error_of_the_caption(file, pipe, tmp_path):
    """Its first chunks were given by then."""
    data, cut = file.read_bytes(), tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) * 3 // 4].ljust(len(data), b"\0"))
    clip, given = StreamedClip(cut, replace(CONFIG, num_frames=81)), []
    with pytest.raises(ModelFileError, match="decodes without damage"):
        for chunk in clip.chunks():
            given.append(len(chunk))
    assert len(given) > 2

    with pytest.raises(ModelFileError, match="decodes without damage"):
        pipe.caption(clip, num_inference_steps=1, progress=False)
    assert not decoders()


@pytest.mark.parametrize(
    "start, end, said", [(1.0, 0.5, "0 <= start < end"), (99.0, None, "no frame from 99.0 s on")]
)
def test_intervals_that_are_none(file, start, end, said):
    with pytest.raises(UsageError, match=said):
        next(StreamedClip(file, CONFIG, start, end).chunks())


def test_a_clip_that_must_be_whole(file):
    with pytest.raises(UsageError, match="got 10"):
        [*StreamedClip(file, replace(CONFIG, num_frames=81), 10.0, whole=True).chunks()]
