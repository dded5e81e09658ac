"""Adapters of a running pipeline: switched in place between runs, under captured steps, from kept
base weights."""

import threading
from dataclasses import replace

import adapter_files as made
import numpy as np
import pytest
import torch
from tiny_sampling import finish, make, model

import engine
from engine.config import EMBEDDED
from engine.errors import ModelFileError, UsageError
from engine.graphs import Graphs
from engine.weights import load_model, save_pretrained
from engine.weights.merge import Adapters

MODULES = ["attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0", "ffn.net.0.proj"]
SIZE = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "progress": False}


def bits(net) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone().view(torch.uint8) for name, t in net.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adapter(path, net, seed: int, modules=MODULES, rank: int = 3, size: float = 0.2):
    """A file for the blocks of a model of ours, in ComfyUI's spelling."""
    from engine.weights.merge import shapes_of

    g, tensors, shapes = torch.Generator().manual_seed(seed), {}, shapes_of(net)
    for i in range(net.cfg.layers):
        for stem in (f"blocks.{i}.{module}" for module in modules):
            N, M = shapes[f"{stem}.weight"]
            key = f"diffusion_model.{made.original(stem)}"
            tensors[f"{key}.lora_A.weight"] = size * torch.randn(rank, M, generator=g)
            tensors[f"{key}.lora_B.weight"] = size * torch.randn(N, rank, generator=g)
    return made.write(path / f"style{seed}.safetensors", tensors)


@pytest.fixture
def pipe():
    return engine.Pipeline.from_pretrained(EMBEDDED, "cpu")


def test_adapters_switch_between_two_requests(pipe, tmp_path):
    files = [adapter(tmp_path, pipe.model, seed) for seed in (1, 2)]
    places = [p.data_ptr() for p in pipe.model.parameters()]
    before, plain = bits(pipe.model), pipe.generate("red", **SIZE)
    assert [pipe.load_lora_weights(file, scale=0.5) for file in files] == ["style1", "style2"]
    both = pipe.generate("red", **SIZE)
    assert both.settings["adapters"] == {"style1": 0.5, "style2": 0.5}

    pipe.set_adapters("style2", 0.5)
    alone = pipe.generate("red", **SIZE)
    assert alone.settings["adapters"] == {"style2": 0.5}
    assert (alone.frames != both.frames).any() and (alone.frames != plain.frames).any()
    fresh = engine.Pipeline.from_pretrained(EMBEDDED, "cpu")
    fresh.load_lora_weights(files[1], "style2", 0.5)
    assert same(bits(fresh.model), bits(pipe.model))

    pipe.set_adapters([])
    again = pipe.generate("red", **SIZE)
    assert (again.frames == plain.frames).all() and "adapters" not in again.settings
    pipe.set_adapters(["style2", "style1"], np.float32(0.25))
    assert pipe.adapters.scales == {"style2": 0.25, "style1": 0.25}
    pipe.set_adapters(["style2", "style1"])
    assert pipe.adapters.scales == {"style2": 0.5, "style1": 0.5}
    pipe.unload_lora_weights()
    assert same(bits(pipe.model), before)
    assert [p.data_ptr() for p in pipe.model.parameters()] == places
    assert (pipe.adapters.bytes, pipe.adapters.loaded) == (0, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_100_switches_leave_the_weights_bit_for_bit(tmp_path, dtype):
    net, adapters = model(dtype), Adapters()
    before = bits(net)
    for seed in (1, 2):
        adapters.load(net, adapter(tmp_path, net, seed), f"{seed}", 1.0)
    for i in range(100):
        adapters.set(net, ["1", "2"] if i % 2 else "1", 0.1 + 0.03 * i)
    assert not same(bits(net), before)
    adapters.set(net, [])
    assert same(bits(net), before)


def test_a_sum_is_rounded_once(tmp_path):
    """Two changes that bf16 would lose one by one are both there."""
    net, adapters = model(torch.bfloat16), Adapters()
    files = [adapter(tmp_path, net, seed, size=0.04) for seed in (1, 2)]
    weight = net.blocks[0].attn2.to_out.weight
    total = weight.detach().float()
    for seed, file in enumerate(files):
        adapters.load(net, file, f"{seed}", 0.7)
        down, up = load_pair(file, "diffusion_model.blocks.0.cross_attn.o")
        total.addmm_(up, down, alpha=0.7)
    assert torch.equal(weight, total.bfloat16())


def load_pair(file, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]


def test_captured_steps_see_a_change_and_stay(tmp_path):
    """A step captured before the change is replayed after it, and gives what a new one would."""
    net, adapters, captured = model(), Adapters(), []

    def capture(function, state, pool):
        captured.append(function)
        return function

    graphs = Graphs(capture=capture)
    plain = finish(make(net, "t2v", graphs=graphs)).latents
    count = len(captured)
    adapters.load(net, adapter(tmp_path, net, 1), "one", 1.0)
    changed = finish(make(net, "t2v", graphs=graphs)).latents
    assert len(captured) == count and len(graphs.steps) == 1
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, finish(make(net, "t2v")).latents)
    adapters.set(net, [])
    assert torch.equal(finish(make(net, "t2v", graphs=graphs)).latents, plain)


