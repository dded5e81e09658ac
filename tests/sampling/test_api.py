"""What users of diffusers expect of a pipeline: arguments, names and defaults, on the embedded
model."""

from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import numpy as np
import pytest
import torch

import engine
from engine import sample
from engine.config import EMBEDDED
from engine.errors import ModelFileError, UsageError
from engine.graphs import Graphs
from engine.media.inputs import seeds_of
from engine.weights.place import find_place

PROMPTS = ["a red circle moves left", "a blue square moves up"]
NEGATIVES = ["a green cross stays still", "a red circle moves left"]


@pytest.fixture(scope="module")
def pipe():
    return engine.Pipeline.from_pretrained(EMBEDDED, "cpu", torch.float32)


def make(pipe, prompt=PROMPTS[0], **changes):
    return pipe(prompt, **{"num_inference_steps": 2, "progress": False} | changes)


def far(a, b) -> int:
    """The most that two clips differ in: another size of batch rounds differently."""
    return np.abs(a.frames.astype(int) - b.frames).max()


def same(a, b) -> bool:
    return np.array_equal(a.frames, b.frames) and a.caption == b.caption


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", ["t2v", "t2vt"])
def test_a_generator_is_its_seed(pipe, mode):
    by_seed = make(pipe, PROMPTS, mode=mode, seed=[3, 8])
    by_generator = make(pipe, PROMPTS, mode=mode, generator=[seeded(3), seeded(8)])
    assert all(map(same, by_seed, by_generator)) and not same(*by_seed)
    assert [result.seed for result in by_generator] == [3, 8]
    sources = [results[0].settings["noise"] for results in (by_seed, by_generator)]
    assert sources == ["seed", "generator"]
    alone = make(pipe, mode=mode, generator=seeded(3))
    assert far(alone, by_seed[0]) <= 1


def test_clips_of_one_generator_draw_in_turn_as_in_diffusers():
    whole = torch.randn(3, 16, 3, 8, 8, generator=seeded(5))
    seeds, generators = seeds_of(0, seeded(5), 3)
    assert seeds == [5, 6, 7]
    assert torch.equal(sample.video_noise((16, 3, 8, 8), seeds, "cpu", generators), whole)


def test_a_generator_without_a_seed_has_one_that_tensors_hold():
    generator = torch.Generator()
    generator.manual_seed(-1)  # all 64 bits
    seeds, _ = seeds_of(0, generator, 2)
    assert torch.tensor(seeds, dtype=torch.int64).tolist() == seeds == [2**63 - 1, 0]


def test_latents_are_the_noise(pipe):
    noise = sample.video_noise(pipe.config.shape(), [3], "cpu")
    found = make(pipe, latents=noise)
    assert same(found, make(pipe, seed=3)) and found.settings["noise"] == "latents"


@pytest.mark.parametrize("mode, rows", [("t2v", None), ("t2v", 0), ("t2vt", None)])
def test_embeddings_may_be_passed_back(pipe, mode, rows):
    given = {"mode": mode, "text_rows": rows, "negative_prompt": NEGATIVES[0]}
    expected = make(pipe, **given)
    embeds = {
        "prompt_embeds": pipe.encode_prompts(PROMPTS[:1]),
        "negative_prompt_embeds": pipe.encode_prompts(NEGATIVES[:1]),
    }
    assert same(expected, make(pipe, **given | embeds | {"negative_prompt": None}))
    if (mode, rows) != ("t2v", None):
        (found,) = make(pipe, None, **given | embeds)
        assert same(expected, found) and found.prompt is None


def test_prompts_with_several_videos_each(pipe):
    found = make(pipe, PROMPTS, num_videos_per_prompt=2)
    repeated = make(pipe, [p for p in PROMPTS for _ in range(2)])
    assert len(found) == 4 and max(map(far, found, repeated)) <= 1
    assert [result.prompt for result in found] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [result.seed for result in found] == [0, 1, 2, 3]
    assert len(make(pipe, num_videos_per_prompt=2)) == 2


