"""The estimate against what torch holds, offload and tiling against the plain path, and errors."""

import json
import shlex
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from contracts import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from weights_made import WAN_VAE

from engine import Pipeline, UniViGU, sample, schedule
from engine.cli import main
from engine.cli.commands import Env
from engine.config import EMBEDDED, PRESETS, ModelConfig
from engine.errors import ModelFileError, UsageError
from engine.media import TextEncoder, write_video
from engine.media.autoencoder import WanVAE
from engine.media.tiles import split_frames
from engine.media.vae import decode_chunks, encode
from engine.planning import Job, memory
from engine.planning.memory import DECODER_UNITS, ENCODER_UNITS, Codecs
from engine.run import Run
from engine.toy import draw_scenes, render
from engine.weights import read_codecs
from engine.weights.load import _empty, _NoInit
from univigu_kernels import _compiled

WAN = ModelConfig.preset("wan2.1-1.3b")
SMALL = ModelConfig(heads=4, head_dim=32, layers=2, ffn_dim=320, text_dim=32, freq_dim=32, vocab=37)
PLAIN = "joint_attention=sdpa,cross_attention=sdpa,routed_ffn=reference,linear=reference"


@pytest.mark.parametrize("cfg", [*PRESETS.values(), replace(SMALL, mask_source=True)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weights_are_exact(cfg, dtype, precision):
    model = _empty(cfg, getattr(torch, dtype), precision)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert memory.weights(cfg, Job(dtype=dtype, precision=precision)) == held


def test_known_figures_of_the_1_3b_model():
    job = Job(guided=False)  # 81 frames of 480 x 832, 256 text rows, bf16
    assert (job.video_rows, job.rows) == (32760, 33016)
    frozen = replace(job, mode="v2t", video_cache="frozen", text_rows=0)
    assert memory.cached_kv(WAN, frozen) == pytest.approx(6.04e9, rel=1e-3)
    assert memory.cached_kv(WAN, replace(frozen, batch=3)) == pytest.approx(18.11e9, rel=1e-3)
    assert memory.cached_kv(WAN, replace(frozen, video_cache="exact")) == 0
    assert memory.context_kv(WAN, job) == pytest.approx(94.4e6, rel=1e-3)
    residual, row, hidden = 203e6, 101.4e6, 591.6e6  # fp32 stream, one bf16 tensor, hidden rows
    assert memory.activations(WAN, job) == pytest.approx(2 * residual + 4 * row + hidden, rel=2e-3)
    assert memory.activations(WAN, replace(job, guided=True)) == 2 * memory.activations(WAN, job)
    assert memory.modulations(WAN, job) == 50 * (30 * 12 + 4) * 1536 * 4


def held(cfg: ModelConfig, job: Job, kernels: str) -> tuple[Run, int]:
    """A run of two steps, and the most that torch's allocator held at a time in the second."""
    torch.manual_seed(0)
    model = UniViGU(cfg, kernels=kernels)
    latents = sample.video_noise((16, *job.latent), [0], "cpu")
    tokens = sample.text_source(model, job.text_rows, [0])
    context = torch.randn(2, job.context_rows, cfg.text_dim).split(1)
    null = context[1] if job.guided else None
    plan = schedule.schedule(job.mode, 2, 3.0, "unipc", "exact")
    every = 2 if job.video_cache == "frozen" else 1
    request = sample.Request(plan, latents, tokens, context[0], null, 5.0, refresh_every=every)
    run = Run(model, request)
    steps = run.steps()
    next(steps)
    with torch.profiler.profile(profile_memory=True) as recorded:
        next(steps)
    events = recorded.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return run, int(np.cumsum([size for _, size in sorted(sizes)]).max())


@pytest.mark.parametrize("mode, guided", [("t2v", True), ("v2t", False)])
@pytest.mark.parametrize("kernels, low, high", [(PLAIN, 0.95, 1.45), ("auto", 0.7, 1.25)])
def test_activations_against_the_allocator(mode, guided, kernels, low, high):
    """Plain PyTorch keeps hidden rows before and after GELU; the compiled kernels keep none."""
    if kernels == "auto" and not _compiled.built():
        pytest.skip("no compiled kernels")
    job = Job(
        mode=mode,
        guided=guided,
        num_frames=17,
        height=256,
        width=256,
        text_rows=32,
        context_rows=16,
        dtype="float32",
        steps=2,
    )
    run, most = held(SMALL, job, kernels)
    assert low < most / memory.activations(SMALL, job) < high
    tensors = [tensor for layer in run.step.context for tensor in layer[:2]]
    assert sum(t.nbytes for t in tensors) == memory.context_kv(SMALL, job)
    assert sum(t.nbytes for t in run.step.conditions) == memory.modulations(SMALL, job)


def test_the_cache_is_exact_and_a_frozen_step_small():
    job = Job(
        mode="v2t",
        guided=False,
        num_frames=9,
        height=256,
        width=256,
        text_rows=8,
        context_rows=4,
        dtype="float32",
        video_cache="frozen",
    )
    run, most = held(SMALL, job, "auto")
    assert sum(t.nbytes for c in run.step.caches for t in c) == memory.cached_kv(SMALL, job)
    assert most < 0.4 * memory.activations(SMALL, job)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive; on meta tensors this costs no memory."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_iter(out) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("units", [DECODER_UNITS, ENCODER_UNITS])
@pytest.mark.parametrize(
    "frames, tiling, dtype",
    [(9, False, "float32"), (9, True, "float32"), (9, False, "bfloat16"), (1, False, "float32")],
)
def test_the_vae_against_live_tensors(units, frames, tiling, dtype):
    """The frames are bytes before it and after it, as in a pipeline, and those of a GPU leave it
    chunk by chunk."""
    size = (320, 320) if tiling else (480, 832)
    job = Job(num_frames=frames, height=size[0], width=size[1], vae_tiling=tiling, vae_dtype=dtype)
    with torch.device("meta"), _NoInit():
        vae = WanVAE(WAN_VAE).to(getattr(torch, dtype))
    assert sum(p.numel() for p in vae.parameters()) == memory.WAN.vae
    vae.use_tiling = tiling

    mean = std = torch.ones(1, 16, 1, 1, 1, device="meta")
    with torch.no_grad(), Live() as live:
        if units == DECODER_UNITS:
            latents = torch.empty(1, 16, *job.latent, device="meta")
            for _ in decode_chunks(vae, latents, mean, std):
                pass
        else:
            video = torch.empty(1, frames, *size, 3, dtype=torch.uint8, device="meta")
            encode(vae, split_frames(video.permute(0, 4, 1, 2, 3)), mean, std)
    more = 0.25 if (frames, units) == (1, ENCODER_UNITS) else 0.15
    assert memory.vae_peak(job, memory.WAN, units) == pytest.approx(live.peak, rel=more)


def test_long_clips_are_decoded_in_the_memory_of_short_ones():
    """Pixels leave chunk by chunk. In tiles they do not, nor on a CPU."""
    short, long = Job(num_frames=9), Job(num_frames=901)

    def added(**changes) -> float:
        a, b = (
            memory.vae_peak(replace(job, **changes), memory.WAN, DECODER_UNITS)
            for job in (short, long)
        )
        return b / a

    assert added() < 1.05
    assert added(device="cpu") > 1.25 and added(vae_tiling=True) > 8


def test_the_text_encoder_of_wan_is_counted_right():
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
    with torch.device("meta"), _NoInit():
        encoder = UMT5EncoderModel(UMT5Config(**sizes, num_layers=24))
    assert sum(p.numel() for p in encoder.parameters()) == memory.WAN.text_encoder


def test_parts_belong_to_stages():
    table = memory.estimate(WAN, Job())
    sums = memory.peaks(table)
    assert list(sums) == ["loading", "text encoding", "denoising", "VAE decoding"]
    kept = memory.weights(WAN, Job()) + 2 * memory.WAN.text_encoder + 4 * memory.WAN.vae
    assert sums["loading"] == sums["text encoding"] == kept
    offloaded = memory.peaks(memory.estimate(WAN, Job(offload="text_encoder")))
    assert sums["denoising"] - offloaded["denoising"] == 2 * memory.WAN.text_encoder
    assert sums["text encoding"] == offloaded["text encoding"]
    there, offloaded = Job(device="cpu"), Job(device="cpu", offload="text_encoder")
    assert memory.estimate(WAN, offloaded) == memory.estimate(WAN, there)
    caption = memory.peaks(memory.estimate(WAN, Job(mode="v2t", video_cache=4)))
    assert list(caption) == ["loading", "VAE encoding", "denoising"]
    text = memory.format_estimate(table)
    assert "activations of a block" in text and memory.readable(max(sums.values())) in text


def test_estimate_reads_headers_alone(tmp_path, capsys, monkeypatch):
    """The command prints the table of the folder's own size without a model, and runs nothing."""
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split("generate --prompt x --estimate --precision fp8")) == 0
    out = capsys.readouterr().out

    cfg, codecs = PRESETS["tiny"], read_codecs(EMBEDDED)
    job = Job(
        num_frames=9,
        height=64,
        width=64,
        text_rows=16,
        context_rows=16,
        dtype="float32",
        precision="fp8",
    )
    assert out.splitlines()[0] == "t2v, 9 frames of 64 x 64, float32"
    assert (
        out.partition("\n")[2] == memory.format_estimate(memory.estimate(cfg, job, codecs)) + "\n"
    )

    pipe = Pipeline.without_model(EMBEDDED)
    parts = pipe.text.encoder, pipe.vae
    assert codecs == Codecs(*(sum(p.numel() for p in m.parameters()) for m in parts), 16, 2)
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "vae").mkdir()
    with pytest.raises(ModelFileError):
        read_codecs(tmp_path)