def test_a_change_waits_for_the_run_and_later_runs_for_it(pipe, tmp_path):
    pipe.load_lora_weights(adapter(tmp_path, pipe.model, 1), "one")
    pipe.set_adapters([])
    plain, order = pipe.generate("red", **SIZE).frames, []
    weight = pipe.model.blocks[0].ffn.up.weight

    def change():
        pipe.set_adapters("one")
        order.append("changed")

    def callback(pipe, step, time, tensors):
        if step == 0:
            thread.start()
            thread.join(0.3)
            order.append("first step" if thread.is_alive() else "too early")
            before.append(weight.detach().clone())
        else:
            order.append("last step")
            assert torch.equal(weight, before[0])
        return tensors

    thread, before = threading.Thread(target=change), []
    result = pipe.generate("red", callback_on_step_end=callback, **SIZE)
    thread.join()
    assert order == ["first step", "last step", "changed"]
    assert (result.frames == plain).all() and not torch.equal(weight, before[0])


def test_a_change_from_a_callback_is_refused_and_a_run_in_one_is_not(pipe, tmp_path):
    pipe.load_lora_weights(adapter(tmp_path, pipe.model, 1), "one")

    def change(pipe, step, time, tensors):
        pipe.set_adapters([])

    with pytest.raises(UsageError, match="between two runs; got a call within one"):
        pipe.generate("red", callback_on_step_end=change, **SIZE)
    waiting = threading.Thread(target=pipe.set_adapters, args=([],))

    def run(pipe, step, time, tensors):
        if not waiting.ident:
            waiting.start()
            waiting.join(0.2)
            pipe.generate("blue", **SIZE)
        return tensors

    pipe.generate("red", callback_on_step_end=run, **SIZE)
    waiting.join()
    assert pipe.adapters.scales == {}


def test_a_pipeline_moved_to_another_dtype_keeps_its_adapters(pipe, tmp_path):
    file = adapter(tmp_path, pipe.model, 1)
    pipe.load_lora_weights(file, "one", 0.5)
    pipe.to(torch.bfloat16)
    merged = load_model(EMBEDDED / "transformer", dtype=torch.bfloat16, lora=[(file, 0.5)])
    assert same(bits(pipe.model), bits(merged))
    pipe.unload_lora_weights()
    assert same(bits(pipe.model), bits(load_model(EMBEDDED / "transformer", dtype=torch.bfloat16)))


def test_fused_adapters_stay_and_their_base_goes(pipe, tmp_path):
    file = adapter(tmp_path, pipe.model, 1)
    pipe.load_lora_weights(file)
    merged = bits(pipe.model)
    changed = {f"blocks.{i}.{m}" for i in range(4) for m in ("attn1.to_qkv", "ffn.up")}
    assert changed <= {name.removesuffix(".weight") for name in pipe.adapters.base}
    kept = {name: pipe.model.state_dict()[name].nbytes for name in pipe.adapters.base}
    assert len(kept) == 4 * 4 and pipe.adapters.bytes == sum(kept.values())
    pipe.fuse_lora()
    assert pipe.adapters.bytes == 0 and same(bits(pipe.model), merged)
    pipe.unload_lora_weights()
    assert same(bits(pipe.model), merged)


def test_one_of_two_is_deleted_with_what_it_alone_changed(pipe, tmp_path):
    pipe.load_lora_weights(adapter(tmp_path, pipe.model, 1, ["attn1.to_q"]), "one", 0.5)
    pipe.load_lora_weights(adapter(tmp_path, pipe.model, 2, ["attn1.to_k", "ffn.net.2"]), "two")
    before = pipe.adapters.bytes
    pipe.delete_adapters("two")
    assert pipe.adapters.scales == {"one": 0.5} and pipe.adapters.bytes < before
    fresh = engine.Pipeline.from_pretrained(EMBEDDED, "cpu")
    fresh.load_lora_weights(tmp_path / "style1.safetensors", scale=0.5)
    assert same(bits(fresh.model), bits(pipe.model))
    pipe.delete_adapters(["one"])
    assert pipe.adapters.bytes == 0


