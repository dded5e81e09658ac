"""Pixels and strings: against diffusers' WanPipeline, and the promises to the user."""

import gc
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from library_parts import as_transformers

import engine
from engine.config import EMBEDDED
from engine.errors import Cancelled, ModelFileError, NonFinite, UsageError
from engine.media import build_word_tokenizer
from engine.schedule import NOISE_STREAM
from engine.toy.recipe import VAE
from engine.toy.scenes import words
from univigu_kernels import bind

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A random tiny WanPipeline, and its folder in diffusers' own layout."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = as_transformers(build_word_tokenizer(words()))
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2)
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        ffn_dim=64,
        text_dim=32,
        freq_dim=32,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(tokenizer, text, AutoencoderKLWan(**VAE), scheduler, transformer)
    folder = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    text.eval()  # it has dropout
    return pipe, folder


@pytest.fixture(scope="module")
def pipe(wan):
    """The same folder with a text branch of 12 rows, random but alive."""
    pipe = engine.Pipeline.from_pretrained(wan[1], "cpu")
    cfg = replace(pipe.model.cfg, vocab=37)
    torch.manual_seed(1)
    pipe.model = engine.UniViGU(cfg).eval()
    with torch.no_grad():
        pipe.model.text_head.linear.weight.normal_()
    pipe.config = replace(
        pipe.config, text_rows=12, context_rows=16, num_frames=5, height=32, width=48, fps=8
    )
    return pipe


QUIET = """
import sys
from engine import Pipeline
pipe = Pipeline.from_pretrained(sys.argv[1])
size = {"num_frames": 1, "height": 16, "width": 16, "text_rows": 0}
pipe.generate("a red circle", num_inference_steps=1, progress=False, **size)
"""


