"""What a caller gives as numbers and arrays: NumPy's count as Python's, views as their copies, and
what is no number, or not finite, is refused by name before anything runs."""

import json
import math

import numpy as np
import pytest
import torch

import engine
from engine.config import EMBEDDED

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
        ({"guidance_scale": math.nan}, "guidance_scale must be between"),
        ({"guidance_scale": -math.inf}, "guidance_scale must be between"),
        ({"flow_shift": math.nan}, "flow_shift must be between 0.001"),
        ({"flow_shift": math.inf}, "flow_shift must be between 0.001"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number; got True"),
        ({"num_inference_steps": 10**400}, "num_inference_steps must be between 1 and 10000"),
        ({"text_steps": True, "mode": "t2vt"}, "text_steps must be a whole number; got True"),
        ({"text_rows": True}, "text_rows must be a whole number; got True"),
        ({"num_frames": True}, "num_frames must be a whole number; got True"),
        ({"num_frames": 65_541}, "num_frames must be at most 65536; got 65541"),
        ({"height": 10**30}, "height must be at most 8192; got 1000"),
        ({"width": 2**63}, "width must be at most 8192; got 9223"),
        ({"seed": True}, "seed must be one whole number"),
        ({"seed": [True]}, "seed must be one whole number"),
        ({"seed": 2**63}, "seed must be between"),
        ({"seed": -(10**400)}, "seed must be between"),
        ({"guidance_scale": True}, "guidance_scale must be a number; got True"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number; got '5'"),
        ({"guidance_scale": 10**400}, "guidance_scale must be between -1000 and 1000"),
        ({"flow_shift": 10**400}, "flow_shift must be between 0.001 and 1000"),
        ({"flow_shift": True}, "flow_shift must be a number; got True"),
        ({"temperature": True}, "temperature must be a number; got True"),
        ({"temperature": None}, "temperature must be a number; got None"),
        ({"temperature": 10**400}, "temperature must be at least 0 and below 2..63"),
        ({"num_videos_per_prompt": True}, "num_videos_per_prompt must be a whole number"),
        ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt must be a whole number"),
        ({"num_videos_per_prompt": 10**30}, "num_videos_per_prompt must be between 1 and 10000"),
        ({"latents": NOISE * math.nan}, "latents must be finite"),
        ({"latents": NOISE / 0}, "latents must be finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:40],
)
def test_what_is_no_such_number_is_refused(pipe, choice, said):
    with pytest.raises(engine.UsageError, match=said):
        pipe.generate(**QUICK | choice)


@pytest.mark.parametrize(
    "choice, said",
    [
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number"),
        ({"video_cache": True}, "video_cache must be exact, frozen or a number"),
        ({"video_cache": 1.5}, "video_cache must be exact, frozen or a number"),
        ({"seed": 10**30}, "seed must be between"),
        ({"text_rows": True}, "text_rows must be a whole number"),
        ({"temperature": "1"}, "temperature must be a number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:40],
)
def test_a_caption_refuses_them_too(pipe, choice, said):
    with pytest.raises(engine.UsageError, match=said):
        pipe.caption(CLIP, progress=False, **{"num_inference_steps": 2} | choice)


@pytest.mark.parametrize(
    "choice",
    [
        {"batch": True},
        {"batch": -1},
        {"batch": math.nan},
        {"batch": 10**30},
        {"height": 10**30},
        {"text_rows": -1},
        {"text_rows": math.inf},
        {"num_inference_steps": "4"},
        {"guidance_scale": math.nan},
    ],
    ids=str,
)
def test_a_warm_up_refuses_them_too(pipe, choice):
    (name,) = choice
    with pytest.raises(engine.UsageError, match=f"{name} must be "):
        pipe.warm_up(**choice)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_are_finite(pipe, name):
    embeds = pipe.encode_prompts(["a red circle"])
    embeds[0, 0, 0] = math.inf
    with pytest.raises(engine.UsageError, match=f"{name} must be finite"):
        pipe.generate(**QUICK | {name: embeds})
