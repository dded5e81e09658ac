"""What stands around the network: decoding a video and encoding a prompt, as the engine does it and
as diffusers' pipeline does. On a GPU both have Wan2.1's configuration; weights are random.

The VAE's frames and rows follow the setting's latents: on a GPU 81 frames of 480 x 832.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.harness.groups import Group, each_checked, timed
from bench.harness.models import AGREEMENT, DIFFUSERS, ENGINE, Setting, error
from engine.media import TextEncoder, TextRows, build_word_tokenizer
from engine.media.autoencoder import WanVAE
from engine.media.umt5 import UMT5Encoder, keys_of
from engine.media.vae import decode_chunks, latent_scale
from engine.toy.recipe import VAE as SMALL_VAE

DECODE, ENCODE = "VAE decode", "text encoder"
TILED = f"{ENGINE}, tiling"
WAN_TEXT = {"vocab_size": 256384, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
SMALL_TEXT = {"vocab_size": 512, "d_ff": 128, "num_heads": 4, "num_layers": 2}
WORDS = [f"w{i}" for i in range(64)]
TOKENS = 20  # of the prompt, with EOS


def cases(setting: Setting) -> list[tuple[str, str]]:
    """The engine decodes in fp32; on a GPU it encodes in bf16, as the model asks."""
    return [(DECODE, "float32"), (ENCODE, "bfloat16")]


def filled(make: Callable[[], nn.Module], s: Setting, dtype: torch.dtype) -> nn.Module:
    """The module with weights of a seed, the same numbers in each dtype up to rounding. It is made
    where it is to be, parameter by parameter: umT5 in fp32 is 23 GB."""
    with torch.device("meta"):
        model = make()
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model = model.to_empty(device=s.device).eval().requires_grad_(False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    g = torch.Generator(s.device).manual_seed(0)

    for name, p in model.named_parameters():
        if p.ndim > 1 and "gamma" not in name:  # what goes through a matrix keeps its size
            drawn = torch.randn(p.shape, generator=g, device=s.device)
            p.copy_(drawn * p[0].numel() ** -0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def vae_of(s: Setting, dtype: torch.dtype = torch.float32):
    from diffusers import AutoencoderKLWan

    return filled(lambda: AutoencoderKLWan(**({} if s.cuda else SMALL_VAE)), s, dtype)


def encoder_of(s: Setting, dtype: torch.dtype):
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = WAN_TEXT if s.cuda else SMALL_TEXT
    width = {"d_model": s.cfg.text_dim, "d_kv": 64 if s.cuda else 16}
    return filled(lambda: UMT5EncoderModel(UMT5Config(**sizes, **width)), s, dtype)


def our_vae(s: Setting) -> WanVAE:
    """Ours, with the same weights."""
    theirs = vae_of(s)
    return filled_from(theirs.state_dict(), lambda: WanVAE(dict(theirs.config)))


def our_encoder(s: Setting, dtype: torch.dtype) -> UMT5Encoder:
    """Ours, with the same weights."""
    theirs = encoder_of(s, dtype)
    state = theirs.state_dict()
    config = theirs.config.to_dict()
    return filled_from(state, lambda: UMT5Encoder(config), lambda name: keys_of(name)[0])


def filled_from(
    state: dict[str, Tensor], make: Callable[[], nn.Module], key_of: Callable[[str], str] = str
) -> nn.Module:
    with torch.device("meta"):
        model = make()
    model.load_state_dict({n: state[key_of(n)] for n in model.state_dict()}, assign=True)
    return model.eval().requires_grad_(False)


def decoders(s: Setting) -> dict[str, Callable]:
    """Name -> a maker of a call that gives pixels."""
    latents = torch.randn(s.samples, 16, *s.latent, generator=torch.Generator().manual_seed(0)).to(
        s.device
    )

    def engine(tiling: bool):
        vae = our_vae(s)
        vae.use_tiling = tiling
        scale = latent_scale(vae, "normalized")
        return lambda: torch.cat([*decode_chunks(vae, latents, *scale)], 2)

    def diffusers(dtype: torch.dtype):
        vae = vae_of(s, dtype)
        mean, std = latent_scale(our_vae(s), "normalized")
        return lambda: vae.decode((latents * std + mean).to(dtype), return_dict=False)[0]

    return {
        f"{DIFFUSERS}, bf16": lambda: diffusers(torch.bfloat16),
        ENGINE: lambda: engine(False),
        TILED: lambda: engine(True),
    }


def encoders(s: Setting, dtype: torch.dtype) -> dict[str, Callable]:
    """Name -> a maker of a call that gives context rows of a prompt of 20 tokens. diffusers pads it
    to all rows first."""
    tokenizer = build_word_tokenizer(WORDS)
    prompts = [" ".join(WORDS[: min(TOKENS, s.context_rows) - 1])] * s.samples

    def engine():
        text = TextEncoder(tokenizer, our_encoder(s, dtype))
        return lambda: text.encode(prompts, s.context_rows).context

    def diffusers():
        model, rows = encoder_of(s, dtype), TextRows(tokenizer)

        def call() -> Tensor:
            encoded = [rows.encode_rows(prompt, s.context_rows) for prompt in prompts]
            ids = torch.stack([ids for ids, _ in encoded]).to(s.device)
            mask = (ids != rows.pad_id).long()
            return model(ids, mask).last_hidden_state * mask[..., None]

        return call

    return {DIFFUSERS: diffusers, ENGINE: engine}


@torch.inference_mode()
def measure(case: str, dtype: str, s: Setting) -> Iterator[Group | str]:
    """Decoding is checked against the engine's own, untiled, in fp32; tiles see less than the whole
    picture and are not. Encoding against diffusers' way in fp32."""
    failed, kind = {}, getattr(torch, dtype)
    group = Group(case, dtype)
    if case == DECODE:
        makers, limit = decoders(s), AGREEMENT["bfloat16"]
        truth = makers[ENGINE]()().cpu()
    else:
        makers, limit = encoders(s, kind), AGREEMENT[dtype]
        truth = encoders(s, torch.float32)[DIFFUSERS]()().cpu()

    def error_of(name: str, call: Callable) -> float:
        return 0.0 if name == TILED else error(call().cpu(), truth)

    calls, errors, resident = yield from each_checked(group, makers, error_of, failed, limit, s)
    errors |= {TILED: None} if TILED in errors else {}
    yield from timed(group, calls, errors, failed, limit, s, resident)
