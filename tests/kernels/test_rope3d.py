"""rope3d against complex numbers of an independent formula, and its tables."""

import math

import torch

from univigu_kernels import OPS, rotary_tables

rope3d = OPS["rope3d"].reference


def complex_rope(x_BLHK, grid, text_rows):
    """Row by row and pair by pair, with Python's own complex exponential."""
    x = x_BLHK.double()
    head_dim, out = x.shape[-1], torch.empty_like(x)
    side = 2 * (head_dim // 6)
    channels = (head_dim - 2 * side, side, side)
    frames, height, width = grid

    for row in range(frames * height * width):
        position = (row // (height * width), row // width % height, row % width)
        first = 0
        for p, d in zip(position, channels, strict=True):
            for i in range(d // 2):
                angle = p * 10000 ** (-2 * i / d)
                a, b = first + 2 * i, first + 2 * i + 1
                turned = torch.complex(x[:, row, :, a], x[:, row, :, b]) * complex(
                    math.cos(angle), math.sin(angle)
                )
                out[:, row, :, a], out[:, row, :, b] = turned.real, turned.imag
            first += d

    for t in range(text_rows):
        row, half = frames * height * width + t, head_dim // 2
        for i in range(half):
            angle = t * 10000 ** (-2 * i / head_dim)
            turned = torch.complex(x[:, row, :, i], x[:, row, :, i + half]) * complex(
                math.cos(angle), math.sin(angle)
            )
            out[:, row, :, i], out[:, row, :, i + half] = turned.real, turned.imag
    return out


def test_against_complex_numbers():
    for grid, text_rows, head_dim in (((2, 3, 4), 5, 16), ((3, 1, 2), 7, 128)):
        rows = math.prod(grid) + text_rows
        x = torch.randn(2, rows, 2, head_dim, dtype=torch.float64)
        rotary = rotary_tables(grid, text_rows, head_dim, "cpu", torch.float64)
        torch.testing.assert_close(
            rope3d(x, rotary), complex_rope(x, grid, text_rows), rtol=0, atol=1e-13
        )


def test_axis_widths_at_head_dim_128():
    rotary = rotary_tables((21, 30, 52), 256, 128, "cpu")
    assert [tuple(table.shape) for table in rotary[1:]] == [
        (21, 22, 2),
        (30, 21, 2),
        (52, 21, 2),
        (256, 64, 2),
    ]


def test_tables_are_rounded_once():
    exact = rotary_tables((21, 30, 52), 1024, 128, "cpu", torch.float64)
    single = rotary_tables((21, 30, 52), 1024, 128, "cpu")
    for a, b in zip(exact[1:], single[1:], strict=True):
        assert torch.equal(a.float(), b)


def test_video_or_text_alone():
    x = torch.randn(1, 29, 2, 16)
    both = rope3d(x, rotary_tables((2, 3, 4), 5, 16, "cpu"))
    video = rope3d(x[:, :24], rotary_tables((2, 3, 4), 0, 16, "cpu"))
    text = rope3d(x[:, 24:], rotary_tables((0, 0, 0), 5, 16, "cpu"))
    assert torch.equal(torch.cat([video, text], 1), both)


def test_scores_depend_on_relative_positions_within_a_modality():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    rotary = rotary_tables((4, 4, 4), 8, 16, "cpu", torch.float64)
    q, k = (rope3d(x.expand(1, 72, 1, 16), rotary)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[21, 16], scores[47, 42])  # one step in h and one in w
    torch.testing.assert_close(scores[64, 66], scores[69, 71])
    assert not torch.allclose(scores[0, 64], scores[1, 65])  # across modalities they do not
