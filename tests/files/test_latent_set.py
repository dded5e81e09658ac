"""Shards as one set: which clips a step reads, what a batch holds, and the stream of batches."""

import gc
import json
import os
import resource
import struct
import sys
import threading
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data import LatentSet, stream
from engine.errors import ModelFileError, UsageError

PARTS = {"vae": "v", "text_encoder": "e"}


@pytest.fixture
def shard(tmp_path):
    """Writes a shard in which every number names its clip: clip i has latents first + i, and
    prompt i % 3, which has contexts (first + i % 3) / 8."""

    def shard(name, count, size=4, text=7, first=0, made_with=PARTS, **changes):
        clips = torch.arange(first, first + count)
        tensors = {
            "latents": clips.half()[:, None, None, None, None].repeat(1, 16, 2, 4, size),
            "prompt_tokens": clips[:, None].repeat(1, text),
            "prompt_lengths": 1 + clips % text,
            "caption_tokens": 1000 + clips[:, None].repeat(1, text),
            "context_index": torch.arange(count) % 3,
            "contexts": (first + torch.arange(3.0))[:, None, None].repeat(1, 5, 8) / 8,
            "null_context": torch.full((5, 8), -1.0),
        }
        path = tmp_path / f"{name}.safetensors"
        info = json.dumps({"made_with": made_with, "name": name})
        save_file(tensors | changes, path, {"info": info})
        return path

    return shard


@pytest.fixture
def four(shard):
    """Buckets: 10 clips, of which 4 are in the last shard; 9 of another size; 5 of longer texts."""
    return LatentSet(
        shard("a", 6),
        shard("b", 9, size=6, first=6),
        shard("c", 5, text=11, first=15),
        shard("d", 4, first=20),
    )


def bucket_of(data, clip):
    return next(i for i, clips in enumerate(data.buckets.values()) if clip in clips)


def test_a_batch_holds_the_clips_asked_for_whatever_their_shard(four):
    assert len(four) == 24 and [len(clips) for clips in four.buckets.values()] == [10, 9, 5]
    assert [shard.info["name"] for shard in four.shards] == list("abcd")
    asked = torch.tensor([21, 0, 5, 20, 23, 0])
    batch = four.batch(asked)
    assert torch.equal(
        batch["latents"], asked.float()[:, None, None, None, None].expand(6, 16, 2, 4, 4)
    )
    assert torch.equal(batch["prompt_tokens"], asked[:, None].expand(6, 7))
    assert torch.equal(batch["caption_tokens"], 1000 + batch["prompt_tokens"])
    assert torch.equal(batch["prompt_lengths"], 1 + asked % 7)
    contexts = torch.tensor([21, 0, 2, 20, 20, 0]) / 8
    assert torch.equal(batch["context"], contexts[:, None, None].expand(6, 5, 8))
    assert torch.equal(batch["null_context"], torch.full((5, 8), -1.0))
    assert {x.dtype for x in batch.values()} == {torch.float32, torch.int64}
    assert four.batch(torch.tensor([14]))["latents"].shape == (1, 16, 2, 4, 6)
    assert four.batch(torch.tensor([19]))["caption_tokens"].shape == (1, 11)


@pytest.mark.parametrize(
    "asked, words",
    [
        ([0, 6], "4x4 .* and latents 16x2x4x6"),
        ([15, 0], "11 text rows"),
        ([24], "24 clips"),
        ([-1], "24 clips"),
        ([], "24 clips"),
    ],
)
def test_clips_that_make_no_batch_are_refused(four, asked, words):
    with pytest.raises(UsageError, match=words):
        four.batch(torch.tensor(asked, dtype=torch.int64))


def test_one_bucket_is_read_in_the_order_that_recipes_were_made_with(shard):
    data = LatentSet(shard("a", 8), shard("b", 5, first=8))
    for seed, batch, step in [(0, 4, 0), (0, 4, 2), (0, 4, 3), (3, 4, 100), (3, 13, 7), (5, 1, 25)]:
        epoch, at = step // (13 // batch), step % (13 // batch)
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        wanted = torch.randperm(13, generator=g)[at * batch :][:batch]
        assert torch.equal(data.indices(step, batch, seed), wanted)
    assert data.indices(0, 4, 0).tolist() == [3, 4, 0, 2]  # written down: it never changes


