"""Own videos become a shard: which lines are bad, what made it, who reads what."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from clips import grey
from pipeline_folder import build_pipeline_folder
from safetensors.torch import load_file, save_file

from engine.cli import checks, main
from engine.config import ModelConfig, TrainConfig
from engine.data import LatentSet, data_fingerprint, preprocess_manifest, write_shard
from engine.data import shard as shard_file
from engine.data.manifest import most_bad
from engine.errors import ModelFileError
from engine.media import read_video, write_video
from engine.media.clip import fit
from engine.pipeline import Pipeline
from engine.toy import preprocess_scenes

GOOD = {"video": "wide.mp4", "prompt": "a red circle moves left", "caption": "a red circle"}
RATES = {"wide.mp4": 24, "tall.mp4": 30000 / 1001, "slow.mp4": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline folder; videos of odd sizes and rates, 80 frames each; and files that are none."""
    base = tmp_path_factory.mktemp("data")
    build_pipeline_folder(base / "folder")
    for (name, fps), size in zip(RATES.items(), [(46, 90), (98, 34), (16, 16)], strict=True):
        write_video(base / name, grey(80, *size), fps)
    whole = (base / "wide.mp4").read_bytes()
    (base / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (base / "headless.mp4").write_bytes(whole[40:])
    (base / "empty.mp4").write_bytes(b"")
    (base / "text.mp4").write_text("not a video")
    (base / "a folder.mp4").mkdir()
    write_video(base / "short.mp4", grey(3, 16, 16), 8)
    return base


@pytest.fixture(scope="module")
def parts(place):
    return Pipeline.without_model(place / "folder")


@pytest.fixture
def preprocess(place, parts, tmp_path):
    """Writes a manifest and makes its shard -> (the shard, what was reported)."""

    def preprocess(lines, **options):
        content = b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
        (place / "clips.jsonl").write_bytes(content)
        target, reported = tmp_path / "shard.safetensors", []
        config = replace(parts.config, num_frames=5, height=16, width=32)
        made_with = {"vae": "x"}
        inputs = parts, made_with, place / "clips.jsonl", target, config
        try:
            preprocess_manifest(*inputs, report=reported.append, **options)
        except ModelFileError as error:
            return error, reported
        return LatentSet(target), reported

    return preprocess


def test_a_manifest_is_preprocessed_and_trained_on(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        GOOD,
        GOOD | {"video": str(place / "tall.mp4"), "start": 0.3, "end": None, "id": 7},
        GOOD | {"prompt": "a blue square moves up"},
    ]
    manifest = place / "own.jsonl"
    manifest.write_bytes("\ufeff\r\n".encode() + "\r\n\n".join(map(json.dumps, lines)).encode())

    size = "--num-frames 5 --height 32 --width 48 --fps 8 --text-rows 20 --quiet"
    line = f"preprocess --model-path {place}/folder --manifest {manifest} {size} --output-path "
    assert main(shlex.split(line + "new/a.safetensors")) == 0
    assert capsys.readouterr() == ("new/a.safetensors\n", "")
    assert load_file("new/a.safetensors")["latents"].dtype == torch.float16

    (shard,) = LatentSet("new/a.safetensors").shards
    assert shard.shapes["latents"] == (3, 16, 2, 4, 6)
    assert shard.shapes["caption_tokens"] == (3, 20)
    assert shard.shapes["contexts"][0] == 2
    info = {key: shard.info[key] for key in ("num_frames", "height", "width", "fps", "count")}
    assert list(info.values()) == [5, 32, 48, 8, 3]
    assert shard.info["made_with"] == data_fingerprint(place / "folder")
    assert shard.info["source"]["manifest"] == "own.jsonl" and shard.info["source"]["skipped"] == 0

    line = f"preprocess --model-path {place}/folder --synthetic 3 --quiet --output-path "
    assert main(shlex.split(line + "new/b.safetensors")) == 0
    both = LatentSet("new/a.safetensors", "new/b.safetensors")
    assert [clips.tolist() for clips in both.buckets.values()] == [[0, 1, 2], [3, 4, 5]]

    train = "train --preset tiny --steps 2 --batch-size 3 --quiet --output-path run --model-path "
    shards = " --data new/a.safetensors new/b.safetensors"
    assert main(shlex.split(f"{train}{place}/folder{shards}")) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_latents_tokens_and_contexts_are_those_made_by_hand(place, parts, preprocess):
    lines = [GOOD, GOOD | {"video": "slow.mp4"}, GOOD | {"prompt": "a cyan cross", "start": 1}]
    shard, reported = preprocess(lines, max_bad=0.5)
    assert (
        len(shard) == 2 and len(reported) == 1 and "clips.jsonl:2: skipped: slow.mp4" in reported[0]
    )
    batch = shard.batch(torch.arange(2))
    for i, (line, first) in enumerate([(lines[0], 0), (lines[2], 24)]):
        frames = read_video(place / "wide.mp4").frames[first : first + 13 : 3]
        latents = parts.encode_video(fit(frames, 16, 32)[None])[0].half().float()
        # Two threads sum in another order for another batch; half precision may round apart.
        torch.testing.assert_close(batch["latents"][i], latents, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(batch["context"][i], parts.encode_prompts([line["prompt"]])[0])
        ids, length = parts.text.encode_rows(line["prompt"], 24)
        assert torch.equal(batch["prompt_tokens"][i], ids) and batch["prompt_lengths"][i] == length
        ids, _ = parts.text.encode_rows(line["caption"], 24)
        assert torch.equal(batch["caption_tokens"][i], ids)
    torch.testing.assert_close(batch["null_context"], parts.encode_prompts([""])[0])


BAD = [  # (a line, what is said of it)
    (b"{", "JSON"),
    (b"\xff\xfe{}", "JSON"),
    (b"[" * 100_000, "JSON"),
    (b"[]", "object; got list"),
    (b"7", "object; got int"),
    ({k: v for k, v in GOOD.items() if k != "video"}, "video must be a text"),
    ({k: v for k, v in GOOD.items() if k != "prompt"}, "prompt must be a text"),
    ({k: v for k, v in GOOD.items() if k != "caption"}, "caption must be a text"),
    (GOOD | {"prompt": ""}, "prompt must be a text"),
    (GOOD | {"prompt": "&nbsp;"}, "prompt must not be empty"),
    (GOOD | {"caption": " \n"}, "caption must be a text"),
    (GOOD | {"caption": ["a"]}, "caption must be a text"),
    (GOOD | {"caption": "\ud800"}, "caption must be a text"),
    (GOOD | {"caption": "red " * 24}, "caption: text must be at most 24 tokens; got 25"),
    (GOOD | {"prompt": "red " * 24}, "prompt: text must be at most 24 tokens; got 25"),
    (GOOD | {"start": -1}, "start and end"),
    (GOOD | {"start": "1"}, "start and end"),
    (GOOD | {"start": True}, "start and end"),
    (GOOD | {"start": 10**400}, "start and end"),
    (GOOD | {"start": float("nan")}, "start and end"),
    (GOOD | {"start": 2, "end": 2}, "start and end"),
    (GOOD | {"start": [], "end": None}, "start and end"),
    (GOOD | {"video": "\x1b[31m.mp4"}, "?[31m.mp4"),
    (GOOD | {"start": 100}, "start must lie inside"),
    (GOOD | {"start": 3.2}, "5 frames at 8 a second between start and end; got 1"),
    (GOOD | {"video": "nowhere.mp4"}, "nowhere.mp4"),
    (GOOD | {"video": "no\0where.mp4"}, "must be a file"),
    (GOOD | {"video": "x" * 300}, "name too long"),
    (GOOD | {"video": "a folder.mp4"}, "must be a file"),
    (GOOD | {"video": "cut.mp4"}, "cut.mp4"),
    (GOOD | {"video": "headless.mp4"}, "headless.mp4"),
    (GOOD | {"video": "empty.mp4"}, "empty.mp4"),
    (GOOD | {"video": "text.mp4"}, "text.mp4"),
    (GOOD | {"video": "clips.jsonl"}, "clips.jsonl"),
    (GOOD | {"video": "short.mp4"}, "5 frames at 8 a second between start and end; got 3"),
    (GOOD | {"video": "slow.mp4"}, "at least 8 frames per second; got 6"),
]


@pytest.mark.parametrize("line, words", BAD)
def test_a_bad_line_is_skipped_and_said(preprocess, line, words):
    shard, (said,) = preprocess([line, GOOD])
    assert len(shard) == 1 and shard.shards[0].info["source"]["skipped"] == 1
    assert "clips.jsonl:1: skipped: " in said and words in said and "\n" not in said
    assert said.isprintable() and len(said) < 500


def test_too_many_bad_lines_end_the_run_with_nothing_written(preprocess, tmp_path):
    assert len(preprocess([GOOD])[0]) == 1
    content = (tmp_path / "shard.safetensors").read_bytes()
    error, said = preprocess([GOOD, *(line for line, _ in BAD)])
    assert isinstance(error, ModelFileError) and f"{len(BAD)} bad of {len(BAD) + 1}" in str(error)
    assert len(said) == 21 and said[20].endswith(f"{len(BAD) - 20} more lines")
    assert [f"clips.jsonl:{i}:" in line for i, line in enumerate(said[:20], 2)] == [True] * 20
    assert (tmp_path / "shard.safetensors").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["shard.safetensors"]


@pytest.mark.parametrize(
    "lines, share",
    [([], 1.0), ([b"{"], 1.0), ([GOOD, b"{"], 0.0), ([GOOD, *2 * [GOOD | {"video": "-"}]], 0.01)],
)
def test_no_good_lines_or_one_bad_line_too_many(preprocess, lines, share):
    assert isinstance(preprocess(lines, max_bad=share)[0], ModelFileError)


def test_a_clip_whose_latents_are_not_finite_is_bad(parts, preprocess, monkeypatch):
    monkeypatch.setattr(parts, "std", parts.std * 0)
    error, (said,) = preprocess([GOOD])
    assert isinstance(error, ModelFileError) and "finite" in said


@pytest.mark.parametrize(
    "count, share, most",
    [
        (0, 0.01, 1),
        (1, 0.01, 1),
        (100, 0.01, 1),
        (199, 0.01, 1),
        (200, 0.01, 2),
        (1000, 0.01, 10),
        (100, 0.29, 29),
        (10, 0.0, 0),
        (10, 1.0, 10),
    ],
)
def test_how_many_may_be_bad(count, share, most):
    assert most_bad(count, share) == most


@pytest.mark.parametrize(
    "flags, code, words",
    [
        ("", 2, "neither"),
        ("--manifest {m} --synthetic 1", 2, "both"),
        ("--manifest nowhere", 4, "--manifest"),
        ("--synthetic 1 --fps 8 --num-frames 5", 2, "--num-frames, --fps"),
        ("--manifest {m} --seed 1", 2, "--seed"),
        ("--manifest {m} --num-frames 8", 2, "5 or 9"),
        ("--manifest {m} --height 20", 2, "16 or 32"),
        ("--manifest {m} --fps 0", 2, "--fps"),
        ("--manifest {m} --max-bad 2", 2, "--max-bad"),
        ("--manifest {m} --text-rows 0", 2, "--text-rows"),
        ("--manifest {m} --output-path {m}/a.safetensors", 2, "bad.jsonl"),
        ("--manifest {m}", 4, "2 bad of 2"),
    ],
)
def test_bad_flags(place, tmp_path, capsys, monkeypatch, flags, code, words):
    monkeypatch.chdir(tmp_path)
    (place / "bad.jsonl").write_text("{}\n[]\n")
    line = f"preprocess --model-path {place}/folder --output-path a.safetensors --quiet " + flags
    assert main(shlex.split(line.format(m=place / "bad.jsonl"))) == code
    out, err = capsys.readouterr()
    *said, last = err.splitlines()
    assert last.startswith("univigu: ") and words in last and out == ""
    assert len(said) == (2 if words == "2 bad of 2" else 0) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "context_rows"])
