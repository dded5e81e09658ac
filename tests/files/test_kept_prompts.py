"""Encodings of prompts that a pipeline keeps: for each text that is run, the encoder runs once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine import Pipeline
from engine.config import EMBEDDED
from engine.media import TextEncoder
from engine.media.text import KEPT_BYTES, Kept

PROMPT = "a red circle moves left"
SETTINGS = {"num_inference_steps": 1, "progress": False}


@pytest.fixture
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, "cpu")


@pytest.fixture
def ran(pipe) -> list[int]:
    """Tokens of each text that the pipeline's encoder was given."""
    lengths = []
    pipe.text.encoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


def test_a_prompt_and_its_null_are_encoded_once(pipe, ran):
    first = pipe.generate(PROMPT, **SETTINGS)
    assert len(ran) == 2  # the prompt and the null
    again = pipe.generate(f"  {PROMPT} ", **SETTINGS)
    assert len(ran) == 2 and np.array_equal(first.frames, again.frames)
    pipe.generate([PROMPT, "a blue square"], **SETTINGS)
    assert len(ran) == 3
    pipe.generate(PROMPT, negative_prompt="a green cross", mode="t2vt", **SETTINGS)
    assert len(ran) == 4


def test_data_work_keeps_nothing(pipe, ran):
    contexts = [pipe.encode_prompts([PROMPT, ""]) for _ in range(2)]
    assert len(ran) == 4 and pipe.text.kept.bytes == 0
    assert torch.equal(pipe.encode([PROMPT, ""], allow_empty=True), contexts[0])


def test_what_is_kept_is_not_what_is_handed_out(pipe):
    context = pipe.encode([PROMPT])
    known = context.clone()
    context.zero_()
    assert torch.equal(pipe.encode([PROMPT]), known)


def test_another_dtype_or_another_encoder_encodes_again(pipe, ran):
    before = pipe.encode([PROMPT])
    pipe.to(torch.bfloat16)
    assert pipe.encode([PROMPT]).dtype == torch.bfloat16 and len(ran) == 2
    rounded = pipe.to(torch.float32).encode([PROMPT])
    assert not torch.equal(rounded, before) and len(ran) == 3

    pipe.text.encoder = TextEncoder.from_pretrained(EMBEDDED).encoder
    assert torch.equal(pipe.encode([PROMPT]), before) and len(ran) == 3


class Counted(TextEncoder):
    moves = 0

    def _on_device(self, check):
        self.moves += 1
        return super()._on_device(check)


def test_an_offloaded_encoder_stays_where_it_is_for_what_is_kept():
    whole = TextEncoder.from_pretrained(EMBEDDED)
    text = Counted(whole.tokenizer, whole.encoder)
    for prompts in ([PROMPT], [PROMPT, PROMPT], ["a blue square", PROMPT], ["a blue square"]):
        text.encode(prompts, 16, keep=True)
    assert text.moves == 2


def rows(count: int) -> torch.Tensor:
    return torch.full((count, 4), float(count))


def test_what_was_not_used_for_longest_goes_first():
    kept = Kept(limit=10 * 16)
    for n in (1, 2, 3, 4):
        kept.put(n, rows(n))
    assert kept.bytes == 160 and kept.get(1) is not None
    kept.put(5, rows(5))
    assert [n for n in range(1, 6) if kept.get(n) is not None] == [1, 4, 5]
    kept.put(11, rows(11))
    assert kept.get(11) is None and kept.bytes == 0
    kept.put(2, rows(2))
    kept.put(2, rows(2))
    assert kept.bytes == 32


def test_the_limit_holds_as_many_prompts_as_the_page_says():
    """20 tokens in bf16 of umT5's width, and 512."""
    assert KEPT_BYTES // (20 * 4096 * 2) == 409 and KEPT_BYTES // (512 * 4096 * 2) == 16


def test_threads_share_one_table():
    kept = Kept(limit=40 * 16)
    with ThreadPoolExecutor(8) as pool:

        def use(n: int) -> bool:
            size = n * 7 % 13 + 1
            kept.put(size, rows(size))
            found = kept.get(size)
            return found is None or torch.equal(found, rows(size))

        assert all(pool.map(use, range(4000)))
    assert kept.bytes == sum(r.nbytes for r in map(kept.get, range(1, 14)) if r is not None) <= 640
