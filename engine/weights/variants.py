"""Relatives of Wan2.1 text-to-video, which are refused by name: what tensors, shapes, a
configuration or the names of files say a model is."""

import re
from pathlib import Path
from typing import Any

from engine.errors import ModelFileError, listed
from engine.weights.names import ANCHOR

CHANNELS = 16  # latent channels that a text-to-video model takes
TWO_EXPERTS = (
    "{}: must hold one transformer for all noise levels; got Wan2.2 A14B, which has two experts: "
    "{}. One alone gives blur or noise. Use a Wan2.1 checkpoint, such as "
    "Wan-AI/Wan2.1-T2V-14B-Diffusers."
)

_BY_TENSOR = (  # the more special first: most have image-to-video's tensors too
    (r"vace_(blocks|patch_embedding)\.", "a VACE model"),
    (r"(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.", "an Animate model"),
    (r"(audio_injector|casual_audio_encoder|audio_proj|audio_model)\.", "an audio-driven model"),
    (r"(ref_conv|control_adapter|camera_adapter)\.", "a Fun control model"),
    (r"fps_(embedding|projection)\.", "a SkyReels diffusion-forcing model"),
    (r"img_emb\.emb_pos|image_embedder\.pos_embed", "a first-and-last-frame model"),
    (r"img_emb\.|image_embedder\.", "an image-to-video model"),
    (r"(k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k)\.", "an image-to-video model"),
)
_BY_CHANNELS = {
    32: "a video-to-video or control model",
    36: "an image-to-video or Fun InP model",
    48: "a Wan2.2 TI2V-5B or Fun control model",
    52: "a Fun control model",
    100: "a Fun camera-control model",
}
_BY_TYPE = {
    "i2v": "an image-to-video model",
    "flf2v": "a first-and-last-frame model",
    "ti2v": "a Wan2.2 TI2V model",
    "vace": "a VACE model",
    "s2v": "an audio-driven model",
    "animate": "an Animate model",
}
_EXPERT = re.compile(r"(high|low)[-_]?noise", re.I)


def refuse_variant(stock: dict[str, Any], config: dict[str, Any]) -> None:
    """Errors: ModelFileError that names the model, where it is another than text-to-video.

    stock: anything with a shape by name, in any layout.
    """
    for pattern, what in _BY_TENSOR:
        if found := [name for name in stock if re.search(rf"(^|\.)({pattern})", name)]:
            raise _error(what, f"unexpected {len(found)}: {listed(found)}")
    kind = config.get("model_type", "t2v")
    if kind != "t2v" and isinstance(kind, str):
        raise _error(_BY_TYPE.get(kind, f"a {kind} model"), f"model_type {kind!r} in its config")
    shape = stock[ANCHOR].shape if ANCHOR in stock else ()
    if len(shape) == 5 and shape[1] != CHANNELS:
        what = _BY_CHANNELS.get(shape[1], "a model of another latent space")
        raise _error(what, f"{ANCHOR} {list(shape)}: {shape[1]} input channels")


def refuse_expert(path: Path) -> None:
    """Errors: ModelFileError for one of Wan2.2 A14B's two transformers, by the name of its file or
    folder: its tensors are those of a Wan2.1 14B."""
    folder = path.parent.name if path.parent.name in ("high_noise_model", "low_noise_model") else ""
    if found := [name for name in (path.name, folder) if _EXPERT.search(name)]:
        raise ModelFileError(TWO_EXPERTS.format(path, listed(found)))


def _error(what: str, why: str) -> ModelFileError:
    return ModelFileError(
        f"tensors must be those of a text-to-video model with {CHANNELS} input channels; "
        f"got {what} ({why}). Use the T2V checkpoint, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
    )
