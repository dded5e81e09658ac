"""The model against the official implementation's stored tensors and against diffusers' Wan,
live."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import engine
from engine.weights.names import to_stock
from univigu_kernels import _compiled

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = ["reference", "sdpa", "triton"] + ["cpu"] * _compiled.built()
ADDED = ("ffn_t.", "time_embedding_t.", "scale_shift_table_t", "vocab_embed.", "text_head.")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def golden(name, kernels="auto", dtype=torch.float32):
    model = engine.load_model(GOLDEN / f"{name}.weights.safetensors", dtype=dtype, kernels=kernels)
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    inputs = [io[k] for k in ("x_v", "x_t", "time_v", "time_t", "cond_t")]
    return model, io, inputs, io["text_mask"].sum(1)


def randomise(model, seed=0):
    """Weights of order one everywhere, so that no term hides behind a zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
            p.add_(
                torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype) * scale
            )
    return model


SOAKED = {("univigu_small", "triton"): pytest.mark.soak}


# The small model's forward under the interpreter is the beginning of its gradients' test below.
@pytest.mark.parametrize(
    "name, kernels",
    [
        pytest.param(name, kernels, marks=SOAKED.get((name, kernels), ()))
        for name in ("univigu_small", "univigu_masked")
        for kernels in KERNELS
    ],
)
def test_forward_equals_the_official_one(name, kernels):
    model, io, inputs, lengths = golden(name, kernels)
    with torch.no_grad():
        plain, masked = model(*inputs), model(*inputs, text_lengths=lengths)
    assert relative(plain.velocity, io["out_v"]) < 2e-5
    assert relative(plain.logits, io["out_t"]) < 2e-5
    assert relative(masked.velocity, io["out_v_masked"]) < 2e-5
    real = io["text_mask"]
    assert relative(masked.logits[real], io["out_t_masked"][real]) < 2e-5


@pytest.mark.parametrize("kernels", KERNELS[1:])
def test_every_gradient_equals_the_official_one(kernels):
    model, io, inputs, lengths = golden("univigu_small", kernels)
    stored = load_file(GOLDEN / "univigu_small.grads.safetensors")
    out = model(*inputs, text_lengths=lengths)
    loss_v = F.mse_loss(out.velocity, stored["target_v"])
    loss_t = F.cross_entropy(out.logits[io["text_mask"]], stored["target_t"][io["text_mask"]])
    assert relative(loss_v, stored["loss_v"]) < 1e-5 and relative(loss_t, stored["loss_t"]) < 1e-5
    (loss_v + loss_t).backward()
    gradients = to_stock({k: p.grad for k, p in model.named_parameters()}, model.cfg)
    del gradients["rotary_emb_text.inv_freq"]  # written for the official loader
    wanted = {k.removeprefix("grad."): v for k, v in stored.items() if k.startswith("grad.")}
    assert set(gradients) == set(wanted)
    wrong = {k: relative(gradients[k], v) for k, v in wanted.items()}
    assert {k: e for k, e in wrong.items() if not e < 1e-4} == {}


def test_fp64_runs_and_agrees_with_fp32():
    model, io, inputs, _ = golden("univigu_small", dtype=torch.float64)
    with torch.no_grad():
        out = model(*inputs)
    assert out.velocity.dtype == out.logits.dtype == torch.float64
    assert relative(out.velocity, io["out_v"].double()) < 2e-5


@pytest.mark.parametrize(
    "heads,head_dim,layers,grid",
    [(2, 128, 2, (3, 8, 6)), (3, 24, 3, (2, 4, 10)), (4, 64, 1, (1, 2, 2))],
)
def test_without_text_rows_it_is_diffusers_wan(heads, head_dim, layers, grid, tmp_path):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(heads)
    wan = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        ffn_dim=96,
        text_dim=40,
        freq_dim=64,
    )
    randomise(wan).save_pretrained(tmp_path)
    model = engine.load_model(tmp_path)
    video, context = (
        torch.randn(2, 16, *(n * s for n, s in zip(grid, (1, 2, 2), strict=True))),
        torch.randn(2, 9, 40),
    )
    time = torch.tensor([1000.0, 137.25])
    with torch.no_grad():
        ours = model(video, torch.empty(2, 0, dtype=torch.long), time, time, context).velocity
        theirs = wan(video, time, context, return_dict=False)[0]
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "name,wan,total",
    [("wan2.1-1.3b", 1_418_996_800, 3_048_678_464), ("wan2.1-14b", 14_288_491_584, None)],
)
def test_parameter_counts(name, wan, total):
    cfg = replace(engine.ModelConfig.preset(name), vocab=256_000)
    sizes = {k: p.numel() for k, p in engine.UniViGU(cfg, device="meta").named_parameters()}
    assert sum(n for k, n in sizes.items() if not any(a in k for a in ADDED)) == wan
    assert total is None or sum(sizes.values()) == total
    assert round(sum(sizes.values()) / 1e9, 2) == {"wan2.1-1.3b": 3.05, "wan2.1-14b": 22.76}[name]