def test_negative_prompts_are_each_of_a_prompt(pipe):
    found = make(pipe, PROMPTS, negative_prompt=NEGATIVES, num_videos_per_prompt=2)
    for i, result in enumerate(found):
        alone = make(pipe, PROMPTS[i // 2], negative_prompt=NEGATIVES[i // 2], seed=i)
        other = make(pipe, PROMPTS[i // 2], negative_prompt=NEGATIVES[1 - i // 2], seed=i)
        assert far(result, alone) <= 1 < far(result, other)


def test_a_callback_may_replace_tokens(pipe):
    ids, _ = pipe.text.encode_rows("a blue square", pipe.config.text_rows)

    def replace(pipe, step, time, tensors):
        return {"tokens": ids[None]} if step == 1 else None

    assert make(pipe, mode="t2vt", callback_on_step_end=replace).caption == "a blue square"


def test_a_callback_gets_the_tensors_that_it_names(pipe):
    seen = []

    def note(pipe, step, time, tensors):
        seen.append(sorted(tensors))
        return tensors

    plain = make(pipe)
    for names in (["latents"], ["tokens"], []):
        noted = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names}
        assert same(make(pipe, **noted), plain) and seen.pop() == seen.pop() == names
    make(pipe, callback_on_step_end=note)
    assert seen == [["latents", "tokens"]] * 2


BAD = [
    ({"prompt": None}, "prompt or prompt_embeds must be given"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be between 1 and 10000; got 0"),
    ({"negative_prompt": NEGATIVES}, "negative_prompt must be of 1 prompts; got 2"),
    ({"prompt_embeds": torch.zeros(2, 16, 64)}, "prompt_embeds must be of 1 prompts; got 2"),
    ({"prompt_embeds": torch.zeros(1, 9, 64)}, "prompt_embeds must be floats .1, 16, 64.; got"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 64)}, "Give it too, or text_rows=0"),
    (
        {"latents": torch.zeros(1, 16, 3, 8, 7)},
        "latents must be floats .1, 16, 3, 8, 8., for this size",
    ),
    ({"generator": seeded(1), "seed": 2}, "seed must be left out with generator; got 2"),
    ({"generator": [seeded(1)] * 2}, "generator must be one or 1; got 2"),
    ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "got 'prompt_embeds'"),
    ({"callback_on_step_end": lambda *_: {"x": 1}}, "callback_on_step_end returns .* got 'x'"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_one_clear_error(pipe, changes, message):
    with pytest.raises(UsageError, match=message):
        make(pipe, **changes)


def test_a_result_is_one_video(pipe):
    result = make(pipe)
    video = result.video
    assert video is result.frames and result.frames[0].shape == video.shape[1:]


def test_the_parts_have_their_names_in_diffusers(pipe):
    assert pipe.transformer is pipe.model
    assert pipe.text_encoder is pipe.text.encoder and pipe.tokenizer is pipe.text.tokenizer
    for name in ("transformer", "text_encoder", "tokenizer"):
        with pytest.raises(AttributeError):
            setattr(pipe, name, None)


def test_the_gpu_and_bf16_where_there_is_one(monkeypatch):
    cpu, cuda, bf16, fp32 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16, torch.float32
    for found, device in ((False, cpu), (True, cuda)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert find_place(None, None) == (device, bf16 if found else fp32)
    assert find_place("cpu", None) == (cpu, fp32) and find_place("cuda:1", None)[1] == bf16
    assert find_place("cuda", fp32) == (cuda, fp32)
    assert find_place("cpu", None, bf16) == (cpu, bf16)
    with pytest.raises(UsageError, match="dtype and torch_dtype must be given; got both"):
        find_place("cpu", fp32, fp32)


def test_torch_dtype_is_dtype():
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, "cpu", torch_dtype=torch.bfloat16)
    assert pipe.model.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_an_id_is_found_in_the_cache_and_else_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "some-org/Tiny-1.3B-Diffusers"
    with pytest.raises(ModelFileError, match=f"got neither. Run hf download {name}$"):
        engine.Pipeline.from_pretrained(name)
    model, commit = tmp_path / "models--some-org--Tiny-1.3B-Diffusers", "0" * 40
    for folder in ("refs", "snapshots"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).symlink_to(EMBEDDED)
    pipe = engine.Pipeline.from_pretrained(name, "cpu")
    assert pipe.config == engine.Pipeline.without_model(EMBEDDED).config


def test_a_pipeline_moves_as_if_it_was_loaded_there():
    moved = engine.Pipeline.from_pretrained(EMBEDDED, "cpu", torch.float32)
    plain = make(moved)
    assert moved.to("cpu") is moved and same(make(moved), plain)
    moved.to(torch.bfloat16)
    loaded = engine.Pipeline.from_pretrained(EMBEDDED, "cpu", torch.bfloat16)
    assert moved.model.dtype == torch.bfloat16 and moved.model.ops.table == loaded.model.ops.table
    assert same(make(moved), make(loaded)) and not same(make(moved), plain)
    assert moved.vae.dtype == torch.float32


def test_a_quantised_pipeline_moves():
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, "cpu", torch.float32, precision="fp8")
    plain = make(pipe)
    pipe.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    assert pipe.model.ops.precision == "fp8" and make(pipe).frames.shape == plain.frames.shape


def test_what_cannot_move_says_why(pipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "ranks", object())
        with pytest.raises(UsageError, match="it is one of several ranks. Load it there"):
            pipe.to("cpu")
    graphs = Graphs(capture=lambda function, state, pool: function)
    monkeypatch.setattr(pipe, "graphs", graphs)
    pipe.caption(np.zeros((9, 64, 64, 3), np.uint8), num_inference_steps=1, progress=False)
    with pytest.raises(UsageError, match="its steps are captured. Load it there"):
        pipe.to("cpu")


@pytest.mark.parametrize("captured", [False, True])
def test_threads_share_a_pipeline(captured, monkeypatch):
    """Clips and captions, beside each other; with captured steps, whose static tensors all calls
    share, in turn. A step is 'replayed' by running it."""
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, "cpu")
    if captured:
        pipe.graphs = Graphs(capture=lambda function, state, pool: function)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))

    def run(seed: int) -> tuple[np.ndarray, str]:
        if seed % 3 == 2:
            clip = np.full((9, 64, 64, 3), 40 * seed, np.uint8)
            result = pipe.caption(clip, num_inference_steps=3, seed=seed, progress=False)
        else:
            result = make(pipe, mode=("t2v", "t2vt")[seed % 3], seed=seed)
        return result.frames, result.caption

    alone = [run(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(run, [*range(6)] * 2)]
    for found, expected in zip(together, alone * 2, strict=True):
        assert np.array_equal(found[0], expected[0]) and found[1] == expected[1]
