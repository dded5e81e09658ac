"""What a stage that does not fit in memory says, and by which model's numbers."""

import numpy as np
import pytest
import torch

from engine import Pipeline
from engine.config import EMBEDDED, PRESETS
from engine.errors import OutOfMemory
from engine.planning import Job, memory
from engine.weights import read_codecs

WAN = PRESETS["wan2.1-1.3b"]


@pytest.mark.parametrize("name", memory.STAGES)
def test_every_stage_has_advice(name):
    with pytest.raises(OutOfMemory, match=f"^memory: {name} ran out of memory .* save most: --"):
        with memory.explain_oom(name, lambda: {"cfg": WAN}):
            raise MemoryError


def test_every_stage_of_a_pipeline_advises_by_its_own_model(monkeypatch):
    """Never by the 1.3B's numbers for another model: each stage's estimate is recorded."""
    pipe, asked = Pipeline.from_pretrained(EMBEDDED, "cpu"), {}

    def recorded(stage, cfg=None, codecs=None, **job):
        asked[stage] = cfg, codecs, Job(**job).device
        return "advice"

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(memory, "advice", recorded)
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    failing = {
        memory.LOADING: (
            "engine.pipeline.load_model",
            lambda: Pipeline.from_pretrained(EMBEDDED, "cpu"),
        ),
        memory.TEXT: (
            "engine.media.text.TextEncoder._on_device",
            lambda: pipe.generate("a circle"),
        ),
        memory.ENCODING: ("engine.media.parts.encode", lambda: pipe.caption(clip)),
        memory.DENOISING: ("engine.sample.Step.__call__", lambda: pipe.caption(clip)),
        memory.DECODING: (
            "engine.media.parts.decode_chunks",
            lambda: pipe.decode_video(torch.zeros(16)[None, :, None, None, None]),
        ),
    }
    for stage, (place, call) in failing.items():
        with (
            monkeypatch.context() as patch,
            pytest.raises(OutOfMemory, match=f"{stage} ran out of memory.*advice"),
        ):
            patch.setattr(place, full)
            call()
    own = pipe.model.cfg, read_codecs(EMBEDDED), "cpu"
    assert asked == dict.fromkeys(memory.STAGES, own)


def test_a_pipeline_without_a_model_has_no_estimate():
    parts = Pipeline.without_model(EMBEDDED)
    vast = torch.zeros(1, 1, 1, 1, 1).expand(1, 16, 16384, 1024, 1024)
    with pytest.raises(OutOfMemory, match="VAE decoding .* Use fewer frames or a smaller size.$"):
        parts.decode_video(vast)


OUT = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), True),
    (MemoryError("no"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
    (RuntimeError("a bug"), False),
    (ValueError("out of memory"), False),
]


@pytest.mark.parametrize("error, out", OUT, ids=str)
def test_a_stage_names_itself_and_what_saves_most(error, out):
    job = {"precision": "fp8", "vae_tiling": False}
    with pytest.raises(OutOfMemory if out else type(error)) as caught:
        with (
            memory.explain_oom("outer", dict),
            memory.explain_oom("VAE decoding", lambda: {"cfg": WAN} | job),
        ):
            raise error
    if not out:
        assert caught.value is error
        return
    said = str(caught.value)
    assert said.startswith("memory: VAE decoding ran out of memory (") and str(error)[:9] in said
    saved = memory.savings("VAE decoding", WAN, Job(**job), memory.WAN)
    assert [said.find(flag) for flag, _ in saved[:3]] == sorted(said.find(f) for f, _ in saved[:3])
    assert [s for _, s in saved] == sorted((s for _, s in saved), reverse=True)
    assert "--vae-tiling" in said and "fp8" not in said and said.count("--offload") == 1


def test_decoding_that_does_not_fit_is_named():
    """A real allocation that fails: the latents are one number, the video would be 13 TB."""
    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu", vae_tiling=True)
    vast = torch.zeros(1, 1, 1, 1, 1).expand(1, 16, 16384, 1024, 1024)
    with pytest.raises(OutOfMemory, match="VAE decoding ran out of memory .*--num-frames 32765"):
        pipe.decode_video(vast)
    known = pipe.job_of((2, 16, 3, 8, 8), guided=False)
    assert known.pop("cfg") == pipe.model.cfg
    codecs, job = known.pop("codecs"), Job(**known)
    assert codecs == read_codecs(EMBEDDED)
    assert (job.batch, job.num_frames, job.height, job.dtype) == (2, 9, 64, "float32")
    assert job.vae_tiling and not job.guided and job.offload == "none"
    held = sum(p.nbytes for p in pipe.model.parameters())
    assert memory.weights(pipe.model.cfg, job) == held
