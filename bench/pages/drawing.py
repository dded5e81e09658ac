"""The drawing of docs/joint-block.md: one block, the operation that does each part, the dtype on
each arrow and the backends that the registry has for it."""

import textwrap
from pathlib import Path
from typing import NamedTuple

from univigu_kernels import OPS

VIDEO, TEXT, SHARED, INK, STREAM = "#0072B2", "#E69F00", "#999999", "#222222", "#009E73"
LEFT, RIGHT, RESIDUAL, BACKENDS = 30, 78, 14, 80  # columns, in hundredths of the width
HEIGHT, STEP = 5.2, 8.2  # of a box; from one to the next
FITS = 31  # characters right of BACKENDS


class Stage(NamedTuple):
    """op: a name of the registry. gives: what leaves it, on the arrow down. modulated: what of the
    times' modulation it reads. joins: it reads and writes the residual stream. takes: what comes in
    from the side."""

    op: str
    does: str
    gives: str
    by_modality: bool = False
    modulated: str = ""
    joins: bool = False
    takes: str = ""


OPENS = Stage(
    "adaln",
    "h = LN(x) * (1 + scale) + shift; before the first block alone",
    "h  bf16",
    by_modality=True,
    modulated="scale, shift",
    joins=True,
)
BLOCK = (
    Stage("linear", "to_qkv: one product for q, k and v", "q, k, v  bf16"),
    Stage(
        "qknorm_rope",
        "RMSNorm of q and k; rotation in 3D for video, 1D for text",
        "q, k, v  bf16",
        by_modality=True,
        takes="rotary\ntables, fp32",
    ),
    Stage(
        "joint_attention",
        "all rows to all rows; no padded text key is read",
        "heads  bf16",
        takes="text\nlengths",
    ),
    Stage("linear", "to_out", "y  bf16"),
    Stage(
        "residual_adaln",
        "x += gate * y; h = LN(x) * weight + bias",
        "h  bf16",
        by_modality=True,
        modulated="gate",
        joins=True,
    ),
    Stage("linear", "to_q", "q  bf16"),
    Stage("rms_norm", "RMSNorm of q", "q  bf16"),
    Stage(
        "cross_attention",
        "all rows to the prompt's rows",
        "heads  bf16",
        takes="prompt's K, V\nbf16, made once",
    ),
    Stage("linear", "to_out", "y  bf16"),
    Stage(
        "residual_adaln",
        "x += y; h = LN(x) * (1 + scale) + shift",
        "h  bf16",
        by_modality=True,
        modulated="scale, shift",
        joins=True,
    ),
    Stage(
        "routed_ffn",
        "two experts: ffn for video rows, ffn_t for text rows",
        "y  bf16",
        by_modality=True,
    ),
    Stage(
        "residual_adaln",
        "x += gate * y; h = LN(x) for the next block, or for the heads",
        "h  bf16",
        by_modality=True,
        modulated="gate, scale, shift",
        joins=True,
    ),
)


def _bar(axes, left: float, top: float, width: float, height: float) -> None:
    """Packed rows: video, then text."""
    from matplotlib.patches import Rectangle

    split = 0.78 * width
    for start, size, colour in ((left, split, VIDEO), (left + split, width - split, TEXT)):
        axes.add_patch(Rectangle((start, top), size, height, fc=colour, ec="white", lw=1))


def _arrow(axes, begin, end, **style) -> None:
    given = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, begin, arrowprops=given | style)


def _rows(axes) -> None:
    """Title, what comes in, and the head of the last column."""
    title = "One block of the joint transformer, in bfloat16"
    axes.text(4, 2, title, va="center", fontsize=12, weight="bold")
    _bar(axes, RESIDUAL - 10, 4.5, RIGHT - RESIDUAL + 10, 3.6)
    axes.text(33, 6.3, "V video rows", color="white", ha="center", va="center", fontsize=10)
    axes.text(70, 6.3, "T text rows", color=INK, ha="center", va="center", fontsize=10)
    said = "x [B, V + T, D], fp32:\nthe residual stream"
    axes.text(BACKENDS, 6.3, said, va="center", fontsize=9)
    axes.text(BACKENDS, 10.2, "backends", va="center", fontsize=9, weight="bold")


