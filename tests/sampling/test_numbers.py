"""What a caller gives as numbers and arrays: NumPy's count as Python's, views as their copies, and
what is no number, or not finite, is refused by name before anything runs."""

import json
import math

import numpy as np
import pytest
import torch

import engine
from engine.pipeline import EMBEDDED

CLIP = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
QUICK = {"prompt": "a red circle", "num_inference_steps": 2, "progress": False}
NOISE = torch.zeros(1, 16, 3, 8, 8)


@pytest.fixture(scope="module")
def pipe():
    return engine.Pipeline.from_pretrained(EMBEDDED, "cpu")


def test_numpys_numbers_are_numbers(pipe, tmp_path):
    given = {
        "num_inference_steps": np.int64(2),
        "num_frames": np.int32(9),
        "height": np.uint16(64),
        "width": np.int64(64),
        "guidance_scale": np.float32(3),
        "flow_shift": np.float64(2),
        "seed": np.int64(5),
        "mode": "t2vt",
        "text_rows": np.int16(8),
        "text_steps": np.uint8(2),
        "temperature": np.float32(0.5),
    }
    plain = {name: value if name == "mode" else value.item() for name, value in given.items()}
    found = pipe.generate(**QUICK | given)
    expected = pipe.generate(**QUICK | plain)
    assert np.array_equal(found.frames, expected.frames) and found.caption == expected.caption

    found.save(tmp_path / "clip.mp4")
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["seed"] == 5 and record["settings"]["guidance_scale"] == 3


@pytest.mark.parametrize("seed", [np.arange(3, 5), [np.int64(3), 4], (3, 4), np.int64(3)], ids=repr)
def test_seeds_of_any_kind(pipe, seed):
    found = pipe.generate(**QUICK | {"prompt": ["a red circle", "a blue square"], "seed": seed})
    assert [result.seed for result in found] == [3, 4]
    assert all(type(result.seed) is int for result in found)


@pytest.mark.parametrize(
    "view",
    [
        CLIP[::-1],
        CLIP[:, ::-1, ::-1],
        CLIP[..., ::-1],
        np.asfortranarray(CLIP),
        np.broadcast_to(CLIP[:1], CLIP.shape),
        torch.from_numpy(CLIP),
        [*CLIP],
    ],
    ids=["backwards", "turned", "bgr", "fortran", "still", "tensor", "list"],
)
def test_a_view_is_captioned_as_its_copy(pipe, view):
    copy = np.array([np.asarray(frame) for frame in view])
    settings = {"num_inference_steps": 2, "progress": False}
    assert pipe.caption(view, **settings).caption == pipe.caption(copy, **settings).caption


@pytest.mark.parametrize(
    "choice, said",
    [
        ({"num_inference_steps": 2.0}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": "2"}, "num_inference_steps must be a whole number"),
        ({"text_steps": 1.5, "mode": "t2vt"}, "text_steps must be a whole number"),
        ({"text_rows": 8.0}, "text_rows must be a whole number"),
        ({"num_frames": 9.0}, "num_frames must be a whole number"),
        ({"height": "64"}, "height must be a whole number"),
        ({"width": math.nan}, "width must be a whole number"),
        ({"seed": 1.5}, "seed must be one whole number"),
        ({"seed": "7"}, "seed must be one whole number"),
        ({"seed": [1, 2]}, "seed must be one whole number or 1"),
        ({"seed": None}, "seed must be one whole number"),
        ({"temperature": math.nan, "mode": "t2vt"}, "temperature must be at least 0"),
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
        ({"guidance_scale": -math.inf}, "guidance_scale must be finite"),
        ({"flow_shift": math.nan}, "flow_shift must be positive"),
        ({"flow_shift": math.inf}, "flow_shift must be positive"),
        ({"latents": NOISE * math.nan}, "latents must be finite"),
        ({"latents": NOISE / 0}, "latents must be finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:40],
)
def test_what_is_no_such_number_is_refused(pipe, choice, said):
    with pytest.raises(engine.UsageError, match=said):
        pipe.generate(**QUICK | choice)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_are_finite(pipe, name):
    embeds = pipe.encode_prompts(["a red circle"])
    embeds[0, 0, 0] = math.inf
    with pytest.raises(engine.UsageError, match=f"{name} must be finite"):
        pipe.generate(**QUICK | {name: embeds})
