"""The JSON files of a pipeline folder: every change of a field is followed, or it is an error of
one line that names the file and the field. So is what is no file."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import engine
from engine.config import EMBEDDED, ModelConfig, PipelineConfig, read_pipeline_config
from engine.errors import ModelFileError
from engine.media import TextEncoder
from engine.media.vae import load_vae
from engine.pipeline import Pipeline
from engine.weights import open_model, read_codecs
from engine.weights.index import read_index

PIPELINE, VAE, TEXT = "pipeline.json", "vae/config.json", "text_encoder/config.json"
TOKENIZER, TRANSFORMER = "tokenizer/tokenizer.json", "transformer/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
READERS = {
    PIPELINE: read_pipeline_config,
    VAE: lambda folder: load_vae(folder, "cpu", torch.float32, False),
    TEXT: TextEncoder.from_pretrained,
    TOKENIZER: TextEncoder.from_pretrained,
    TRANSFORMER: open_model,
    SCHEDULER: read_index,
    INDEX: read_index,
}
NAN, INF, HUGE = math.nan, math.inf, 10**400


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("settings") / "folder")
    for hashes in folder.rglob("sha256.json"):  # of the files as they were
        hashes.unlink()
    (folder / "scheduler").mkdir()
    (folder / SCHEDULER).write_text("{}")
    (folder / INDEX).write_text("{}")
    return folder


@pytest.fixture
def folder(whole):
    """A whole pipeline folder; what a test changes is as before in the next."""
    before = {file: (whole / file).read_bytes() for file in READERS}
    yield whole
    for file, content in before.items():
        path = whole / file
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink() or not path.is_file():
            path.unlink()
        path.write_bytes(content)


def change(folder, file, **entries):
    record = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps(record))


def refusal(folder, file):
    with pytest.raises(ModelFileError) as error:
        READERS[file](folder)
    said = str(error.value)
    assert "\n" not in said and len(said) < 600
    return said


WRONG = [  # (file, field, values)
    (PIPELINE, "context_rows", [0, -1, True, "16", NAN, 65_537, HUGE]),
    (PIPELINE, "text_rows", [-1, 1.5, [], HUGE]),
    (PIPELINE, "num_frames", [0, 2, 10, 65_537, None, HUGE]),
    (PIPELINE, "height", [0, 8, 63, 8_208, {}]),
    (PIPELINE, "width", [-16, 40, 64.0, HUGE]),
    (PIPELINE, "fps", [0, 241, INF, False]),
    (PIPELINE, "latent_space", ["scaled", 1, None]),
    (VAE, "base_dim", [0, -1, 1.5, True, HUGE, None]),
    (VAE, "z_dim", [8, 0, "16"]),
    (VAE, "dim_mult", [[], [1, 2], [1, 2, 0], [1, 2, True], "123", [1] * 5000, None]),
    (VAE, "num_res_blocks", [0, 10**6, HUGE, True]),
    (VAE, "temperal_downsample", [[], [1, 1], [True], [True, True, False], "ab"]),
    (VAE, "latents_mean", [[0] * 15, [NAN] * 16, [INF] * 16, [True] * 16, ["1"] * 16, 0]),
    (VAE, "latents_std", [[1] * 17, [0] * 16, [-1] * 16, [NAN] * 16, [1e-300] * 16, 1]),
    (VAE, "in_channels", [3, 0, HUGE]),
    (VAE, "out_channels", [3, -12, None]),
    (VAE, "patch_size", [0, 4, True, "2"]),
    (VAE, "decoder_base_dim", [0, -1, [], HUGE]),
    (VAE, "is_residual", [True, 1]),
    (VAE, "attn_scales", [[1.0], "x"]),
    (VAE, "scale_factor_spatial", [16, True, "8"]),
    (VAE, "scale_factor_temporal", [8]),
    (VAE, "_class_name", ["AutoencoderKL", 1, []]),
    (VAE, "quantization_config", [{"load_in_8bit": True}]),
    (TEXT, "vocab_size", [0, -1, HUGE, True]),
    (TEXT, "num_layers", [0, 1001, HUGE]),
    (TEXT, "relative_attention_num_buckets", [0, 3, True, NAN]),
    (TEXT, "relative_attention_max_distance", [0, 8, 1.5, "x", NAN, HUGE]),
    (TEXT, "layer_norm_epsilon", [0, -1, NAN, INF, 1, True, "x", HUGE]),
    (TEXT, "model_type", ["t5", None, []]),
    (TEXT, "feed_forward_proj", ["relu", "gelu"]),
    (TEXT, "dense_act_fn", ["relu", 1]),
    (TEXT, "is_gated_act", [False, 1]),
    (TEXT, "is_decoder", [True]),
    (TEXT, "pad_token_id", [1, -1, "x"]),
    (TEXT, "eos_token_id", [0, [1], 10**9]),
    (TEXT, "quantization_config", [{"quant_method": "x"}]),
    (TRANSFORMER, "heads", [0, True, 2.5, HUGE]),
    (TRANSFORMER, "layers", [0, 3, 1001, HUGE]),
    (TRANSFORMER, "vocab", [-1, 36, NAN]),
    (TRANSFORMER, "text_flow", ["x", 1]),
    (TRANSFORMER, "unknown", [1]),
    (SCHEDULER, "flow_shift", [0, -1, NAN, INF, 1001, True, "3", [], HUGE]),
    (SCHEDULER, "_class_name", [1, [], {}, None]),
    (SCHEDULER, "prediction_type", ["epsilon", [], None]),
    (INDEX, "_class_name", [1, [], None, "WanImageToVideoPipeline"]),
    (INDEX, "transformer_2", [["diffusers", "WanTransformer3DModel"], 1]),
]
CASES = [(file, field, value) for file, field, values in WRONG for value in values]


@pytest.mark.parametrize("file, name, value", CASES, ids=lambda value: f"{value!r:.24}")
def test_a_field_that_cannot_be_followed_is_refused_by_its_name(folder, file, name, value):
    change(folder, file, **{name: value})
    said = refusal(folder, file)
    assert name in said or file == INDEX
    assert Path(file).name in said or file in (TRANSFORMER, INDEX)


NEEDED = [
    (VAE, "base_dim"),
    (VAE, "latents_std"),
    (VAE, "dim_mult"),
    (TEXT, "vocab_size"),
    (TEXT, "num_heads"),
    (TEXT, "model_type"),
]


@pytest.mark.parametrize("file, name", NEEDED)
def test_a_field_that_is_needed_is_refused_where_it_is_missing(folder, file, name):
    record = json.loads((folder / file).read_text())
    del record[name]
    (folder / file).write_text(json.dumps(record))
    assert f"{name} must be given" in refusal(folder, file)


def test_a_field_that_older_files_do_not_have_may_be_missing(folder):
    known = json.loads((folder / VAE).read_text())
    for name in ("attn_scales", "is_residual", "decoder_base_dim", "scale_factor_spatial"):
        del known[name]
    (folder / VAE).write_text(json.dumps(known))
    assert not load_vae(folder, "cpu", torch.float32, False).config.attn_scales


def test_what_a_field_says_is_followed(folder):
    change(folder, PIPELINE, num_frames=13, height=32, fps=24, text_rows=0)
    assert read_pipeline_config(folder) == PipelineConfig("normalized", 16, 0, 13, 32, 64, 24)
    change(folder, VAE, latents_mean=[0] * 16, latents_std=[2] * 16, decoder_base_dim=16)
    assert load_vae(folder, "cpu", torch.float32, False).config.latents_std == [2.0] * 16
    change(folder, TEXT, relative_attention_max_distance=256, layer_norm_epsilon=1e-5)
    config = TextEncoder.from_pretrained(folder).encoder.config
    assert (config.relative_attention_max_distance, config.layer_norm_epsilon) == (256, 1e-5)
    change(folder, SCHEDULER, flow_shift=1000)
    assert read_index(folder).flow_shift == 1000.0
    change(folder, INDEX, transformer_2=[None, None])
    assert read_index(folder).ignored == ""


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"NaN",
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:8]))
@pytest.mark.parametrize("file", READERS)
def test_what_is_no_json_object_is_refused(folder, file, content):
    (folder / file).write_bytes(content)
    assert str(folder / file) in refusal(folder, file)


NO_FILES = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path}.p")),
    "broken link": lambda path: path.symlink_to("gone"),
    "sparse": lambda path: (path.touch(), os.truncate(path, 2**40)),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("file", [f for f in READERS if f not in (TOKENIZER, TRANSFORMER)])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, file, make):
    (folder / file).unlink()
    make(folder / file)
    refusal(folder, file)
    Path(f"{folder / file}.p").unlink(missing_ok=True)


@pytest.mark.parametrize("make", [make for name, make in NO_FILES.items() if name != "sparse"])
@pytest.mark.parametrize("file", [TOKENIZER, TRANSFORMER])
def test_a_part_whose_file_is_none_is_refused(folder, file, make):
    (folder / file).unlink()
    make(folder / file)
    refusal(folder, file)
    Path(f"{folder / file}.p").unlink(missing_ok=True)


def tokenizer_with(folder, word, index):
    record = json.loads((folder / TOKENIZER).read_text())
    record["model"]["vocab"][word] = index
    (folder / TOKENIZER).write_text(json.dumps(record))


@pytest.mark.parametrize("index", [37, 99, 2**31])
def test_the_tokenizer_has_no_ids_beyond_the_text_encoders(folder, index):
    tokenizer_with(folder, "zebra", index)
    assert f"vocab_size, 37; got {index}" in refusal(folder, TOKENIZER)


def test_the_transformer_takes_what_the_text_encoder_and_the_tokenizer_make(folder, tmp_path):
    parts = Pipeline.without_model(folder)
    cfg = ModelConfig.preset("tiny")
    parts.check_model(cfg)
    for other, said in (
        ({"text_dim": 32}, "text_dim must be the text encoder's d_model, 64; got 32"),
        ({"vocab": 20}, "vocab must be above the tokenizer's ids, up to 36, .* got 20"),
    ):
        model = engine.UniViGU(ModelConfig(**{**cfg.__dict__, "layers": 1, **other}))
        path = tmp_path / said[:4]
        engine.save_pretrained(model, path)
        with pytest.raises(ModelFileError, match=said):
            Pipeline.from_pretrained(folder, "cpu", transformer_path=path)
    change(folder, PIPELINE, text_rows=0)
    Pipeline.from_pretrained(folder, "cpu", transformer_path=tmp_path / "voca")


@pytest.mark.parametrize("value", ["16", INF, 0, HUGE, None], ids=lambda value: f"{value!r:.9}")
def test_an_estimate_checks_the_vae_too(folder, value):
    change(folder, VAE, base_dim=value)
    with pytest.raises(ModelFileError, match="config.json .*base_dim must be"):
        read_codecs(folder)