def test_a_wan_folder_loads_and_runs_without_a_word(wan):
    command = [sys.executable, "-c", QUIET, str(wan[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def generate(pipe, prompt=PROMPT, **changes):
    return pipe.generate(prompt, **{"num_inference_steps": 3, "progress": False} | changes)


@pytest.mark.parametrize(
    "steps,prompt", [(6, PROMPT), (9, "a video of a blue cross that stays still")]
)
def test_t2v_without_text_rows_equals_diffusers(wan, steps, prompt):
    theirs, folder = wan
    settings = {
        "num_frames": 9,
        "height": 32,
        "width": 48,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
    }
    generator = torch.Generator().manual_seed(3)
    expected = theirs(
        prompt, negative_prompt="", generator=generator, output_type="np", **settings
    ).frames[0]
    ours = engine.Pipeline.from_pretrained(folder, "cpu").generate(
        prompt, seed=3, progress=False, **settings
    )
    assert ours.caption is None and ours.frames.shape == (9, 32, 48, 3)
    assert np.abs(ours.frames.astype(int) - np.rint(expected * 255).astype(int)).max() <= 1
    assert ours.frames.std() > 5


@pytest.mark.parametrize("solver", ["euler", "lcm"])
def test_few_steps_equal_diffusers(wan, solver):
    """WanPipeline offers no sigmas and hands its schedulers no generator: here they get both."""
    import diffusers

    name = {"euler": "FlowMatchEulerDiscreteScheduler", "lcm": "FlowMatchLCMScheduler"}[solver]

    class Given(getattr(diffusers, name)):
        def set_timesteps(self, count, device):
            super().set_timesteps(device=device, sigmas=[1.0, 0.75, 0.5, 0.25])

        def step(self, *args, **kwargs):
            return super().step(*args, generator=draws, **kwargs)

    theirs, folder = wan
    draws = torch.Generator().manual_seed(3 ^ NOISE_STREAM)
    given = Given(shift=5.0)
    pipe = diffusers.WanPipeline(**theirs.components | {"scheduler": given})
    pipe.set_progress_bar_config(disable=True)
    size = {"num_frames": 9, "height": 32, "width": 48, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(3)
    expected = pipe(PROMPT, generator=generator, output_type="np", **size).frames[0]

    few = {"sigmas": [1.0, 0.75, 0.5, 0.25], "flow_shift": 5.0, "solver": solver}
    ours = engine.Pipeline.from_pretrained(folder, "cpu").generate(
        PROMPT, seed=3, progress=False, **few, **size
    )
    assert np.abs(ours.frames.astype(int) - np.rint(expected * 255).astype(int)).max() <= 1
    assert ours.frames.std() > 5


@pytest.mark.parametrize("mode", ["t2v", "t2vt"])
def test_a_list_of_prompts_equals_singles(pipe, mode):
    prompts = [PROMPT, "a cyan square stays still", "a video of a green cross that moves up"]
    together = generate(pipe, prompts, mode=mode, seed=[4, 9, 1])
    for result, prompt, seed in zip(together, prompts, (4, 9, 1), strict=True):
        alone = generate(pipe, prompt, mode=mode, seed=seed)
        assert np.abs(result.frames.astype(int) - alone.frames).max() <= 1
        assert result.caption == alone.caption and result.seed == alone.seed == seed


def test_in_fp8_too_a_list_of_prompts_equals_singles():
    """fp8 takes what differs by 1e-7 to the next of its few numbers: of five nulls that were
    encoded together it made other clips, 47% of whose latents differed."""
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, "cpu", precision="fp8")
    prompts = ["a red circle moves left", "a blue square stays still", "a green triangle moves up"]
    together = generate(pipe, prompts, seed=7)
    for i, result in enumerate(together):
        apart = np.abs(result.frames.astype(int) - generate(pipe, prompts[i], seed=7 + i).frames)
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


def test_a_prompt_may_be_longer_than_the_caption_that_is_made(pipe):
    with pytest.raises(UsageError, match="must be at most 3"):
        generate(pipe, mode="t2v", text_rows=3)
    assert generate(pipe, mode="t2vt", text_rows=3).caption is not None


def test_caption_takes_a_path_frames_or_a_batch(pipe, tmp_path):
    result = generate(pipe)
    result.save(tmp_path / "clip.gif")
    single = pipe.caption(result.frames, num_inference_steps=4, seed=2, progress=False)
    batch = pipe.caption(result.frames[None], num_inference_steps=4, seed=[2], progress=False)
    assert single.caption == batch[0].caption and isinstance(single.caption, str) and single.caption
    assert pipe.caption(
        tmp_path / "clip.gif", num_inference_steps=4, progress=False
    ).frames.shape == (5, 32, 48, 3)


def test_a_caption_ends_at_eos(pipe):
    ids = torch.tensor([5, 6, 1, 7, 0, 0])
    assert len(pipe.text.decode_rows(ids).split()) == 2


def test_result_and_sidecar_say_what_was_done(pipe, tmp_path):
    result = generate(pipe, mode="t2vt", seed=6)
    sidecar = json.loads(result.save(tmp_path / "clip.mp4").read_text())
    assert (tmp_path / "clip.mp4").stat().st_size > 200
    assert (
        sidecar["prompt"] == PROMPT
        and sidecar["seed"] == 6
        and sidecar["caption"] == result.caption
    )
    assert (
        set(sidecar["timings"]) == {"encode", "denoise", "until first frame", "decode"}
        and "torch" in sidecar["versions"]
    )
    assert sidecar["backends"] == {choice.op: choice.backend for choice in bind().table}
    assert sidecar["peak_memory"] > 10**7
    assert sidecar["settings"]["mode"] == "t2vt" and sidecar["shape"] == [5, 32, 48, 3]


def test_the_callback_sees_each_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, t, tensors["tokens"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else None

    result = generate(pipe, callback_on_step_end=callback)
    blank = pipe.decode_video(torch.zeros(1, 16, 2, 4, 6))[0]
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] > seen[1][1] > seen[2][1]
    assert np.array_equal(result.frames, blank)


def test_cancelling_stops_after_the_step(pipe):
    cancel, steps = threading.Event(), []

    def callback(pipe, i, t, tensors):
        steps.append(i)
        cancel.set()

    with pytest.raises(Cancelled, match="after step 0 of 3"):
        generate(pipe, callback_on_step_end=callback, cancel=cancel)
    assert steps == [0]


def test_negative_prompt_and_guidance_matter(pipe):
    plain = generate(pipe).frames
    assert not np.array_equal(
        plain, generate(pipe, negative_prompt="a blue square stays still").frames
    )
    assert not np.array_equal(plain, generate(pipe, guidance_scale=1.0).frames)


def test_text_rows_hold_the_prompt_in_t2v(pipe):
    assert not np.array_equal(generate(pipe).frames, generate(pipe, text_rows=0).frames)


def test_raw_latent_space_is_neither_normalised_in_nor_out(pipe):
    from engine.pipeline import Pipeline

    pipe.vae.config = replace(pipe.vae.config, latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    normalized, raw = (
        Pipeline(pipe.model, pipe.vae, pipe.text, replace(pipe.config, latent_space=s))
        for s in ("normalized", "raw")
    )
    frames = torch.from_numpy(generate(pipe).frames)[None]
    torch.testing.assert_close(raw.encode_video(frames), normalized.encode_video(frames) * 2 + 0.5)


BAD = [
    ({"num_frames": 8}, "num_frames must be 4k\\+1; got 8. Nearest: 5 or 9"),
    ({"num_frames": 0}, "num_frames .* Nearest: 1"),
    ({"height": 50}, "height must be a multiple of 16; got 50. Nearest: 48 or 64"),
    ({"width": 7}, "width .* Nearest: 16"),
    ({"mode": "v2t"}, "mode must be one of t2v, t2vt"),
    ({"solver": "rk4"}, "solver must be one of euler, unipc"),
    ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 10000; got 0"),
    ({"seed": [1, 2]}, "seed must be one whole number or 1"),
    ({"mode": "t2vt", "text_rows": 0}, "text_rows must be at least 1"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "a red circle " * 20}, "at most 16 tokens; got 61. Shorten it by 45"),
]


@pytest.mark.parametrize("changes,message", BAD)
def test_bad_input_is_one_clear_error(pipe, changes, message):
    with pytest.raises(UsageError, match=message):
        generate(pipe, **changes)


@pytest.mark.parametrize(
    "frames", [np.zeros((5, 32, 48), np.uint8), np.zeros((5, 32, 48, 3), np.float32)]
)
def test_bad_frames_are_named(pipe, frames):
    with pytest.raises(UsageError, match="video must be a path or uint8"):
        pipe.caption(frames, progress=False)


def test_a_video_of_wrong_length_is_not_silently_cut(pipe):
    with pytest.raises(UsageError, match="got 7. Nearest: 5 or 9"):
        pipe.caption(np.zeros((7, 32, 48, 3), np.uint8), progress=False)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ModelFileError, match="must be a folder"):
        engine.Pipeline.from_pretrained(tmp_path / "absent")
    with pytest.raises(ModelFileError, match="vae/config.json"):
        engine.Pipeline.from_pretrained(tmp_path)


def test_nan_from_the_decoder_gives_no_frames(pipe):
    with pytest.raises(NonFinite, match="decoded pixels"):
        pipe.decode_video(torch.full((1, 16, 1, 4, 4), float("nan")))


def test_20_generations_leave_nothing_behind(pipe):
    """Live tensors are counted; the process must not grow by 1% either."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    def alive():
        gc.collect()
        return sum(type(x) in (torch.Tensor, torch.nn.Parameter) for x in gc.get_objects())

    generate(pipe, mode="t2vt")
    before, pages = alive(), []
    for seed in range(25):
        generate(pipe, mode="t2vt", seed=seed)
        pages.append(resident())
    assert alive() == before
    assert min(pages[20:]) < 1.01 * min(pages[:5])  # the allocator's own ups and downs reach 1%


def test_kernels_are_chosen_for_the_clips_to_come(monkeypatch):
    """`bind` gets the rows of the folder's guided clips: on a GPU its trial is of these."""
    from engine.config import EMBEDDED
    from engine.weights import load

    asked, real = [], load.bind

    def bind(*arguments, **keywords):
        asked.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(load, "bind", bind)
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, "cpu")
    (case,) = [given[4] for given in asked if len(given) == 5]
    config = pipe.model.cfg
    assert case == {**pipe.config.case, **config.case} and case["B"] == 2
    assert set("BVTCDHKF") == case.keys()


@pytest.mark.parametrize("mode", ["t2v", "t2vt", "v2t"])
def test_a_model_that_has_sampled_can_be_trained(mode):
    """Steps run in inference mode, of which nothing may stay: neither in what a callback gets, nor
    in what the model keeps."""
    fresh = engine.Pipeline.from_pretrained(EMBEDDED, "cpu")
    seen = []

    def note(pipe, step, time, tensors):
        seen.extend(tensors.values())
        return {"latents": tensors["latents"].mul_(1.0), "tokens": tensors["tokens"].clone()}

    how = {"num_inference_steps": 3, "callback_on_step_end": note, "progress": False}
    if mode == "v2t":
        fresh.caption(np.zeros((5, 32, 32, 3), np.uint8), video_cache="frozen", **how)
    else:
        fresh.generate("a red circle", 5, 32, 32, mode=mode, **how)
    each = 3 if mode == "v2t" else 2  # latents and tokens; of a caption, what stays too
    assert len(seen) == 3 * each and not any(tensor.is_inference() for tensor in seen)

    model, latents = fresh.model.train(), torch.randn(1, 16, 2, 4, 4)
    conditions = model.conditions(torch.tensor([500.0]), torch.tensor([500.0]))
    context = model.encode_context(torch.zeros(1, *fresh.context_shape))
    tokens = torch.zeros(1, fresh.config.text_rows, dtype=torch.long)
    h_BLD = model.features(latents, tokens, conditions, context)
    model.velocity(h_BLD, latents.shape).square().mean().backward()
    assert all(p.grad is not None for p in model.blocks[0].parameters())