def test_fp8_is_quantised_anew_from_the_file(tmp_path):
    options = {"device": "cpu", "precision": "fp8"}
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, **options)
    before, file = bits(pipe.model), adapter(tmp_path, pipe.model, 1)
    places = {name: t.data_ptr() for name, t in pipe.model.state_dict().items()}
    pipe.load_lora_weights(file, "one", 0.5)
    merged = load_model(EMBEDDED / "transformer", precision="fp8", lora=[(file, 0.5)])
    assert same(bits(pipe.model), bits(merged)) and not same(before, bits(pipe.model))
    pipe.set_adapters([])
    assert same(bits(pipe.model), before)
    assert {name: t.data_ptr() for name, t in pipe.model.state_dict().items()} == places

    pipe.set_adapters("one")
    pipe.fuse_lora()
    assert same(bits(pipe.model), bits(merged))
    with pytest.raises(UsageError, match="the model has 4 in e4m3"):  # the file is not its source
        pipe.load_lora_weights(file, "two")


def test_fp8_without_its_source_is_refused_by_name_and_attention_is_not(tmp_path):
    narrow = tmp_path / "fp8"
    save_pretrained(load_model(EMBEDDED / "transformer", precision="fp8"), narrow)
    pipe = engine.Pipeline.from_pretrained(EMBEDDED, "cpu", transformer_path=narrow)
    before = bits(pipe.model)
    with pytest.raises(UsageError, match=r"fp8 has 4 in e4m3: blocks.0.ffn.up.weight.*precision"):
        pipe.load_lora_weights(adapter(tmp_path, pipe.model, 1))
    assert same(bits(pipe.model), before) and not pipe.adapters.loaded
    pipe.load_lora_weights(adapter(tmp_path, pipe.model, 2, ["attn1.to_q"]))
    assert not same(bits(pipe.model), before)
    pipe.unload_lora_weights()
    assert same(bits(pipe.model), before)


def test_keys_of_the_text_expert_and_of_both_heads(tmp_path):
    net, adapters = model(torch.float32), Adapters()
    stems = ["blocks.1.ffn_t.net.2", "text_head.linear", "time_embedding_t.time_proj"]
    tensors = {}
    for stem in stems:
        N, M = net.get_parameter(stem.replace("net.2", "down") + ".weight").shape
        tensors[f"transformer.{stem}.lora_A.weight"] = torch.ones(2, M)
        tensors[f"transformer.{stem}.lora_B.weight"] = torch.ones(N, 2)
    before = bits(net)
    adapters.load(net, made.write(tmp_path / "text.safetensors", tensors), "text", 1.0)
    after = bits(net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{stem.replace('net.2', 'down')}.weight" for stem in stems}


def test_names_and_scales_are_checked(pipe, tmp_path):
    file = adapter(tmp_path, pipe.model, 1, ["attn1.to_q"])
    assert [pipe.load_lora_weights(file) for _ in range(3)] == ["style1", "style1-2", "style1-3"]
    before = bits(pipe.model)

    for call, said in (
        (lambda: pipe.load_lora_weights(file, "style1"), "must be a new one; got 'style1'"),
        (lambda: pipe.load_lora_weights(file, ""), "must be a new one; got ''"),
        (lambda: pipe.load_lora_weights(file, "x", float("nan")), "finite number; got nan"),
        (lambda: pipe.load_lora_weights(file, "x", "1"), "finite number; got '1'"),
        (lambda: pipe.load_lora_weights(file, "x", True), "finite number; got True"),
        (lambda: pipe.set_adapters("other"), "must be loaded; got other beside style1, style1-2"),
        (lambda: pipe.set_adapters(["style1"], [1, 2]), "got 2 for style1"),
        (lambda: pipe.set_adapters(["style1", "style1"]), "named once; got 2"),
        (lambda: pipe.delete_adapters("other"), "must be loaded"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    with pytest.raises(ModelFileError, match="a LoRA must be a file"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    assert same(bits(pipe.model), before) and len(pipe.adapters.loaded) == 3


def test_an_adapter_of_another_size_changes_nothing(pipe, tmp_path):
    other = engine.UniViGU(replace(pipe.model.cfg, layers=6))
    before = bits(pipe.model)
    with pytest.raises(ModelFileError, match="without a counterpart in this model 20: "):
        pipe.load_lora_weights(adapter(tmp_path, other, 1))
    assert same(bits(pipe.model), before) and pipe.adapters.bytes == 0