def test_an_epoch_reads_every_bucket_once_in_full_batches_of_one_bucket(four):
    orders = []
    for epoch in range(3):
        batches = [four.indices(epoch * 5 + i, 4, 1) for i in range(5)]  # 2 + 2 + 1
        buckets = [{bucket_of(four, clip) for clip in batch.tolist()} for batch in batches]
        assert sorted(map(min, buckets)) == [0, 0, 1, 1, 2] and set(map(len, buckets)) == {1}
        seen = torch.cat(batches)
        assert len(seen) == len(seen.unique()) == 20
        orders.append((tuple(map(min, buckets)), seen.tolist()))
    assert len({order for order, _ in orders}) > 1 and orders[0][1] != orders[1][1]
    read = {
        clip
        for epoch in range(20)
        for i in range(5)
        for clip in four.indices(epoch * 5 + i, 4, 1).tolist()
    }
    assert read == set(range(24))  # no clip is dropped for ever


def test_the_order_is_a_pure_function_of_step_and_seed(four):
    wanted = [four.indices(step, 4, 7).tolist() for step in range(13)]
    again = LatentSet(*(shard.path for shard in four.shards))
    for step in (12, 0, 7, 3, 8, 12):  # resumed anywhere, in any state of what is kept
        assert again.indices(step, 4, 7).tolist() == wanted[step]
        assert again.indices(step, 4, 8).tolist() != wanted[step]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_shares_of_the_ranks_in_order_are_the_global_batch(four, world):
    for step in range(12):
        shares = [four.indices(step, 4, 2, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {4 // world}
        assert torch.equal(torch.cat(shares), four.indices(step, 4, 2))


@pytest.mark.parametrize(
    "batch, words",
    [
        (6, "got 6, and 5 clips of latents 16x2x4x4 with 11 text rows and context 5x8. Lower"),
        (10, "9 clips of latents 16x2x4x6 with 7 text rows.*, 5 clips"),
        (11, "10 clips of .*, 9 clips of .*, 5 clips of"),
    ],
)
def test_clips_too_few_for_a_batch_are_named_and_not_dropped(four, batch, words):
    with pytest.raises(UsageError, match=words):
        four.indices(0, batch, 0)


@pytest.mark.parametrize(
    "batch, rank, world", [(4, 0, 3), (4, 2, 2), (4, -1, 2), (2, 0, 4), (0, 0, 1), (-4, 0, 2)]
)
def test_shares_that_do_not_divide_are_refused(four, batch, rank, world):
    with pytest.raises(UsageError, match="multiple of the"):
        four.indices(0, batch, 0, rank, world)


def test_shards_of_other_parts_are_refused_by_both_names(shard):
    a, b = shard("a", 2), shard("b", 2, made_with=PARTS | {"vae": "w", "tokenizer": "t"})
    with pytest.raises(ModelFileError, match="a.safetensors and .*b.safetensors with .* vae, tok"):
        LatentSet(a, b)
    with pytest.raises(ModelFileError, match="different vae, text_encoder"):
        LatentSet(shard("c", 2, made_with=None), a)
    assert LatentSet(a, shard("d", 2)).made_with == PARTS
    with pytest.raises(UsageError, match="none"):
        LatentSet()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"context_index": torch.tensor([0, 3])}, "context_index of .* from 0 to 2; got 0 to 3"),
        ({"context_index": torch.tensor([0, -1])}, "got -1 to 0"),
        ({"prompt_lengths": torch.tensor([1])}, r"prompt_lengths I64 \[1\]"),
        ({"prompt_lengths": torch.tensor([1.0, 2.0])}, "prompt_lengths F32"),
        ({"latents": torch.zeros(2, 16, 4, 4)}, r"latents F32 \[2, 16, 4, 4\]"),
        ({"latents": torch.zeros(2, 16, 2, 4, 4, dtype=torch.uint8)}, "latents U8"),
        ({"caption_tokens": torch.zeros(2, 6, dtype=torch.int64)}, r"caption_tokens I64 \[2, 6\]"),
        ({"null_context": torch.zeros(4, 8)}, r"null_context F32 \[4, 8\]"),
    ],
)
def test_a_shard_whose_tensors_do_not_fit_is_refused(shard, changes, words):
    with pytest.raises(ModelFileError, match=words):
        LatentSet(shard("a", 2, **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shard_may_hold_other_floats_and_shorter_integers(shard, dtype):
    tensors = load_file(shard("a", 5))
    names = ("latents", "contexts", "null_context")
    other = {k: x.to(dtype) if k in names else x.int() for k, x in tensors.items()}
    asked = torch.tensor([4, 1])
    wanted, got = (LatentSet(path).batch(asked) for path in (shard("a", 5), shard("b", 5, **other)))
    assert all(torch.equal(got[k], x) and got[k].dtype == x.dtype for k, x in wanted.items())


def test_a_set_larger_than_memory_is_opened_and_read_by_the_row(tmp_path):
    """Four times the memory, of which the disk holds three clips. What maps it whole fails."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    row = (16, 21, 60, 104)
    size = 2 * 16 * 21 * 60 * 104
    count = min(4 * memory, 2**41) // size
    layout = [
        ("prompt_tokens", "I64", 8, [count, 2]),
        ("prompt_lengths", "I64", 8, [count]),
        ("caption_tokens", "I64", 8, [count, 2]),
        ("context_index", "I64", 8, [count]),
        ("null_context", "F32", 4, [1, 1]),
        ("contexts", "F32", 4, [1, 1, 1]),
        ("latents", "F16", 2, [count, *row]),
    ]

    header, end = {}, 0
    for name, dtype, width, shape in layout:
        begin, end = end, end + width * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()

    wanted = torch.randn(3, *row).half()
    path, clips = tmp_path / "large.safetensors", torch.tensor([count - 1, 7, count // 2])
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for clip, latents in zip(clips.tolist(), wanted, strict=True):
            file.seek(8 + len(text) + begin + clip * size)
            file.write(latents.numpy().tobytes())

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = LatentSet(path)
    assert torch.equal(data.batch(clips)["latents"], wanted.float())
    assert len(data.indices(3, 64, 0)) == 64
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * (1 if sys.platform == "darwin" else 1024) < 2**28

    os.truncate(path, 8 + len(text) + begin + (count - 1) * size + 9)
    assert data.batch(clips[1:])["latents"].isfinite().all()
    with pytest.raises(ModelFileError, match="large.safetensors ends inside latents: .* Run"):
        data.batch(clips)
    with pytest.raises(ModelFileError, match="must be a latent shard"):
        LatentSet(path)


def test_a_shard_replaced_on_disk_is_read_on_as_it_was_opened(shard):
    data = LatentSet(shard("a", 3))
    os.replace(shard("b", 3, first=100), data.shards[0].path)
    assert data.batch(torch.tensor([2]))["latents"].unique().tolist() == [2.0]


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("univigu-data")]


def handles():
    return len(os.listdir("/dev/fd"))


def test_the_stream_is_the_batches_of_its_steps(four):
    streamed = list(stream(four, range(3, 17), 4, 5, rank=1, world=2))
    assert len(streamed) == 14 and not readers()
    for step, (indices, batch) in zip(range(3, 17), streamed, strict=True):
        assert torch.equal(indices, four.indices(step, 4, 5, 1, 2))
        wanted = four.batch(indices)
        assert batch.keys() == wanted.keys()
        assert all(torch.equal(batch[k], x) for k, x in wanted.items())
        assert all(x.is_pinned() == torch.cuda.is_available() for x in batch.values())
    assert list(stream(four, range(5, 5), 4, 5)) == [] and not readers()


def test_one_batch_is_read_ahead_and_no_more(four, monkeypatch):
    read, gate, first = [], threading.Semaphore(0), threading.Event()
    batch = four.batch

    def watched(indices):
        read.append(indices.tolist())
        if len(read) == 2:
            first.set()
        gate.acquire()
        return batch(indices)

    monkeypatch.setattr(four, "batch", watched)
    with closing(stream(four, range(9), 4, 0)) as batches:
        gate.release()
        next(batches)
        assert first.wait(10) and len(read) == 2  # the second is read while the first is used
        gate.release()
        next(batches)
        gate.release()
    assert read == [four.indices(step, 4, 0).tolist() for step in range(3)] and not readers()


@pytest.mark.parametrize("end", ["close", "raise", "forget", "fail"])
def test_the_end_of_a_stream_leaves_no_thread_and_no_handle(four, monkeypatch, end):
    gc.collect()
    paths, before = [shard.path for shard in four.shards], handles()
    data = LatentSet(*paths)
    assert handles() == before + 4

    batches = stream(data, range(1000), 4, 0)
    next(batches)
    assert len(readers()) == 1
    if end == "close":
        batches.close()
    elif end == "raise":
        with pytest.raises(KeyError), closing(batches):
            for _ in batches:
                raise KeyError
    elif end == "fail":
        monkeypatch.setattr(data, "batch", lambda indices: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(batches)
        with pytest.raises(StopIteration):
            next(batches)

    del batches
    assert not readers()
    del data
    monkeypatch.undo()
    gc.collect()
    assert handles() == before


def test_a_stream_says_what_is_wrong_with_its_batch(four):
    with pytest.raises(UsageError, match="5 clips of"):
        next(stream(four, range(3), 6, 0))
    assert not readers()
