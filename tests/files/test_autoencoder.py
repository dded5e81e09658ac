"""Our VAE against diffusers', whole, in tiles, by chunks and from threads: bit for bit on a CPU by
plain PyTorch, within twice its rounding by our kernels. Batches are of two where diffusers runs:
of one small clip it takes another convolution, see `ONEDNN`."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import contracts
import numpy as np
import pytest
import torch

from engine import Pipeline
from engine.config import EMBEDDED
from engine.errors import ModelFileError, UsageError
from engine.media.autoencoder import WanVAE
from engine.media.parts import load_parts
from engine.media.tiles import TILE, split_frames
from engine.toy import draw_scenes, render

diffusers = pytest.importorskip("diffusers")

FOLDED = {
    "base_dim": 6,
    "z_dim": 16,
    "dim_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
WIDER = {  # Wan 2.1's levels; a decoder of another width
    "base_dim": 4,
    "decoder_base_dim": 6,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 3],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}


def pair(config: dict) -> tuple[WanVAE, torch.nn.Module]:
    """Ours and diffusers', with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**config).eval().requires_grad_(False)
    for name, p in theirs.named_parameters():
        p.add_(torch.randn_like(p), alpha=0.3 if name.endswith(("gamma", "bias")) else 0.02)
    with torch.device("meta"):
        ours = WanVAE(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval().requires_grad_(False), theirs


@pytest.fixture(scope="module", params=[FOLDED, WIDER], ids=["folded", "wider"])
def vaes(request):
    return pair(request.param)


def pixels(frames: int, height: int = 16, width: int = 24, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def latents_of(frames: int, height: int = 2, width: int = 3, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 16, (frames - 1) // 4 + 1, height, width, generator=generator)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_it_is_diffusers_vae_to_the_bit(vaes, frames):
    ours, theirs = vaes
    x, z = pixels(frames), latents_of(frames)
    expected = theirs.encode(x).latent_dist.mode()
    assert expected.shape == z.shape and expected.std() > 0.01
    assert torch.equal(ours.encode(x), expected)
    decoded = theirs.decode(z).sample
    assert decoded.shape == x.shape and decoded.std() > 0.01
    assert torch.equal(ours.decode(z), decoded)


@pytest.mark.parametrize("frames", [1, 9])
def test_our_kernels_are_within_two_times(vaes, frames):
    ours, theirs = vaes
    truth = copy.deepcopy(theirs).double()
    x, z = pixels(frames), latents_of(frames)
    ours.choose()
    try:
        encoded, decoded = ours.encode(x), ours.decode(z)
    finally:
        ours.choose("reference")
    plain = theirs.encode(x).latent_dist.mode(), theirs.decode(z).sample
    wide = truth.encode(x.double()).latent_dist.mode(), truth.decode(z.double()).sample
    assert not torch.equal(decoded, plain[1])
    contracts.assert_within((encoded, decoded), plain, wide, 2, torch.float32)


@pytest.mark.parametrize("frames, height, width", [(5, 16, 296), (1, 264, 264)])
def test_tiles_are_diffusers_tiles_to_the_bit(vaes, frames, height, width):
    ours, theirs = vaes
    x, z = pixels(frames, height, width), latents_of(frames, height // 8, width // 8)
    assert max(height, width) > TILE
    plain = ours.encode(x), ours.decode(z)
    ours.use_tiling = True
    theirs.enable_tiling()
    try:
        tiled = ours.encode(x), ours.decode(z)
        expected = theirs.encode(x).latent_dist.mode(), theirs.decode(z).sample
    finally:
        ours.use_tiling = theirs.use_tiling = False
    assert all(torch.equal(a, b) for a, b in zip(tiled, expected, strict=True))
    assert not torch.equal(tiled[1], plain[1])


@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 9, 81])
def test_pieces_are_the_whole(vaes, frames, tiling):
    ours, width = vaes[0], 264 if tiling else 32
    x, z = pixels(frames, 16, width, 1), latents_of(frames, 2, width // 8, 1)
    ours.use_tiling = tiling
    try:
        pieces, whole = [*ours.decode_chunks(z)], ours.decode(z)
        encoded = ours.encode_chunks(iter(split_frames(x))), ours.encode(x)
    finally:
        ours.use_tiling = False
    assert [piece.shape[2] for piece in pieces] == [1] + [4] * (frames // 4)
    assert torch.equal(torch.cat(pieces, 2), whole) and torch.equal(*encoded)


def test_a_piece_is_decoded_when_it_is_asked_for(vaes):
    """And a chunk of pixels encoded before the next is read."""
    ours, ran = vaes[0], []
    hooks = [
        m.register_forward_hook(lambda *_: ran.append(1)) for m in (ours.encoder, ours.decoder)
    ]
    decoding = ours.decode_chunks(latents_of(9))
    next(decoding)
    assert len(ran) == 1
    decoding.close()

    def chunks():
        for n, chunk in enumerate(split_frames(pixels(9))):
            assert len(ran) == 1 + n
            yield chunk

    ours.encode_chunks(chunks())
    assert len(ran) == 4
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("frames", [0, 2, 8])
def test_other_lengths_are_refused(vaes, frames):
    with pytest.raises(UsageError, match=rf"^vae: frames must be 4k\+1; got {frames}\."):
        vaes[0].encode(pixels(9)[:, :, :frames])


def test_threads_share_one_vae(vaes):
    """Eight threads, each several clips of other lengths than its neighbours'."""
    ours = vaes[0]
    lengths = [1, 5, 9, 5, 1, 9, 5, 9] * 2
    alone = {n: (ours.encode(pixels(n)), ours.decode(latents_of(n))) for n in set(lengths)}

    def run(n: int) -> bool:
        with torch.no_grad():
            found = ours.encode(pixels(n)), ours.decode(latents_of(n))
        return all(torch.equal(a, b) for a, b in zip(found, alone[n], strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, lengths))


class Stop(Exception):
    pass


@pytest.mark.parametrize("tiling", [False, True])
def test_a_check_ends_the_decoding_between_latent_frames(vaes, tiling):
    ours, ran, asked = vaes[0], [], []
    hook = ours.decoder.register_forward_hook(lambda *_: ran.append(1))

    def check():
        asked.append(1)
        if len(ran) == 3:
            raise Stop

    ours.use_tiling = tiling
    try:
        with pytest.raises(Stop):  # two tiles of two latent frames, or four frames
            [*ours.decode_chunks(latents_of(5 if tiling else 17, 2, 40 if tiling else 4, 1), check)]
    finally:
        ours.use_tiling = False
        hook.remove()
    assert len(ran) == 3 and len(asked) == 4


WAN22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "z_dim": 48}


@pytest.mark.parametrize(
    "change, got",
    [
        (WAN22, "is_residual"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"patch_size": 4}, "4 of dim_mult with patch_size 4"),
        ({"temperal_downsample": [False, False, True]}, "3 of temperal_downsample"),
        ({"latents_mean": [0.0] * 8}, r"\(16, 8, 16\) channels"),
        (
            {"_class_name": "AutoencoderKLMagvit"},
            "_class_name must be AutoencoderKLWan; got 'AutoencoderKLMagvit'",
        ),
    ],
    ids=str,
)
def test_other_vaes_are_refused_by_name(change, got):
    config = WIDER | {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    WanVAE(config)
    match = f"^vae: .*{got}"
    with pytest.raises(ModelFileError, match=match):
        WanVAE(config | change)


def test_the_means_are_the_configurations_own(vaes):
    ours, theirs = vaes
    assert ours.config.latents_mean == theirs.config.latents_mean
    make = partial(diffusers.AutoencoderKLWan, **WIDER, latents_mean=[0.5] * 16)
    assert WanVAE(dict(make().config)).config.latents_mean == [0.5] * 16


def test_in_bf16_pixels_move_little():
    """The embedded model's VAE on its own clips, against fp32."""
    clips = torch.from_numpy(render(draw_scenes(2, 0, held_out=True)))
    exact = Pipeline.without_model(EMBEDDED)
    latents = exact.encode_video(clips)
    pixels = exact.decode_video(latents).astype(float)
    load = partial(load_parts, EMBEDDED, "cpu", torch.float32, "none", False)
    coarse = Pipeline(None, *load(vae_dtype=torch.bfloat16))
    off = coarse.decode_video(latents) - pixels
    assert 40 < 10 * np.log10(255**2 / np.square(off).mean()) < 60
    assert coarse.encode_video(clips).dtype == torch.float32
    with pytest.raises(UsageError, match="float32 or torch.bfloat16; got torch.float16"):
        load(vae_dtype=torch.float16)
