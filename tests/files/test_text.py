import socket
import sys

import pytest
import torch
from library_parts import as_ours

from engine.errors import MissingPackage, ModelFileError, UsageError
from engine.media import TextEncoder, TextRows, build_word_tokenizer, save_tokenizer
from engine.media.text import clean_prompt

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

WORDS = "a red blue green square circle moves to the left right and then stops &".split()
PROMPTS = ["a red square moves right", "  Blue   circle &amp;amp; the square ", "a", "green zebra"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network use: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tiny_encoder(seed=0):
    torch.manual_seed(seed)
    config = transformers.UMT5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    encoder = transformers.UMT5EncoderModel(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def sentencepiece_tokenizer():
    """The class of umT5's tokenizer, with 9 pieces and the sentinels that T5 adds."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁red", "▁squ", "are", "▁a", "s"]
    scores = [(piece, -float(i > 2)) for i, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(build_word_tokenizer(WORDS), folder / "tokenizer")
    tiny_encoder().save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.from_pretrained(folder)


def wan_embeds(folder, prompts, rows, dtype=torch.float32):
    """The function that decides: diffusers' own, on transformers' tokenizer and encoder."""
    pipelines = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    pipeline = pipelines.WanPipeline(tokenizer, encoder.eval(), None, None)
    with torch.no_grad():
        return pipeline._get_t5_prompt_embeds(prompts, 1, rows, torch.device("cpu"), dtype)


@pytest.mark.parametrize("rows", [8, 64])
def test_encode_gives_the_numbers_of_wan_pipeline(folder, encoder, rows):
    encoded = encoder.encode(PROMPTS, rows)
    expected = wan_embeds(folder, PROMPTS, rows)
    assert encoded.context.shape == (4, rows, 16) and expected.abs().max() > 0.1
    torch.testing.assert_close(encoded.context, expected, rtol=1e-5, atol=1e-5)
    assert encoded.lengths.tolist() == [6, 6, 2, 3]
    for row, length in zip(encoded.context, encoded.lengths.tolist(), strict=True):
        assert not row[length:].any() and row[:length].any(1).all()


def test_encode_in_bf16(folder):
    encoder = TextEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    context = encoder.encode(PROMPTS, 32).context
    assert context.dtype == torch.bfloat16
    exact = TextEncoder.from_pretrained(folder, dtype=torch.float64).encode(PROMPTS, 32).context
    theirs = wan_embeds(folder, PROMPTS, 32, torch.bfloat16).double()
    ours = context.double()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_encode_with_a_sentencepiece_tokenizer(tmp_path, folder):
    sentencepiece_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text_encoder").symlink_to(folder / "text_encoder")
    encoder = TextEncoder.from_pretrained(tmp_path)
    prompts = ["a red square", "squares"]
    encoded = encoder.encode(prompts, 12)
    assert encoded.lengths.tolist() == [5, 4]
    expected = wan_embeds(tmp_path, prompts, 12)
    torch.testing.assert_close(encoded.context, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_neighbours(encoder):
    together = encoder.encode(PROMPTS, 16).context
    alone = torch.cat([encoder.encode([prompt], 16).context for prompt in PROMPTS])
    assert torch.equal(together, alone)


def test_equal_prompts_are_encoded_once(encoder, monkeypatch):
    calls, forward = [], encoder.encoder.forward
    monkeypatch.setattr(encoder.encoder, "forward", lambda *a: calls.append(a) or forward(*a))
    context = encoder.encode(["a red", "square", " a  red ", "a red"], 8).context
    assert len(calls) == 2
    assert torch.equal(context[0], context[2]) and torch.equal(context[0], context[3])


HALVES = ["caf\udce9 red", "a red circle \ud83d", "\ude00", b"red", 7, None]


@pytest.mark.parametrize("text", HALVES, ids=ascii)
def test_what_is_no_text_is_refused_wherever_it_comes_in(encoder, text):
    """A byte of another encoding on a command line, and a character that a client cut in two."""
    for call in (lambda: encoder.encode(["a", text], 8), lambda: encoder.encode_rows(text, 8)):
        with pytest.raises(UsageError, match="^prompt: it must be (Unicode text|a string); got "):
            call()


def test_the_null_condition_is_the_end_token_alone(folder, encoder):
    encoded = encoder.encode(["", "a red"], 8, allow_empty=True)
    assert encoded.lengths.tolist() == [1, 3]
    torch.testing.assert_close(encoded.context[:1], wan_embeds(folder, "", 8))


@pytest.mark.parametrize("prompts", [[""], ["a", " \n&nbsp;\t"], [], "a red square"])
def test_empty_prompts_are_refused(encoder, prompts):
    with pytest.raises(UsageError, match="^prompt: "):
        encoder.encode(prompts)


def test_a_long_prompt_is_refused_with_what_would_be_cut(encoder):
    prompt = "a red square moves to the left and then stops"
    assert encoder.encode([prompt], 11).lengths.item() == 11
    with pytest.raises(UsageError) as caught:
        encoder.encode(["a", prompt], 8)
    assert str(caught.value) == (
        "prompt: text must be at most 8 tokens; got 11. "
        "Shorten it by 3 tokens (cut tail: 'and then stops')."
    )


def test_the_encoder_is_frozen_and_its_output_can_be_trained_on(encoder):
    context = encoder.encode(["a red square"], 8).context
    assert not context.requires_grad
    assert not TextEncoder(encoder.tokenizer, as_ours(tiny_encoder()).train()).encoder.training
    weight = torch.ones(16, requires_grad=True)
    (context * weight).sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "  two   spaces\tand\n\nlines ",
        "&lt;b&gt; &amp;amp;lt; &amp;amp;amp;lt;",
        "<b> &amp;lt; &amp;amp;lt;",
        "schÃ¶n â€œquotedâ€",
        "".join(chr(code) for code in (*range(0x21), 0x7F, 0x85, 0xA0, 0x2003, 0x2028, 0x3000))
        + "x",
        "&#x1c;a&#x85;b&nbsp;c&#8203;d",
        "ﬁne ｆｕｌｌ width",
        "",
    ],
)
def test_clean_prompt_is_that_of_diffusers(text):
    theirs = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan").prompt_clean
    assert clean_prompt(text) == theirs(text)


def test_rows_hold_the_text_the_end_token_and_padding(encoder):
    ids, length = encoder.encode_rows("A Red square", 8)
    assert ids.dtype == torch.int64 and length == 4
    expected = [3 + WORDS.index(word) for word in ("a", "red", "square")] + [1, 0, 0, 0, 0]
    assert ids.tolist() == expected
    assert encoder.decode_rows(ids) == "a red square"


def test_rows_of_nothing_and_of_an_exact_fit(encoder):
    assert encoder.encode_rows("", 2)[0].tolist() == [1, 0]
    assert encoder.encode_rows("a red square", 4)[1] == 4
    with pytest.raises(UsageError, match=r"at most 3 tokens; got 4\. .*cut tail: 'square'"):
        encoder.encode_rows("a red square", 3)


def test_decoding_stops_at_the_first_end_token_and_drops_special_ids(encoder):
    red = 3 + WORDS.index("red")
    assert encoder.decode_rows(torch.tensor([0, red, 2, red, 1, red, 1])) == "red red"
    assert encoder.decode_rows(torch.tensor([red, 31, 250_000])) == "red"
    assert encoder.decode_rows(torch.tensor([1, red])) == ""


def test_sentencepiece_rows(tmp_path):
    sentencepiece_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = TextRows.from_pretrained(tmp_path)
    ids, length = rows.encode_rows("a red squares", 9)
    assert ids.tolist() == [7, 4, 5, 6, 8, 1, 0, 0, 0] and length == 6
    assert rows.decode_rows(ids) == "a red squares"


def test_word_tokenizer_survives_a_folder(tmp_path):
    built = build_word_tokenizer(WORDS)
    save_tokenizer(built, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "A red\tZEBRA moves"
    assert loaded(text).input_ids == built.encode(text).ids == [3, 4, 2, 9, 1]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert len(loaded) == 3 + len(WORDS)


@pytest.mark.parametrize("words", [["a", "a"], ["A"], ["two words"], [""], ["</s>"]])
def test_word_tokenizer_refuses_words_it_could_not_find(words):
    with pytest.raises(UsageError, match="distinct, in lower case"):
        build_word_tokenizer(words)


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    with pytest.raises(ModelFileError, match="append an EOS token"):
        TextRows(tokenizer)


def copied(folder, tmp_path, skip=()):
    for source in folder.rglob("*"):
        if source.is_file() and source.name not in skip:
            target = tmp_path / source.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    return tmp_path


def test_absent_folders(tmp_path):
    with pytest.raises(ModelFileError, match="must hold a folder tokenizer"):
        TextEncoder.from_pretrained(tmp_path / "absent")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ModelFileError, match="tokenizer: .* must be there and readable; got none"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{bad", "{}", ""])
def test_damaged_tokenizer(folder, tmp_path, content):
    copied(folder, tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFileError, match="tokenizer: ") as caught:
        TextRows.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_incomplete_and_damaged_encoder(folder, tmp_path):
    copied(folder, tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = tiny_encoder().state_dict()
    weights.pop("encoder.embed_tokens.weight")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    whole = weights.pop(name)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelFileError, match=f"got no {name} .1 missing, 0 unexpected"):
        TextEncoder.from_pretrained(tmp_path)
    save_file({**weights, name: whole[:3].clone()}, path, {"format": "pt"})
    with pytest.raises(ModelFileError, match="text_encoder: "):
        TextEncoder.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="text_encoder: "):
        TextEncoder.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(folder, tmp_path):
    copied(folder, tmp_path, skip=("model.safetensors",))
    torch.save(tiny_encoder().state_dict(), tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="must hold model.safetensors or .* got neither"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("package", ["ftfy", "tokenizers"])
def test_missing_package_names_the_extra(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package} must be installed.*extra `models`"):
        TextEncoder.from_pretrained(folder).encode(["a"])


HARD = [
    "",
    " ",
    "▁",
    "a ▁ red",
    "  a  red",
    "a red</s>",
    "</s> a",
    "<extra_id_0> a <extra_id_1>",
    "<pad>a",
    "🦊 a red 👩‍👩‍👧",
    "a\u200bred",
    "ｒｅｄ ａ",
    "a\u3000red\ttab\nline",
    "Ünïcödé squares",
]


@pytest.mark.parametrize("make", [sentencepiece_tokenizer, lambda: build_word_tokenizer(WORDS)])
@pytest.mark.parametrize("text", HARD)
def test_tokens_of_hard_strings_are_those_of_transformers(tmp_path, make, text):
    tokenizer = make()
    if isinstance(tokenizer, tokenizers.Tokenizer):
        save_tokenizer(tokenizer, tmp_path / "tokenizer")
    else:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = TextRows.from_pretrained(tmp_path)
    ids, length = ours.encode_rows(text, 64)
    expected = theirs(text).input_ids
    assert ids[:length].tolist() == expected
    skipped = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert ours._string(expected) == theirs.decode(expected, **skipped)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_the_encoder_is_that_of_transformers():
    """Past the distance where positions share a bucket, and where they no longer differ."""
    config = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 3}
    config |= {"num_layers": 3, "relative_attention_num_buckets": 12}
    config |= {"relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-5}
    torch.manual_seed(0)
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**config)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(0, 50, (3, 40))
    mask = torch.arange(40) < torch.tensor([40, 17, 1])[:, None]

    with torch.no_grad():
        found = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model = theirs.to(dtype)
            expected = model(ids, attention_mask=mask.long()).last_hidden_state[mask]
            found[dtype] = as_ours(model)(ids, mask)[mask], expected
            theirs = theirs.to(torch.float32) if dtype != torch.bfloat16 else theirs
    assert relative(*found[torch.float32]) < 2e-6
    exact = found[torch.float64][1]
    ours, library = found[torch.bfloat16]
    assert 0 < relative(ours, exact) <= 2 * relative(library, exact)


def test_in_fp16_the_last_product_stays_in_fp32(folder):
    text = TextEncoder.from_pretrained(folder, dtype=torch.float16)
    wide = {n for n, p in text.encoder.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"blocks.{i}.ffn.wo.weight" for i in range(2)}
    assert text.encode(["a red square"], 8).context.dtype == torch.float16
    text.encoder.place("cpu", torch.float16)
    assert text.encoder.blocks[0].ffn.wo.weight.dtype == torch.float32
