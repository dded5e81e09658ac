"""The tiny decoder against a plain one, written from its description: all frames at once, one layer
after the other. There are no trained weights here; both have the same random ones."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from weights_made import WAN_VAE

from engine import Pipeline
from engine.config import EMBEDDED
from engine.errors import ModelFileError
from engine.media.autoencoder import WanVAE
from engine.media.taehv import TinyDecoder
from engine.media.vae import latent_scale
from engine.weights.decoder import read_decoder

Weights = dict[str, torch.Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """Those of taew2_1's decoder, by the names in its file."""
    found = {"1.weight": (256, 16, 3, 3), "1.bias": (256,)}
    for first, width, narrower, times in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
        for block in range(first, first + 3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                found[f"{block}.conv.{layer}.weight"] = width, inputs, 3, 3
                found[f"{block}.conv.{layer}.bias"] = (width,)
        found[f"{first + 4}.conv.weight"] = width * times, width, 1, 1
        found[f"{first + 5}.weight"] = narrower, width, 3, 3
    found |= {"22.weight": (3, 64, 3, 3), "22.bias": (3,)}
    return {f"decoder.{name}": shape for name, shape in found.items()}


@pytest.fixture(scope="module")
def weights() -> Weights:
    g = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes().items():
        fan = torch.Size(shape[1:]).numel()
        made[name] = torch.randn(shape, generator=g) * (fan**-0.5 if len(shape) > 1 else 0.1)
    return made


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.safetensors"
    save_file(weights | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    return path


def plain(w: Weights, latents: torch.Tensor) -> torch.Tensor:
    """[16,F,Y,X] -> [3,N,H,W] from 0 to 1, in fp64."""
    w = {name.removeprefix("decoder."): x.double() for name, x in w.items()}

    def conv(x, name):
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=1)

    def memory(x, name):
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        h = F.relu(conv(torch.cat([x, before], 1), f"{name}.conv.0"))
        h = F.relu(conv(h, f"{name}.conv.2"))
        return F.relu(conv(h, f"{name}.conv.4") + x)

    x = F.relu(conv(3 * torch.tanh(latents.double().transpose(0, 1) / 3), "1"))
    for first in (3, 9, 15):
        for block in range(first, first + 3):
            x = memory(x, block)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        grown = F.conv2d(x, w[f"{first + 4}.conv.weight"])
        x = grown.reshape(-1, x.shape[1], *x.shape[2:])
        x = conv(x, first + 5)
    return conv(F.relu(x), "22").clamp(0, 1)[3:].transpose(0, 1)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_it_is_the_plain_decoder_piece_by_piece(file, weights, frames):
    decoder = read_decoder(file, torch.device("cpu"), torch.float32)
    latents = torch.randn(2, 16, (frames + 3) // 4, 3, 2)
    pieces = [*decoder.decode_chunks(latents)]
    assert [x.shape[2] for x in pieces] == [1] + [4] * (frames // 4)
    found = torch.cat(pieces, 2)
    assert found.shape == (2, 3, frames, 24, 16) and found.std() > 0.1
    for ours, z in zip(found, latents, strict=True):
        torch.testing.assert_close(ours.double(), plain(weights, z) * 2 - 1, rtol=0, atol=1e-4)


def test_a_pickled_file_and_wider_growth_give_the_same(file, weights, tmp_path):
    """A file may hold growth by two where one frame is asked for; the last are taken."""
    name = "decoder.7.conv.weight"
    torch.save(weights | {name: torch.cat([weights[name] + 1, weights[name]])}, tmp_path / "a.pth")
    latents = torch.randn(1, 16, 2, 2, 2)
    files, place = (file, tmp_path / "a.pth"), (torch.device("cpu"), torch.float32)
    one, two = (torch.cat([*read_decoder(f, *place).decode_chunks(latents)], 2) for f in files)
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"decoder.22.bias": None}, "missing: decoder.22.bias"),
        ({"decoder.23.weight": torch.zeros(1)}, "unexpected: decoder.23.weight"),
        ({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}, r"\[256, 16, 3, 3\].*48"),
        ({"decoder.22.bias": torch.zeros(3, dtype=torch.int64)}, "floats"),
        ({"decoder.7.conv.weight": torch.zeros(384, 256, 1, 1)}, "384"),
    ],
    ids=["missing", "unexpected", "another latent", "no floats", "half a growth"],
)
def test_other_files_are_refused(weights, tmp_path, change, said):
    changed = {k: v for k, v in (weights | change).items() if v is not None}
    save_file(changed, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=said):
        read_decoder(tmp_path / "a.safetensors", torch.device("cpu"), torch.float32)
    with pytest.raises(ModelFileError, match="absent"):
        read_decoder(tmp_path / "absent.pth", torch.device("cpu"), torch.float32)


def test_a_pipeline_decodes_by_it_and_says_so(file, tmp_path):
    """It takes latents in the model's own space, and its file is in the sidecar."""
    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu")
    by_vae = pipe.generate("a red circle", num_inference_steps=1, progress=False)
    pipe.load_decoder(file)
    settings = {"num_inference_steps": 1, "progress": False, "output_path": tmp_path / "a.mp4"}
    assert pipe.generate("a red circle", **settings).frames.shape == by_vae.frames.shape
    said = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert said["decoder"] == "taew2_1.safetensors" and "decoder" not in by_vae.settings

    latents = torch.randn(1, 16, 3, 8, 8)
    normalized = pipe.decoder.decode_chunks
    mean, std = latent_scale(pipe.vae, "normalized")
    own = latents if pipe.config.latent_space == "normalized" else (latents - mean) / std
    expected = torch.cat([*normalized(own)], 2)[0].permute(1, 2, 3, 0)
    found = torch.from_numpy(pipe.decode_video(latents)[0]).float() / 127.5 - 1
    assert (found - expected).abs().max() < 0.02


def test_it_is_a_fraction_of_the_vae():
    """In numbers a seventh, and in FLOPs a nineteenth, of Wan's."""
    with torch.device("meta"):
        tiny, vae = TinyDecoder("taew2_1"), WanVAE(WAN_VAE)
    assert {n: tuple(x.shape) for n, x in tiny.state_dict().items()} == shapes()
    counts = [sum(x.numel() for x in m.parameters()) for m in (tiny, vae.decoder)]
    assert counts == [9_844_611, 73_295_331]

    def flops(model) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            [*model.decode_chunks(torch.empty(1, 16, 3, 4, 4, device="meta"))]
        return counter.get_total_flops()

    assert 18.5 < flops(vae) / flops(tiny) < 19.5
