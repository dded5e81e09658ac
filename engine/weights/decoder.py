"""Files of tiny decoders: `taew2_1`, .safetensors or .pth, read without unpickling."""

from pathlib import Path

import torch

from engine.errors import ModelFileError
from engine.media.taehv import Grow, TinyDecoder
from engine.weights.files import inventory
from engine.weights.names import listed


def read_decoder(path: str | Path, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """The frozen decoder of a file of TAEHV's form. What it holds of an encoder is left out.

    A layer that makes frames may hold more of them than the decoder asks for: the last are taken.

    Errors: ModelFileError for a file that is absent or damaged, or holds other tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: a decoder must be a file; got none there. Check the path.")
    entries = {k: e for k, e in inventory(path)[0].items() if not k.startswith("encoder.")}
    with torch.device("meta"):
        decoder = TinyDecoder(path.name)
    state = decoder.state_dict()
    grow = {f"{k}.conv.weight" for k, m in decoder.named_modules() if isinstance(m, Grow)}

    missing, unexpected = sorted(state.keys() - entries), sorted(entries.keys() - state)
    if missing or unexpected:
        raise ModelFileError(
            f"{path}: it must hold the decoder of taew2_1; got missing: "
            f"{listed(missing) or 'none'}, unexpected: {listed(unexpected) or 'none'}. "
            "Take taew2_1 of github.com/madebyollin/taehv: others are for other latents."
        )
    for name, wanted in state.items():
        tensor, rows = entries[name].read(), len(wanted)
        if name in grow and len(tensor) % rows == 0:
            tensor = tensor[-rows:]
        if tensor.shape != wanted.shape or not tensor.is_floating_point():
            raise ModelFileError(
                f"{path}: {name} must be floats {list(wanted.shape)}; got {tensor.dtype} "
                f"{list(tensor.shape)}. Take taew2_1 of github.com/madebyollin/taehv."
            )
        state[name] = tensor.to(device, dtype, copy=True)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)