def tiny(**changes):
    cfg = replace(engine.ModelConfig.preset("tiny"), layers=2, **changes)
    torch.manual_seed(0)
    return randomise(engine.UniViGU(cfg, dtype=torch.float64))


def inputs_of(model, B=2, T=6, C=5):
    g = torch.Generator().manual_seed(1)
    video = torch.randn(B, 16, 2, 4, 6, generator=g, dtype=torch.float64)
    tokens = torch.randint(0, model.cfg.vocab, (B, T), generator=g)
    if model.cfg.text_flow == "embedding":
        tokens = torch.randn(B, T, model.cfg.dim, generator=g, dtype=torch.float64)
    times = torch.tensor([[900.0, 31.0], [12.0, 500.0]], dtype=torch.float64)[:, :B]
    return [
        video,
        tokens,
        *times,
        torch.randn(B, C, model.cfg.text_dim, generator=g, dtype=torch.float64),
    ]


def test_text_lengths_equal_cutting_the_rows_off():
    model = tiny()
    video, tokens, tv, tt, context = inputs_of(model)
    lengths = torch.tensor([6, 3])
    with torch.no_grad():
        both = model(video, tokens, tv, tt, context, text_lengths=lengths)
        for b, n in enumerate(lengths.tolist()):
            alone = model(
                video[b : b + 1],
                tokens[b : b + 1, :n],
                tv[b : b + 1],
                tt[b : b + 1],
                context[b : b + 1],
            )
            assert relative(both.velocity[b], alone.velocity[0]) < 1e-12
            assert relative(both.logits[b, :n], alone.logits[0]) < 1e-12


def test_video_sees_text_decides_whether_text_moves_the_video():
    for sees in (True, False):
        model = tiny(video_sees_text=sees)
        video, tokens, tv, tt, context = inputs_of(model)
        with torch.no_grad():
            a, b = (
                model(video, tokens, tv, tt, context),
                model(video, tokens.flip(1), tv, tt * 0.3, context),
            )
        assert torch.equal(a.velocity, b.velocity) != sees
        assert not torch.equal(a.logits, b.logits)


def test_each_modality_has_its_own_time():
    model = tiny()
    video, tokens, tv, tt, context = inputs_of(model)
    with torch.no_grad():
        assert not torch.equal(
            model(video, tokens, tv, tt, context)[0], model(video, tokens, tt, tv, context)[0]
        )


def test_embedding_flow_gives_a_text_velocity():
    model = tiny(text_flow="embedding")
    args = inputs_of(model)
    out = model(*args)
    assert out.logits is None and out.text_velocity.shape == args[1].shape


def test_bf16_keeps_the_residual_and_the_modulation_in_fp32():
    model = engine.UniViGU(
        replace(engine.ModelConfig.preset("tiny"), layers=1), dtype=torch.bfloat16
    )
    dtypes = {k: p.dtype for k, p in model.named_parameters()}
    wide = {k for k, d in dtypes.items() if d == torch.float32}
    assert all(
        ("norm" in k or "scale_shift" in k or "time_embedding" in k) == (k in wide) for k in dtypes
    )
    seen = []
    model.blocks[0].register_forward_hook(
        lambda _, args, out: seen.append((args[0].dtype, out[0].dtype, out[1].dtype))
    )
    model(*[x.float() if x.is_floating_point() else x for x in inputs_of(model)])
    assert seen == [(torch.float32, torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("change,word", [(0, "video"), (1, "tokens"), (2, "t_video")])
def test_wrong_shapes_are_named(change, word):
    args = inputs_of(tiny())
    args[change] = args[change][..., :-1] if change != 1 else args[1][0]
    with pytest.raises(ValueError, match=f"model: {word} must"):
        tiny()(*args)


def test_hiding_text_is_as_having_been_made_without():
    model, made = tiny(), tiny(video_sees_text=False)
    made.load_state_dict(model.state_dict())
    args = inputs_of(model)
    with torch.no_grad():
        assert not torch.equal(model(*args).velocity, made(*args).velocity)
        model.hide_text_from_video()
        assert torch.equal(model(*args).velocity, made(*args).velocity)
    assert model.cfg == made.cfg
