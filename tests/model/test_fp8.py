"""Models with fp8 experts: conversion, files, and how far they are from what they were."""

import json
from pathlib import Path

import pytest
import torch
from contracts import DEVICE
from parallel_runs import make_batch
from safetensors.torch import load_file, save_file

from engine import (
    ModelConfig,
    ModelFileError,
    TrainConfig,
    TrainState,
    UniViGU,
    UsageError,
    load_model,
    save_pretrained,
    train_step,
)
from engine.fp8 import FP8, drift, quantize, train_in_fp8
from engine.weights import convert as convert_file
from univigu_kernels import OPS, bind, explain, quantize_weight

GOLDEN = Path(__file__).parents[1] / "golden/univigu_small.weights.safetensors"
CFG = ModelConfig(heads=2, head_dim=12, layers=3, ffn_dim=140, text_dim=20, freq_dim=16, vocab=30)
EXPERTS = [
    f"blocks.{i}.{e}.{p}" for i in range(3) for e in ("ffn", "ffn_t") for p in ("up", "down")
]


def make_model(precision="bf16", dtype=torch.float32, kernels="reference"):
    ops = bind(kernels, DEVICE, dtype, precision=precision)
    model = UniViGU(CFG, DEVICE, dtype, ops)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * values)
    return model


def make_fp8(**options):
    return quantize(make_model("fp8", **options))


def make_inputs():
    generator = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    tokens = torch.randint(30, (2, 3), generator=generator).to(DEVICE)
    times = (torch.tensor(t, device=DEVICE) for t in ([500.0, 900.0], [250.0, 800.0]))
    return randn(2, 16, 1, 4, 6), tokens, *times, randn(2, 5, 20)


def run(model, inputs):
    with torch.no_grad():
        output = model(*inputs)
    return output.velocity, output.logits


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value.cpu().double(), b[name].cpu().double()), name


@pytest.fixture
def folder(tmp_path):
    """A folder with a model that is not quantised."""
    save_pretrained(make_model(), tmp_path / "plain")
    return tmp_path / "plain"


def test_conversion_quantises_the_experts_alone():
    before, after = make_model().state_dict(), make_fp8().state_dict()
    for name in EXPERTS:
        weight, scale = quantize_weight(before.pop(f"{name}.weight"))
        assert after[f"{name}.weight"].dtype == FP8
        assert torch.equal(after.pop(f"{name}.weight").float(), weight.float())
        assert torch.equal(after.pop(f"{name}.weight_scale"), scale)
    assert_same(after, before)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_every_block_drifts_by_what_e4m3_costs(kernels):
    """Two roundings of 2.7% and two of weights in a branch, beside attention and the residual."""
    found = drift(make_model(kernels=kernels), make_fp8(kernels=kernels), make_inputs())
    assert [d.where for d in found] == ["block 0", "block 1", "block 2", "velocity", "logits"]
    for d in found:
        assert 1e-3 < d.relative_error < 0.08
        assert d.cosine == pytest.approx(1 - d.relative_error**2 / 2, abs=1e-3)


def test_drift_of_a_model_from_itself_is_none():
    model = make_model()
    assert all(d[1:] == (1, 0) for d in drift(model, model, make_inputs()))
    assert not any(block._forward_hooks for block in model.blocks)


