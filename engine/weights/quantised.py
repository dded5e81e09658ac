"""FP8 checkpoints of others, dequantised on reading: ComfyUI's `scale_weight` or `weight_scale`
beside each weight, one for all of it or one for each row, and files that were cast without scales.

Folders of our own in FP8 are another form, which `load_model` keeps: see `engine.fp8`. A folder of
ours may be stored in ComfyUI's, to be small; then it is dequantised like the others.
"""

from functools import partial

import torch

from engine.errors import ModelFileError, listed
from engine.files.tensors import Entry
from engine.weights.files import FLOATS
from engine.weights.forms import say

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
SCALED = ".scale_weight"  # in no file of ours in FP8
SCALES = (SCALED, ".weight_scale")
_FOR_INPUTS = (".scale_input", ".input_scale")
_MARKS = ("scaled_fp8", ".comfy_quant")  # say in which format the weights are, as their dtype does
_OTHERS = {
    ".weight_scale_2": "NVFP4",
    ".weight_scale_inv": "FP8 in blocks",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes int8",
}


def dequantised(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries of a checkpoint in any layout, its 8-bit weights as floats: float32 where they
    have scales, bfloat16, which holds every FP8 number, where they have none.

    Errors: ModelFileError for another quantisation, and for scales that do not fit their weights.
    """
    _refuse_others(entries)
    inputs = [name for name in entries if name.endswith(_FOR_INPUTS)]
    if inputs:
        say(f"weights: {listed(inputs)}: scales of inputs are ignored; nothing is computed in them")
    scales = {name: entry for name, entry in entries.items() if name.endswith(SCALES)}
    aside = {*inputs, *scales, *(name for name in entries if name.endswith(_MARKS))}
    plain = {name: entry for name, entry in entries.items() if name not in aside}

    for name, entry in plain.items():
        if entry.dtype in EIGHT_BITS:
            plain[name] = Entry(entry.key, entry.shape, "BF16", partial(_widened, entry))
    for name, scale in scales.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in plain:
            raise ModelFileError(
                f"{scale.key} must have a weight beside it; got none. Download the file again."
            )
        plain[weight] = _scaled(entries[weight], scale)
    return plain


def _widened(entry: Entry) -> torch.Tensor:
    return entry.read().to(torch.bfloat16)


def _scaled(weight: Entry, scale: Entry) -> Entry:
    """The product, in fp32. Errors: ModelFileError."""
    whole = weight.shape[:1] + (1,) * (len(weight.shape) - 1)
    sizes = ((), (1,), weight.shape[:1], whole)
    if weight.dtype not in (*EIGHT_BITS, *FLOATS) or scale.shape not in sizes:
        raise ModelFileError(
            f"{scale.key} must be a scale of {weight.key}, a floating-point tensor "
            f"{list(weight.shape)}: one number, or one for each row; got {list(scale.shape)} and "
            f"{weight.dtype}. Use an unquantised checkpoint of the same model."
        )

    def read() -> torch.Tensor:
        factor = scale.read().float()
        if not bool((factor.isfinite() & (factor > 0)).all()):
            raise ModelFileError(
                f"{scale.key} must be finite and positive; got {factor.flatten()[:3].tolist()}. "
                "Download the file again."
            )
        rows = factor.reshape(whole) if factor.numel() > 1 else factor.reshape(())
        return weight.read().float() * rows

    return Entry(weight.key, weight.shape, "F32", read)


def _refuse_others(entries: dict[str, Entry]) -> None:
    for ending, what in _OTHERS.items():
        if found := [name for name in entries if name.endswith(ending)]:
            raise ModelFileError(
                f"weights must be floats, or FP8 with a scale for each weight or row; got {what} "
                f"({listed(found)}). Use the bf16 checkpoint of the same model."
            )
