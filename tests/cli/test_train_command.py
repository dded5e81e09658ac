"""`univigu train`: the flags that choose precision, layout and what is trained."""

import json

import pytest
import torch
from checkpoint_runs import make_shard

import univigu_kernels
from engine.cli import main
from engine.weights import load_model, save_pretrained

FLAGS = "train --preset tiny --data shard.safetensors --steps 2 --batch-size 4 --quiet"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(more flags) -> (exit code, stdout, stderr), in a folder that holds a shard."""
    make_shard(tmp_path / "shard.safetensors", width=64)
    monkeypatch.chdir(tmp_path)

    def call(more: str) -> tuple[int, str, str]:
        code = main([*FLAGS.split(), "--output-path", "out", *more.split()])
        return code, *capsys.readouterr()

    return call


def test_a_dry_run_predicts_and_writes_nothing(run, tmp_path):
    code, out, err = run("--dry-run --processes 4 --sp 2 --dtype bfloat16")
    assert (code, err) == (0, "")
    assert "rank 0 of 4 (dp_replicate 1, dp_shard 2, sp 2)" in out
    assert "batch of 4, 15 rows each" in out  # the shard's size: 8 video rows, 7 of text
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["none", "attention", "block"]
    assert not (tmp_path / "out").exists()


def test_kernels_are_chosen_for_the_steps_to_come(run, monkeypatch):
    """`bind` gets the rows of the largest clips and a micro-batch's samples: on a GPU its trial is
    of these."""
    asked, real = [], univigu_kernels.bind

    def bind(*arguments, **keywords):
        asked.append(keywords)
        return real(*arguments, **keywords)

    monkeypatch.setattr(univigu_kernels, "bind", bind)
    assert run("--micro-batch-size 2")[0] == 0
    check, keywords = asked
    assert not check
    rows = {"B": 2, "V": 8, "T": 7, "C": 5}
    widths = {"D": 192, "H": 3, "K": 64, "F": 512}
    assert keywords == {"case": rows | widths, "training": True, "once": None}


def test_ranks_that_share_samples_have_fewer_heads():
    from engine.config import ModelConfig, TrainConfig
    from engine.train.step import case_of

    size = ((16, 21, 60, 104), (256,), (512, 4096))
    cfg, config = ModelConfig.preset("wan2.1-1.3b"), TrainConfig(batch_size=16)
    whole = case_of(cfg, config, size)
    assert (whole["V"], whole["T"], whole["H"], whole["B"]) == (32760, 256, 12, 16)
    assert case_of(cfg, config, size, 4, 4) == whole | {"B": 4, "H": 3}
    assert case_of(cfg, config, size, 2, 8)["H"] == 3  # 8 ranks exchange for 4 groups of heads


def test_adapters_change_the_matrices_of_blocks_alone_and_are_merged(run, tmp_path):
    assert run("--lr 1 --warmup 1 --ema 0 --lora-rank 2 --save-dtype float32")[0] == 0
    torch.manual_seed(0)
    from engine import ModelConfig, UniViGU

    base, trained = UniViGU(ModelConfig.preset("tiny")), load_model(tmp_path / "out" / "model")
    moved = {
        name
        for (name, p), q in zip(base.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved and all(n.startswith("blocks.") and n.endswith("weight") for n in moved)
    assert not any("norm" in name for name in moved)
    change = trained.blocks[0].ffn.up.weight - base.blocks[0].ffn.up.weight
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-3) == 2


def test_adapters_are_not_resumed_on_another_model(run, tmp_path):
    assert run("--lora-rank 2 --warmup 0")[0] == 0
    code, _, err = run("--lora-rank 2 --warmup 0 --resume --blind-video")
    assert code == 4 and "video_sees_text" in err
    model = load_model(tmp_path / "out" / "model")
    with torch.no_grad():
        model.patch_embedding.bias += 1
    save_pretrained(model, tmp_path / "other")
    flags = FLAGS.replace("--preset tiny", "--init-from other --output-path out --resume")
    assert main([*flags.split(), "--lora-rank", "2", "--warmup", "0"]) == 4


def test_norms_alone_are_trained_in_bf16(run, tmp_path):
    """All weights that a bf16 model has a copy of are frozen."""
    wide = "*attn*.to_*,*ffn*,*embed*,*head.linear*,*proj_out*"
    assert run(f"--dtype bfloat16 --freeze {wide}")[0] == 0


def test_frozen_parameters_stay(run, tmp_path):
    assert run("--freeze *attn*,blocks.*.ffn.*")[0] == 0
    torch.manual_seed(0)
    from engine import ModelConfig, UniViGU

    base = UniViGU(ModelConfig.preset("tiny"))
    trained = dict(load_model(tmp_path / "out" / "model").named_parameters())
    for name, p in base.named_parameters():
        frozen = "attn" in name or ".ffn." in name
        assert torch.equal(p, trained[name]) == frozen, name


def test_bf16_keeps_fp32_masters(run, tmp_path):
    """The average at the end holds what bf16 could not."""
    assert run("--dtype bfloat16 --micro-batch-size 2 --recompute attention")[0] == 0
    trained = load_model(tmp_path / "out" / "model")
    weight = trained.blocks[0].ffn.up.weight
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line["tokens_per_s"] > 0 and "mfu" not in line
    assert (tmp_path / "out" / "loss.png").stat().st_size > 5000


def test_a_run_is_not_resumed_on_other_data(run, tmp_path):
    assert run("--save-every 1")[0] == 0
    make_shard(tmp_path / "other.safetensors", width=64)
    code, _, err = run("--resume --data other.safetensors")
    assert code == 2 and "shard.safetensors (12)" in err and "got other.safetensors (12)" in err
    assert run("--resume")[0] == 0


@pytest.mark.parametrize(
    "flags,code,said",
    [
        ("--sp 2", 2, "Start with: torchrun"),
        ("--freeze nothing.*", 2, "freeze must name parameters; got 'nothing.*'"),
        ("--freeze *", 2, "freeze must leave a parameter"),
        ("--freeze *ffn* --lora-rank 2", 2, "freeze must be left out with lora_rank"),
        ("--warmup -1", 2, "warmup must be at least 0"),
        ("--dry-run --processes 3", 2, "--batch-size must be a multiple of the 3 ranks"),
        ("--recompute much", 2, "recompute must be none, attention or block; got 'much'"),
        ("--micro-batch-size -1", 2, "micro_batch_size must be at least 0"),
        ("--dry-run --processes 3 --sp 2", 2, "must be the 3 processes"),
        ("--dry-run --processes 0", 2, "--processes"),
        ("--device cuda", 2, "--device must be auto or one of cpu"),
    ],
)
def test_mistakes(run, tmp_path, flags, code, said):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    found, out, err = run(flags)
    assert (found, out) == (code, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "checkpoint").exists()