def test_backends_agree():
    inputs = make_inputs()
    for a, b in zip(run(make_fp8(), inputs), run(make_fp8(kernels="auto"), inputs), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()  # an fp32 rounding may turn an e4m3 one


def test_each_modality_keeps_its_expert():
    """NaN in the text rows' experts leaves the first block's video rows alone."""
    model, seen = make_fp8(), []
    model.blocks[0].ffn_t.up.weight_scale.fill_(torch.nan)
    handle = model.blocks[0].register_forward_hook(lambda *a: seen.append(a[-1][0]))
    run(model, make_inputs())
    handle.remove()
    assert seen[0][:, :6].isfinite().all() and seen[0][:, 6:].isnan().all()


def test_an_fp8_model_takes_no_gradients():
    assert not any(p.requires_grad for p in make_fp8().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_saved_and_loaded_is_bit_equal(tmp_path, dtype, max_shard_bytes):
    model = make_fp8(dtype=dtype)
    save_pretrained(model, tmp_path, max_shard_bytes=max_shard_bytes)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["precision"] == "fp8"
    for precision in (None, "fp8"):
        loaded = load_model(tmp_path, DEVICE, dtype, "reference", precision)
        assert_same(loaded.state_dict(), model.state_dict())
        inputs = make_inputs()
        for a, b in zip(run(loaded, inputs), run(model, inputs), strict=True):
            assert torch.equal(a, b)


def test_loading_as_fp8_is_converting(tmp_path, folder):
    want = make_fp8().state_dict()
    model = load_model(folder, DEVICE, kernels="reference", precision="fp8")
    assert_same(model.state_dict(), want)
    assert model.ops.precision == "fp8" and not any(p.requires_grad for p in model.parameters())
    assert "precision" not in json.loads((folder / "config.json").read_text())
    convert_file(folder, tmp_path / "fp8", precision="fp8")
    save_pretrained(make_fp8(), tmp_path / "saved")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "saved")]
    assert_same(*files)
    convert_file(tmp_path / "fp8", tmp_path / "again")  # fp8 stays fp8
    assert_same(load_file(tmp_path / "again/model.safetensors"), files[0])


def test_weights_are_quantised_from_what_the_file_holds():
    """Not from its rounding to the model's dtype."""
    model = load_model(GOLDEN, dtype=torch.bfloat16, kernels="reference", precision="fp8")
    weight = load_file(GOLDEN)["blocks.1.ffn_t.net.2.weight"]
    values, scale = quantize_weight(weight)
    down = model.blocks[1].ffn_t.down
    assert torch.equal(down.weight.float(), values.float()) and torch.equal(
        down.weight_scale, scale
    )
    assert down.bias.dtype == torch.bfloat16


def test_one_tensor_is_quantised_at_a_time(folder, monkeypatch):
    """No read tensor outlives the next one's reading."""
    import weakref

    alive = []

    def counted(weight):
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(weight))
        return quantize_weight(weight)

    monkeypatch.setattr("engine.weights.load.quantize_weight", counted)
    load_model(folder, kernels="reference", precision="fp8")
    assert len(alive) == 2 * len(EXPERTS)  # values, then scale


def test_saving_in_a_dtype_leaves_fp8_and_its_scales(tmp_path):
    save_pretrained(make_fp8(), tmp_path, dtype=torch.bfloat16)
    stock = load_file(tmp_path / "model.safetensors")
    dtypes = {
        stock[f"blocks.0.ffn.net.0.proj.{n}"].dtype for n in ("weight", "weight_scale", "bias")
    }
    assert dtypes == {FP8, torch.float32, torch.bfloat16}
    load_model(tmp_path, dtype=torch.bfloat16, kernels="reference")


def test_an_fp8_folder_is_not_taken_for_another(tmp_path):
    save_pretrained(make_fp8(), tmp_path)
    with pytest.raises(UsageError, match=rf"{tmp_path}.*e4m3.*precision='fp8'"):
        load_model(tmp_path, precision="bf16")
    with pytest.raises(UsageError, match="convert: precision must be fp8"):
        convert_file(tmp_path, tmp_path / "bf16", precision="bf16")
    with pytest.raises(UsageError, match="precision must be bf16 or fp8; got 'fp16'"):
        load_model(tmp_path, precision="fp16")