def test_offload_changes_no_result():
    load = partial(Pipeline.from_pretrained, EMBEDDED, DEVICE)
    settings = {"num_inference_steps": 2, "progress": False, "mode": "t2vt"}
    prompts = ["a red circle moves left", "a blue square moves up"]
    plain = load().generate(prompts, **settings)
    offloaded = load(offload="text_encoder")
    for a, b in zip(plain, offloaded.generate(prompts, **settings), strict=True):
        assert np.array_equal(a.frames, b.frames) and a.caption == b.caption
    assert next(offloaded.text.encoder.parameters()).device.type == "cpu"
    with pytest.raises(UsageError, match="offload must be none or text_encoder; got 'model'"):
        load(offload="model")


class Seen(Exception):
    pass


def test_an_offloaded_encoder_is_copied_for_encoding_alone():
    """The meta device plays another one; it can hold tensors, so the call is stopped there."""
    text = TextEncoder.from_pretrained(EMBEDDED)
    expected = text.encode(["a red circle"]).context
    moved = TextEncoder(text.tokenizer, text.encoder, "meta")
    assert moved.offloaded and not text.offloaded

    def look(encoder, args, inputs):
        given = *encoder.parameters(), *encoder.buffers(), *inputs.values()
        raise Seen({tensor.device.type for tensor in given})

    handle = text.encoder.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Seen) as seen:
        moved.encode(["a red circle"])
    handle.remove()
    assert seen.value.args == ({"meta"},)
    assert torch.equal(text.encode(["a red circle"]).context, expected)


