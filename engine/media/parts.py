"""The models beside the network, as one: a VAE, a text encoder and its tokenizer, and what the
folder says of itself. It is all that data work needs.

A pipeline folder holds transformer/, vae/, text_encoder/, tokenizer/ and, where it is ours,
pipeline.json. diffusers' Wan folders are read as they are. Legend: B samples, N frames, H,W pixels,
C context rows.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import FRAME_STRIDE, ModelConfig, PipelineConfig, read_pipeline_config
from engine.errors import ModelFileError, NonFinite, UsageError, go_on, require
from engine.files.writing import replacing
from engine.media.autoencoder import WanVAE
from engine.media.taehv import TinyDecoder
from engine.media.text import Kept, TextEncoder
from engine.media.tiles import split_frames
from engine.media.vae import decode_chunks, encode, latent_scale, load_vae
from engine.planning import memory
from univigu_kernels import Once

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_folder(path: str | Path) -> Path:
    """The folder `path`, or that of the model with this id in Hugging Face's cache, such as
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers". Nothing is downloaded. Errors: ModelFileError,
    MissingPackage."""
    folder, name = Path(path), str(path)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name):
        raise ModelFileError(
            f"pipeline: {path} must be a folder; got none there. Check --model-path."
        )

    hub, missing = require("huggingface_hub", "models"), require("huggingface_hub.errors", "models")
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except missing.LocalEntryNotFoundError:
        raise ModelFileError(
            f"pipeline: {name} must be a folder or a model in Hugging Face's cache; got neither. "
            f"Run hf download {name}"
        ) from None


def load_parts(
    path,
    device,
    dtype: torch.dtype,
    offload: str,
    vae_tiling: bool,
    vae_dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
    once: Once | None = None,
) -> tuple[WanVAE, TextEncoder, PipelineConfig]:
    """VAE, text encoder and configuration of a pipeline folder. Arguments and errors: as
    `Pipeline.from_pretrained`."""
    if offload not in ("none", "text_encoder"):
        raise UsageError(f"pipeline: offload must be none or text_encoder; got {offload!r}.")
    if vae_dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"pipeline: vae_dtype must be torch.float32 or torch.bfloat16; got {vae_dtype}."
        )

    path = find_folder(path)
    vae = load_vae(path, device, vae_dtype, vae_tiling, kernels, once)
    text = TextEncoder.from_pretrained(path, device, dtype, offload == "text_encoder")
    return vae, text, read_pipeline_config(path)


class Parts:
    """Pixels to latents and back, and prompts to context."""

    def __init__(self, vae: WanVAE, text: TextEncoder, config: PipelineConfig):
        self.vae, self.text, self.config = vae, text, config
        self.decoder: TinyDecoder | None = None  # in place of the VAE's
        self._place()

    def check_model(self, cfg: ModelConfig) -> None:
        """Errors: ModelFileError where a model of `cfg` takes other contexts or tokens than the
        text encoder and the tokenizer make."""
        width, largest = self.text.encoder.config.d_model, self.text.largest_id
        if cfg.text_dim != width:
            raise ModelFileError(
                f"transformer: text_dim must be the text encoder's d_model, {width}; got "
                f"{cfg.text_dim}. Use parts of one model."
            )
        if self.config.text_rows and cfg.vocab <= largest:
            raise ModelFileError(
                f"transformer: vocab must be above the tokenizer's ids, up to {largest}, where "
                f"pipeline.json has text_rows; got {cfg.vocab}. Use parts of one model."
            )

    def _place(self) -> None:
        self.device = self.vae.device
        self.mean, self.std = latent_scale(self.vae, self.config.latent_space)

    def _move(self, device: torch.device, dtype: torch.dtype, kernels: str) -> None:
        self.vae.to(device).choose(kernels)
        if self.decoder is not None:
            self.decoder.to(device)
        self.text.encoder.place("cpu" if self.text.offloaded else device, dtype)
        self.text.device, self.text.kept = device, Kept()
        self._place()

    @property
    def context_shape(self) -> tuple[int, int]:
        """Context rows and the text encoder's width: C, text_dim."""
        return self.config.context_rows, self.text.encoder.config.d_model

    @property
    def text_encoder(self):
        """The umT5 encoder, an `engine.media.umt5.UMT5Encoder`."""
        return self.text.encoder

    @property
    def tokenizer(self):
        """The `tokenizers.Tokenizer` of prompts and captions."""
        return self.text.tokenizer

    def save_config(self, path: str | Path) -> None:
        with replacing(Path(path) / "pipeline.json") as partial:
            partial.write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    def job_of(self, shape: tuple[int, ...], **job) -> dict:
        """The job that `memory.explain_oom` asks for, of work on latents of `shape` [B,16,F,Y,X].

        job: more fields of `memory.Job`."""
        batch, _, frames, height, width = shape
        fields = {
            "batch": batch,
            "num_frames": 4 * frames - 3,
            "height": 8 * height,
            "width": 8 * width,
            "context_rows": self.config.context_rows,
            "text_rows": self.config.text_rows,
            "device": self.device.type,
            "offload": "text_encoder" if self.text.offloaded else "none",
            "vae_tiling": self.vae.use_tiling,
            "vae_dtype": self.vae.dtype,
        }
        parts, vae = (self.text.encoder, self.vae), self.vae.config
        counts = (sum(p.numel() for p in part.parameters()) for part in parts)
        codecs = memory.Codecs(*counts, vae.base_dim, vae.patch)
        return fields | {"codecs": codecs} | job

    def decoding_peak(self, shape: tuple[int, ...]) -> int:
        """Bytes that decoding latents of `shape` [B,16,F,Y,X] takes at its peak, as estimated."""
        job = self.job_of(shape)
        job.pop("cfg", None)
        codecs = job.pop("codecs")
        return memory.vae_peak(memory.Job(**job), codecs, memory.DECODER_UNITS)

    def encode_video(self, frames: Tensor, check: Callable[[], None] = go_on) -> Tensor:
        """uint8 [B,N,H,W,3] -> latents fp32 [B,16,F,H/8,W/8], the posterior's mode, in the model's
        latent space.

        check: as of `encode_chunks`.
        """
        chunks = split_frames(frames.permute(0, 4, 1, 2, 3))
        return self.encode_chunks(chunks, tuple(frames.shape[:4]), check)

    @torch.no_grad()
    def encode_chunks(
        self,
        chunks: Iterable[Tensor],
        shape: tuple[int, int, int, int],
        check: Callable[[], None] = go_on,
    ) -> Tensor:
        """`encode_video` of uint8 [B,3,n,H,W] in turn: the first frame alone, then four at a time.
        Each is encoded before the next is asked for, but with tiling, which takes all first.

        shape: B, N, H, W of them all, or of more: what an error's advice reckons with.
        check: called before the first frame and before each four after it, of each tile; what it
            raises ends the encoding.
        """
        B, N, height, width = shape
        latents = B, 16, (N - 1) // FRAME_STRIDE + 1, height // 8, width // 8
        with memory.explain_oom(memory.ENCODING, partial(self.job_of, latents)):
            return encode(self.vae, chunks, self.mean, self.std, check)

    def decode_video(self, latents: Tensor, check: Callable[[], None] = go_on) -> np.ndarray:
        """Decode latents fp32 [B,16,F,Y,X] to uint8 [B,N,H,W,3]. check, errors: as
        `decode_chunks`."""
        return np.concatenate([*self.decode_chunks(latents, check)], 1)

    @torch.no_grad()
    def decode_chunks(
        self, latents: Tensor, check: Callable[[], None] = go_on
    ) -> Iterator[np.ndarray]:
        """`decode_video` in pieces uint8 [B,n,H,W,3]: the first frame, then four at a time, each
        decoded when it is asked for. With tiling all are decoded before the first. Errors:
        NonFinite, OutOfMemory.

        check: called before each latent frame, of each tile; what it raises ends the decoding.
        """
        with memory.explain_oom(memory.DECODING, partial(self.job_of, latents.shape)):
            for pixels in self._pixels(latents, check):
                if not pixels.isfinite().all():
                    raise NonFinite(
                        "pipeline: decoded pixels must be finite; got NaN or Inf in the VAE. "
                        "No video was written."
                    )
                pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
                yield (pixels * 255).round().to(torch.uint8).cpu().numpy()

    def _pixels(self, latents: Tensor, check: Callable[[], None]) -> Iterator[Tensor]:
        if self.decoder is None:
            return decode_chunks(self.vae, latents, self.mean, self.std, check)
        mean, std = latent_scale(self.vae, "normalized")
        latents = (latents.float() * self.std + self.mean - mean) / std
        return (x.float() for x in self.decoder.decode_chunks(latents.to(self.vae.dtype), check))

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Encodes prompts to context [B, C, text_dim]; rows after a prompt's last token are zeros.
        "" is guidance's null."""
        return self.encode(prompts, allow_empty=True, keep=False)

    def encode(
        self,
        prompts: list[str],
        allow_empty: bool = False,
        keep: bool = True,
        check: Callable[[], None] = go_on,
    ) -> Tensor:
        """`encode_prompts` for a run: keeps what it encodes for later runs and calls `check`, as
        `TextEncoder.encode`, and refuses "" where `allow_empty` does not say otherwise. Errors:
        UsageError."""
        shape, rows = (len(prompts), *self.config.shape()), self.config.context_rows
        with memory.explain_oom(memory.TEXT, partial(self.job_of, shape)):
            return self.text.encode(prompts, rows, allow_empty, keep, check).context