def test_a_lone_file_of_an_fp8_model(tmp_path):
    save_pretrained(make_fp8(), tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = load_model(tmp_path / "model.safetensors", kernels="reference")
    assert_same(loaded.state_dict(), make_fp8().state_dict())


def edited(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


WEIGHT = "blocks.0.ffn.net.0.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{WEIGHT}_scale"), r"missing 1: blocks\.0\.ffn.*weight_scale"),
        (lambda s: s.update({WEIGHT: s[WEIGHT].float()}), r"not F8_E4M3 1: blocks\.0\.ffn.* F32"),
        (lambda s: s.update({f"{WEIGHT}_scale": torch.ones(3)}), r"mis-shaped 1: .*_scale \[3\]"),
        (
            lambda s: s.update({"blocks.0.norm2.bias": torch.ones(24).to(FP8)}),
            r"not floating point 1: blocks\.0\.norm2\.bias F8_E4M3",
        ),
    ],
)
def test_damaged_fp8_folders_are_refused(tmp_path, change, message):
    save_pretrained(make_fp8(), tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path, kernels="reference")


def test_config_and_tensors_must_agree(tmp_path, folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"precision": "fp8"}))
    with pytest.raises(
        ModelFileError, match="precision must be bf16, as in the tensors; got 'fp8'"
    ):
        load_model(folder, kernels="reference")


def test_conversions_that_make_no_sense():
    with pytest.raises(UsageError, match="bound with precision='fp8'; got 'bf16'. Use load_model"):
        quantize(make_model())
    with pytest.raises(UsageError, match="must not be quantised yet"):
        quantize(make_fp8())


def test_on_a_cpu_kernels_that_write_no_fp8_say_so(folder):
    if next(b for b in OPS["linear"].backends if b.name == "cpu").supports(
        torch.device("cpu"), torch.float32
    ):
        pytest.skip("needs the compiled CPU kernels")
    ops = load_model(folder, kernels="linear=cpu", precision="fp8").ops
    lines = {line.split()[0]: line for line in explain(ops).splitlines()}
    assert "cpu: writes no fp8" in lines["residual_adaln"]
    assert "writes no fp8" not in "".join(lines[op] for op in lines if op != "residual_adaln")


def test_a_quantised_model_is_not_trained():
    with pytest.raises(UsageError, match="train: model must not be quantised; got fp8"):
        TrainState.create(make_fp8(), TrainConfig())


def test_training_for_fp8_runs_forward_as_the_converted_model():
    trained, converted = make_model(), make_fp8()
    train_in_fp8(trained)
    plain = run(make_model(), make_inputs())
    for a, b, c in zip(*(run(m, make_inputs()) for m in (trained, converted)), plain, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)
            assert not torch.allclose(a, c, rtol=1e-3)


def test_training_for_fp8_has_the_gradients_of_the_weights_themselves():
    model = make_model()
    train_in_fp8(model)
    block, g = model.blocks[0], torch.Generator().manual_seed(3)
    h, dy = torch.randn(2, 2, 9, CFG.dim, generator=g).to(DEVICE).unbind()
    leaves = [h.requires_grad_(), *block.ffn.parameters(), *block.ffn_t.parameters()]
    routes = [
        call(h, block.ffn.expert, block.ffn_t.expert, 6)
        for call in (block.route, model.ops.routed_ffn)
    ]
    assert not torch.equal(*routes)
    both = [torch.autograd.grad(y, leaves, dy) for y in routes]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_a_step_of_training_for_fp8_moves_all_experts(recompute):
    model = make_model()
    rows = make_batch((1, 4, 6), 3)
    ids = {name: rows[name] % 30 for name in ("prompt_tokens", "caption_tokens")}
    rows |= ids | {"context": torch.randn(4, 5, 20), "null_context": torch.randn(5, 20)}
    rows = {name: x.to(DEVICE) for name, x in rows.items()}
    settings = TrainConfig(stage="refine", batch_size=4, precision="fp8", recompute=recompute)
    state = TrainState.create(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = train_step(state, rows)
    assert metrics["loss"].isfinite() and state.skipped.item() == 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {f"{name}.weight" for name in EXPERTS}
