"""Cancelling a call wherever it is: no piece of work begins after that, and the next call is as if
there had been none."""

import threading

import numpy as np
import pytest

from engine import Pipeline
from engine.config import EMBEDDED
from engine.errors import Cancelled, UsageError
from engine.media import TextEncoder
from engine.media.text import Kept
from engine.media.tiles import TILE_STRIDE

PROMPT, NEGATIVE = "a red circle moves left", "a blue square"
SETTINGS = {"num_inference_steps": 1, "progress": False}
CLIP = np.random.default_rng(0).integers(0, 256, (13, 64, 64, 3), np.uint8)
LAYERS, CHUNKS = 2, 4  # of the embedded text encoder; of 13 frames


@pytest.fixture
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, "cpu")


def generate(pipe, cancel=None):
    """Two texts, each encoded by itself, and four latent frames."""
    settings = SETTINGS | {"negative_prompt": NEGATIVE, "num_frames": 13}
    return pipe.generate(PROMPT, cancel=cancel, **settings)


def caption(pipe, cancel=None):
    return pipe.caption(CLIP, cancel=cancel, **SETTINGS)


def counted(modules, cancel: threading.Event, when: int) -> tuple[list[int], list]:
    """What has run of these modules, one entry for each call; call number `when` sets the Event.
    And the hooks."""
    ran = []

    def hook(*given):
        ran.append(1)
        if len(ran) == when:
            cancel.set()

    return ran, [module.register_forward_hook(hook) for module in modules]


def same(one, other) -> bool:
    return np.array_equal(one.frames, other.frames) and one.caption == other.caption


PLACES = {  # call, what runs in pieces there, pieces of a whole call, what is said
    "text": (generate, lambda p: p.text.encoder.blocks, 2 * LAYERS, "generate: .* encoding"),
    "decode": (generate, lambda p: [p.vae.decoder], CHUNKS, "generate: .* decoding"),
    "video": (caption, lambda p: [p.vae.encoder], CHUNKS, "caption: .* encoding"),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_piece_begins_after_cancel_and_the_next_call_is_whole(pipe, place):
    call, modules, pieces, said = PLACES[place]
    expected = call(Pipeline.from_pretrained(EMBEDDED, "cpu"))
    for when in range(1, pieces):
        cancel = threading.Event()
        pipe.text.kept = Kept()  # what was kept would not be encoded
        ran, hooks = counted(modules(pipe), cancel, when)
        with pytest.raises(Cancelled, match=said):
            call(pipe, cancel)
        assert len(ran) == when

        for hook in hooks:
            hook.remove()
        assert same(call(pipe), expected)


@pytest.mark.parametrize("when, kept", [(1, 0), (LAYERS, 1), (LAYERS + 1, 1)])
def test_a_text_that_was_not_encoded_whole_is_not_kept(pipe, when, kept):
    cancel = threading.Event()
    counted(pipe.text.encoder.blocks, cancel, when)
    with pytest.raises(Cancelled):
        generate(pipe, cancel)
    rows, width = len(pipe.tokenizer.encode(PROMPT).ids), pipe.text.encoder.config.d_model
    assert pipe.text.kept.bytes == kept * rows * width * 4

    cancel.clear()
    ran = []
    pipe.text.encoder.register_forward_hook(lambda *_: ran.append(1))
    generate(pipe, cancel)
    assert len(ran) == 2 - kept


def test_tiles_are_pieces_too(pipe):
    """All chunks of the first of two tiles are encoded, and one of the other."""
    pipe.vae.use_tiling = True
    clip = np.zeros((13, 32, (TILE_STRIDE + 16) * pipe.vae.config.patch, 3), np.uint8)
    cancel = threading.Event()
    ran, _ = counted([pipe.vae.encoder], cancel, CHUNKS + 1)
    with pytest.raises(Cancelled, match="caption: cancelled while encoding"):
        pipe.caption(clip, cancel=cancel, **SETTINGS)
    assert len(ran) == CHUNKS + 1


def test_copying_an_encoder_ends_between_two_weights():
    whole = TextEncoder.from_pretrained(EMBEDDED)
    text = TextEncoder(whole.tokenizer, whole.encoder, "meta")
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled("here")

    ran, _ = counted([text.encoder], threading.Event(), 1)
    with pytest.raises(Cancelled, match="here"):
        text.encode([PROMPT], 16, keep=True, check=check)
    assert len(asked) == 3 and not ran and text.kept.bytes == 0
    weights = len([*whole.encoder.parameters(), *whole.encoder.buffers()])
    text.encode([PROMPT], 16, check=lambda: asked.append(1))
    assert len(asked) == 3 + weights + LAYERS


def test_a_caption_s_message_names_it(pipe):
    with pytest.raises(UsageError, match="^caption: what callback_on_step_end returns must be of"):
        pipe.caption(CLIP, callback_on_step_end=lambda *_: {"frames": 1}, **SETTINGS)