def _box(axes, stage: Stage, top: float) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    style = {"fc": "#EEEEEE" if stage.joins else "white", "ec": INK, "lw": 1.1}
    style["ls"] = "--" if stage is OPENS else "-"
    corners = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((LEFT, top), RIGHT - LEFT, HEIGHT, boxstyle=corners, **style))
    colours = (VIDEO, TEXT) if stage.by_modality else (SHARED, SHARED)
    for start, colour in zip((top + 0.5, top + HEIGHT / 2), colours, strict=True):
        size = HEIGHT / 2 - 0.5
        axes.add_patch(Rectangle((LEFT + 0.8, start), 1.2, size, fc=colour, ec="none"))
    name = {"family": "monospace", "weight": "bold", "fontsize": 10}
    axes.text(LEFT + 3, top + 1.7, stage.op, va="center", **name)
    axes.text(LEFT + 3, top + 3.7, stage.does, va="center", fontsize=8.5)
    if stage.modulated:
        tag = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": SHARED, "lw": 0.8}
        place = {"ha": "right", "va": "center", "fontsize": 8, "bbox": tag}
        axes.text(RIGHT - 1.2, top + 1.6, stage.modulated, **place)


def _stage(axes, stage: Stage, top: float) -> None:
    """A box, what goes in at its left, what comes out below, and its backends at the right."""
    middle, centre = top + HEIGHT / 2, (LEFT + RIGHT) / 2
    _box(axes, stage, top)
    backends = [backend.name for backend in OPS[stage.op].backends]
    said = textwrap.fill(", ".join(backends), FITS)
    axes.text(BACKENDS, middle, said, va="center", fontsize=8.5)
    _arrow(axes, (centre, top + HEIGHT), (centre, top + STEP))
    axes.text(centre + 1, top + (HEIGHT + STEP) / 2, stage.gives, va="center", fontsize=8)
    label = {"ha": "center", "fontsize": 8}
    if stage.joins:
        both = "-|>" if stage is OPENS else "<|-|>"
        _arrow(axes, (RESIDUAL, middle), (LEFT, middle), arrowstyle=both, color=STREAM, lw=1.6)
        axes.text((RESIDUAL + LEFT) / 2, middle - 0.5, "x  fp32", va="bottom", **label)
    if stage.takes:
        axes.text(LEFT - 8, middle, stage.takes, va="center", **label)
        _arrow(axes, (LEFT - 2.6, middle), (LEFT, middle))


def _legend(axes, top: float) -> None:
    from matplotlib.patches import Rectangle

    said = (
        ((VIDEO, TEXT), "each modality has its own weights, modulation or rotation"),
        ((SHARED, SHARED), "video and text rows share the weights"),
    )
    for colours, text in said:
        for start, colour in zip((top, top + 0.9), colours, strict=True):
            axes.add_patch(Rectangle((4, start), 1.2, 0.9, fc=colour, ec="none"))
        axes.text(6.4, top + 0.9, text, va="center", fontsize=8.5)
        top += 2.6
    tag = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": SHARED, "lw": 0.8}
    axes.text(55, top - 4.3, "gate", va="center", fontsize=8, bbox=tag)
    said = "made from t_video and t_text for all steps at once, fp32"
    axes.text(60, top - 4.3, said, va="center", fontsize=8.5)
    said = "with fp8, fp8_ffn takes the place of routed_ffn"
    axes.text(60, top - 1.7, said, va="center", fontsize=8.5)


def draw(axes) -> None:
    _rows(axes)
    top = 12
    for stage in (OPENS, *BLOCK):
        _stage(axes, stage, top)
        top += STEP
    _arrow(axes, (RESIDUAL, 8.3), (RESIDUAL, top), color=STREAM, lw=2.4)
    _legend(axes, top + 2)


def write(folder: Path) -> Path:
    """Makes joint-block.png in `folder`, in 64 colours, and returns its path; the same bytes every
    time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9, 11.6), dpi=100)
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set(xlim=(0, 100), ylim=(126, 0))
        axes.axis("off")
        draw(axes)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    path = folder / "joint-block.png"
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
