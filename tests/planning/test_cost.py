"""FLOPs against torch's counter and the published table, parameters against the model."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import UniViGU, recompute
from engine.config import PRESETS, ModelConfig
from engine.errors import UsageError
from engine.planning import flops, forward_flops, peak_flops, train_flops
from engine.planning.flops import parameters
from univigu_kernels.registry import OPS

TINY = ModelConfig(heads=2, head_dim=8, layers=3, ffn_dim=40, text_dim=24, freq_dim=12, vocab=50)
MODELS = {
    "tokens": replace(TINY, mask_source=True),
    "blind": replace(TINY, video_sees_text=False, layers=2, ffn_dim=100),
    "vectors": replace(TINY, text_flow="embedding", heads=3, text_dim=7, freq_dim=34),
}
SIZES = {"samples": 2, "video_rows": 3 * 4 * 5, "text_rows": 11, "context_rows": 9}
SHAPE = 2, 16, 3, 8, 10
WAN = {name: replace(PRESETS[f"wan2.1-{name}"], vocab=256000) for name in ("1.3b", "14b")}
SDPA = "joint_attention=sdpa,cross_attention=sdpa,routed_ffn=reference,linear=reference"
FROZEN = {  # part: its parameters' names
    "video_ffn": r"\.ffn\.",
    "text_ffn": r"\.ffn_t\.",
    "self_projections": r"attn1\.to_",
    "cross_projections": r"attn2\.to_(q|out)",
    "patches": r"patch_embedding",
    "text_head": r"text_head\.linear",
}


def inputs(cfg: ModelConfig):
    rows = 2, SIZES["text_rows"]
    vectors = cfg.text_flow == "embedding"
    text = torch.randn(*rows, cfg.dim) if vectors else torch.randint(cfg.vocab, rows)
    context = torch.randn(2, SIZES["context_rows"], cfg.text_dim)
    return torch.randn(SHAPE), text, torch.rand(2), torch.rand(2), context


def counted(model: UniViGU, backward: bool = True) -> int:
    """By torch, of forward and of a loss's backward that reaches both heads."""
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs(model.cfg))
        if backward:
            text = out.logits if out.text_velocity is None else out.text_velocity
            (out.velocity.sum() + text.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_flops_agree_with_torch(cfg):
    model = UniViGU(cfg, kernels="reference")
    assert forward_flops(cfg, **SIZES).total == counted(model, backward=False)
    assert train_flops(cfg, **SIZES) == counted(model)


@pytest.mark.parametrize("policy", recompute.POLICIES)
def test_recomputed_flops_agree_with_torch(policy):
    """Kept attention is a library's, which torch's counter takes for nothing on a CPU."""
    cfg, kept = MODELS["tokens"], policy == "attention"
    model = UniViGU(cfg, kernels=SDPA if kept else "reference")
    model.recompute = policy
    # As in training: every layer makes its K and V of the prompt itself.
    model.encode_context = lambda rows: [model.cond_text_embedder(rows)] * cfg.layers
    forward = forward_flops(cfg, **SIZES)
    uncounted = 3 * (forward.joint_attention + forward.cross_attention) if kept else 0
    assert train_flops(cfg, **SIZES, recompute=policy) == counted(model) + uncounted


@pytest.mark.parametrize("parts", [*([part] for part in FROZEN), list(FROZEN)], ids=str)
def test_frozen_parts_take_no_weight_gradients(parts):
    cfg = MODELS["tokens"]
    model = UniViGU(cfg, kernels="reference")
    for name, parameter in model.named_parameters():
        if any(re.search(FROZEN[part], name) for part in parts) and parameter.ndim > 1:
            parameter.requires_grad_(False)
    assert train_flops(cfg, **SIZES, frozen=parts) == counted(model)


TABLE = {  # text rows: TFLOP of 32760 video rows at width 1536, vocabulary 256000
    0: (18.55, 197.82, 9.28, 0.145, 3.09, 54.10, 0, 0, 283.0),
    256: (18.70, 200.92, 9.35, 0.145, 3.12, 54.10, 0.42, 0.20, 287.0),
    512: (18.84, 204.05, 9.42, 0.145, 3.14, 54.10, 0.85, 0.40, 291.0),
    1024: (19.13, 210.38, 9.57, 0.145, 3.19, 54.10, 1.69, 0.81, 299.0),
}


@pytest.mark.parametrize("text_rows", TABLE)
def test_published_table_of_the_1_3b_model(text_rows):
    flops = forward_flops(WAN["1.3b"], video_rows=32760, text_rows=text_rows)
    parts = (
        flops.self_projections,
        flops.joint_attention,
        flops.cross_projections,
        flops.context_kv,
        flops.cross_attention,
        flops.video_ffn,
        flops.text_ffn,
        flops.text_head,
    )
    assert [part / 1e12 for part in parts] == pytest.approx(TABLE[text_rows][:-1], abs=0.0055)
    assert flops.total / 1e12 == pytest.approx(TABLE[text_rows][-1], abs=0.051)
    assert (flops.patches + flops.video_head + flops.context) / 1e12 == pytest.approx(
        0.02, abs=0.005
    )


@pytest.mark.parametrize(
    "size, video_rows, plain, joint",
    [("1.3b", 75600, 1250, 1258), ("14b", 32760, 1678, 1699), ("14b", 75600, 6523, 6562)],
)
def test_published_totals_of_other_sizes(size, video_rows, plain, joint):
    for text_rows, teraflops in ((0, plain), (256, joint)):
        flops = forward_flops(WAN[size], video_rows=video_rows, text_rows=text_rows)
        assert flops.total / 1e12 == pytest.approx(teraflops, abs=0.51)


def test_parts_are_those_that_the_operations_declare():
    cfg, case = WAN["1.3b"], OPS["routed_ffn"].cases["wan2.1-1.3b/480x832x81"]
    flops = forward_flops(cfg, video_rows=32760, text_rows=256)

    def layers(op: str) -> int:
        return cfg.layers * OPS[op].flops(case)

    assert flops.joint_attention == layers("joint_attention")
    assert flops.cross_attention == layers("cross_attention")
    assert flops.video_ffn + flops.text_ffn == layers("routed_ffn")
    assert flops.self_projections == 4 * layers("linear") == 2 * flops.cross_projections
    assert flops.text_head == OPS["vocab_loss"].flops(case)


@pytest.mark.parametrize("name", ["tiny", "tiny-embedding", "wan2.1-1.3b", "wan2.1-14b"])
def test_parameters_of_the_presets(name):
    model = UniViGU(PRESETS[name], device="meta", kernels="reference")
    assert parameters(PRESETS[name]) == sum(p.numel() for p in model.parameters())


def test_published_parameters():
    assert parameters(WAN["1.3b"]) == 3_048_678_464
    assert parameters(WAN["14b"]) == pytest.approx(22.76e9, rel=1e-3)


PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H100 NVL": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": None,
    "NVIDIA GeForce RTX 4090": None,
    "cpu": None,
}


@pytest.mark.parametrize("board", PEAKS)
def test_peaks(board):
    assert peak_flops(board) == peak_flops(board, "torch.float16") == PEAKS[board]
    assert peak_flops(board, "float32") is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"recompute": "some"}, "recompute must be one of none, attention, block; got 'some'"),
        ({"frozen": ["joint_attention"]}, "frozen must be one of patches, .* 'joint_attention'"),
    ],
)
def test_unknown_names_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        train_flops(TINY, **SIZES, **wrong)


def test_no_tensor_library_is_imported():
    code = "import sys, engine.planning.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_policies_are_those_of_the_model():
    assert list(flops.RECOMPUTED) == list(recompute.POLICIES)