def test_tiling_is_close():
    """128 x 320 pixels in tiles of 256, against the whole. The VAE's attention sees its own tile
    alone, so they differ, but by less than a third of what the VAE is off."""
    clips = render(draw_scenes(10, 0, held_out=False))[:, :5]
    mosaic = clips.reshape(2, 5, 5, 64, 64, 3).transpose(2, 0, 3, 1, 4, 5).reshape(5, 128, 320, 3)
    whole, tiled = (
        Pipeline.without_model(EMBEDDED, DEVICE, vae_tiling=tiling) for tiling in (False, True)
    )
    latents = whole.encode_video(torch.from_numpy(mosaic.copy())[None])
    a, b = (pipe.decode_video(latents)[0].astype(int) for pipe in (whole, tiled))
    assert a.shape == b.shape == (5, 128, 320, 3)
    off, off_tiled = (np.abs(frames - mosaic).mean() for frames in (a, b))
    assert 0 < np.abs(a - b).mean() < off / 3
    assert off_tiled == pytest.approx(off, rel=0.1)


def test_estimate_of_a_video(tmp_path, capsys):
    clip = tmp_path / "clip.gif"
    assert (
        main(shlex.split(f"generate --prompt x --num-inference-steps 1 --output-path {clip}")) == 0
    )
    capsys.readouterr()
    line = f"caption --video {clip} --video-cache frozen --estimate --device cpu"
    assert main(shlex.split(line)) == 0
    title, name, *rows = capsys.readouterr().out.splitlines()
    assert title == str(clip) and name == "v2t, 9 frames of 64 x 64, float32"
    assert any(row.startswith("cached K and V") for row in rows)
    assert json.loads(clip.with_suffix(".json").read_text())["shape"] == [9, 64, 64, 3]


def test_an_error_of_a_stage_is_one_line_with_its_own_advice(capsys, monkeypatch):
    def fail(self):
        with memory.explain_oom("denoising", lambda: {"cfg": WAN, "guided": False}):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Env, "run", fail)
    assert main(["env"]) == 5
    err = capsys.readouterr().err
    assert err.startswith("univigu: memory: denoising ran out of memory (OutOfMemoryError: ")
    assert err.count("ran out of memory") == err.count("\n") == 1
    assert "--offload text-encoder" in err and "--batch-size" not in err


def test_flags_reach_the_pipeline(tmp_path, capsys, monkeypatch):
    given, load, caption = {}, Pipeline.from_pretrained.__func__, Pipeline.caption

    def from_pretrained(cls, *args, **kwargs):
        given.update(kwargs, precision=args[4])
        return load(cls, *args, **kwargs)

    def captioned(self, *args, **kwargs):
        given.update(kwargs)
        return caption(self, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(Pipeline, "caption", captioned)
    write_video(tmp_path / "clip.gif", render(draw_scenes(1, 0, held_out=True))[0], 8)
    line = f"caption --video {tmp_path / 'clip.gif'} --num-inference-steps 3 --eager "
    line += "--offload text-encoder --vae-tiling --vae-dtype bfloat16 --precision fp8 "
    line += "--commit confidence "
    line += "--temperature 0.5 --video-cache 2 --report-drift"
    assert main(shlex.split(line)) == 0
    wanted = {
        "offload": "text_encoder",
        "vae_tiling": True,
        "vae_dtype": torch.bfloat16,
        "precision": "fp8",
        "video_cache": 2,
        "cuda_graphs": False,
        "commit": "confidence",
        "temperature": 0.5,
    }
    assert given.items() >= wanted.items()
    drift = capsys.readouterr().out.splitlines()[-1]
    assert drift.startswith("text_agreement ") and ", kv_change " in drift
