"""A small pipeline folder with random weights, in the layout that the engine reads."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from engine.config import ModelConfig, PipelineConfig
from engine.media import build_word_tokenizer, save_tokenizer
from engine.model import UniViGU
from engine.toy.recipe import VAE
from engine.toy.scenes import FPS, FRAMES, SIZE, words
from engine.weights import save_pretrained

TEXT_DIM, ROWS = 64, 24  # the text_dim of preset tiny


def build_pipeline_folder(path: Path) -> Path:
    """Writes vae, text_encoder, tokenizer, transformer and pipeline.json (9 frames of 64 x 64)."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE | {"base_dim": 8})
    vae.save_pretrained(path / "vae")
    tokenizer = build_word_tokenizer(words())
    save_tokenizer(tokenizer, path / "tokenizer")
    sizes = {"d_model": TEXT_DIM, "d_kv": 16, "num_heads": 2, "d_ff": 32, "num_layers": 1}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=tokenizer.get_vocab_size(), **sizes))
    encoder.save_pretrained(path / "text_encoder")
    shape = {"heads": 2, "head_dim": 16, "layers": 2, "ffn_dim": 64, "freq_dim": 32}
    cfg = ModelConfig(**shape, text_dim=TEXT_DIM, vocab=tokenizer.get_vocab_size())
    save_pretrained(UniViGU(cfg), path / "transformer")
    config = PipelineConfig("normalized", ROWS, ROWS, FRAMES, SIZE, SIZE, FPS)
    (path / "pipeline.json").write_text(json.dumps(asdict(config)))
    return path