def test_a_stale_shard_is_refused_by_the_name_of_what_changed(
    place, tmp_path, capsys, monkeypatch, part
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(place / "folder", tmp_path / "other")
    line = "preprocess --model-path other --synthetic 2 --quiet --output-path a.safetensors"
    assert main(shlex.split(line)) == 0
    cfg, config = ModelConfig.preset("tiny"), TrainConfig(batch_size=2)
    checks.check_shard(LatentSet("a.safetensors"), cfg, config, place / "folder")

    if part == "context_rows":
        record = json.loads((folder / "pipeline.json").read_text()) | {part: 25}
        (folder / "pipeline.json").write_text(json.dumps(record))
    else:
        file = max((folder / part).iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    train = "train --preset tiny --data a.safetensors --batch-size 2 --output-path run --model-path"
    capsys.readouterr()
    assert main(shlex.split(f"{train} other")) == 4
    assert f"got another {part}. Run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_part_and_a_shard_without_hashes(place, tmp_path, preprocess):
    shard, _ = preprocess([GOOD])
    cfg, config = ModelConfig.preset("tiny"), TrainConfig(batch_size=1)
    with pytest.raises(ModelFileError, match="vae, text_encoder, tokenizer"):
        checks.check_shard(shard, cfg, config, place / "folder")
    with pytest.raises(ModelFileError, match="must hold vae"):
        checks.check_shard(shard, cfg, config, tmp_path)


@pytest.mark.parametrize("info", ['{"format_version": 2}', "[]", "{", "null"])
def test_a_shard_of_another_format_is_refused(preprocess, tmp_path, info):
    preprocess([GOOD])
    tensors = load_file(tmp_path / "shard.safetensors")
    save_file(tensors, tmp_path / "other.safetensors", {"info": info})
    with pytest.raises(ModelFileError, match="other.safetensors"):
        LatentSet(tmp_path / "other.safetensors")


def test_a_shard_appears_whole_or_not_at_all(parts, tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_file, "save_file", full)
    with pytest.raises(ModelFileError, match="No space"):
        preprocess_scenes(parts, {}, target, 1, 0, 24)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_more_prompts_than_the_encoder_takes_at_once(parts, tmp_path):
    names = ["red", "blue", "cyan", "circle", "cross", "left", "up", "a", "moves"]
    prompts = [f"{a} {b} {c}" for a in names for b in names for c in names][:300]
    texts = [(prompt, "a cross") for prompt in prompts]
    latents = [torch.zeros(100, 16, 1, 2, 2, dtype=torch.float16)] * 3
    write_shard(parts, {}, tmp_path / "a.safetensors", latents, texts, parts.config, {})
    batch = LatentSet(tmp_path / "a.safetensors").batch(torch.tensor([299, 0, 131, 257]))
    wanted = parts.encode_prompts([prompts[i] for i in (299, 0, 131, 257)])
    torch.testing.assert_close(batch["context"], wanted)
