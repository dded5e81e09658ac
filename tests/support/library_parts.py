"""diffusers' and transformers' own parts: the oracles of ours."""

import torch
from torch import nn

from engine.media.umt5 import UMT5Encoder, keys_of


def as_transformers(tokenizer):
    """transformers' class around a `tokenizers.Tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def as_ours(theirs: nn.Module) -> UMT5Encoder:
    """Our encoder with the weights of a transformers UMT5EncoderModel."""
    with torch.device("meta"):
        ours = UMT5Encoder(theirs.config.to_dict())
    state = theirs.state_dict()
    ours.load_state_dict({n: state[keys_of(n)[0]] for n in ours.state_dict()}, assign=True)
    return ours.eval().requires_grad_(False)
