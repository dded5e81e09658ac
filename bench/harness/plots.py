"""The pictures that belong to a result: bars of times, the roofline of `ops`, the curves of `scale`
and the breakdown of a forward of `infer`. The same bytes for the same result."""

import io
import math
import textwrap
from collections import defaultdict
from pathlib import Path

from bench.harness.models import ENGINE as OURS
from bench.harness.record import duration
from engine.errors import MissingPackage

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullFormatter
    from PIL import Image
except ImportError as error:
    raise MissingPackage(
        f"bench: package matplotlib must be installed; got {error}. "
        "Install the extra `bench`: pip install 'univigu-engine[bench]'."
    ) from error

# Okabe and Ito's colours, which the colour-blind tell apart, and a mark for each.
# The seventh colour is the prediction's.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX<>p*"
ENGINE, OTHERS, PREDICTED, INK = "#0072B2", "#BBBBBB", "#D55E00", "#222222"
MODEL = "predicted by the cost model"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
WIDTH, DPI = 9, 100  # inches, dots per inch: 900 pixels
LONGEST = 1.5  # of the longest time: what intervals may stretch an axis to
GROWS = {  # row["along"]: label of x, its scale, scale of y
    "rows": ("video rows of a sample", "log", "log"),
    "frames": ("video frames", "linear", "linear"),
    "resolution": ("height of the video (pixels)", "linear", "linear"),
    "batch": ("samples in a batch", "log", "log"),
    "text": ("text rows", "symlog", "linear"),
}


def write(table: dict, stem: Path) -> list[Path]:
    """Writes STEM-NAME.png for every picture of a result (schema 2); -> their paths."""
    with matplotlib.rc_context(STYLE):
        found = pictures(table)
        return [
            save(figure, stem.with_name(f"{stem.name}-{name}.png"))
            for name, figure in found.items()
        ]


def pictures(table: dict) -> dict[str, Figure]:
    """By the name that the file gets. Cases of `ops` are many: their bars are a picture for each
    pass and dtype."""
    rows, found = table["rows"], {}
    for along in dict.fromkeys(row["along"] for row in rows if "along" in row):
        found[along] = growth(table, along)
    plain = [row for row in rows if "along" not in row]
    for kind in dict.fromkeys((row["pass"], row["dtype"]) for row in plain if "pass" in row):
        found[f"times-{kind[0]}-{short(kind[1])}"] = times(table, kind)
    if any("pass" not in row for row in plain):
        found["times"] = times(table)
    if any(row.get("pass") == "forward" and placed(row) for row in plain):
        found["roofline"] = roofline(table)
    if table.get("breakdown"):
        found["breakdown"] = breakdown(table)
    return found


def save(figure: Figure, path: Path) -> Path:
    """In 256 colours, half of the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, metadata={"Software": None})
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    return path


def figure_of(height: float, table: dict, what: str) -> Figure:
    """An empty one under a title: what it shows, on which device, at which commit."""
    environment = table["environment"]
    changed = " with changes" if environment.get("changed") else ""
    where = f"{environment['device']}, commit {environment['commit']}{changed}"
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{what}\n{where}", x=0.01, ha="left", fontsize=11)
    return figure


def short(dtype: str) -> str:
    return dtype.replace("bfloat16", "bf16").replace("float16", "fp16").replace("float32", "fp32")


def is_ours(row: dict) -> bool:
    return row["implementation"].split(",")[0] == OURS


def unit_of(seconds: float) -> tuple[str, float]:
    return next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))


def interval(row: dict, unit: float) -> list[list[float]]:
    """Lengths below and above, as errorbar takes them."""
    low, high = (row["seconds"] if row[key] is None else row[key] for key in ("low", "high"))
    return [[(row["seconds"] - low) / unit], [(high - row["seconds"]) / unit]]


def times(table: dict, kind: tuple[str, str] | None = None) -> Figure:
    """A panel for each case and dtype, a bar for each implementation. kind: pass and dtype."""
    panels: dict[tuple, list[dict]] = defaultdict(list)
    for row in table["rows"]:
        if "along" not in row and (kind is None or (row.get("pass"), row["dtype"]) == kind):
            panels[row["case"], row["dtype"]].append(row)
    lines = [sum(1 + label(row).count("\n") / 2 for row in rows) for rows in panels.values()]
    what = f"univigu bench {table['bench']}" + (f", {kind[0]}" if kind else "")
    what += ": time of a call, and speed against the first"
    figure = figure_of(1.1 + sum(0.68 + 0.24 * count for count in lines), table, what)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[0.4 + n for n in lines])
    for ((case, dtype), rows), panel in zip(panels.items(), axes.flat, strict=True):
        bars(panel, rows)
        panel.set_title(f"{case}, {short(dtype)}", loc="left", weight="bold")
    everything = [row for rows in panels.values() for row in rows]
    figure.legend(handles=bar_legend(everything), loc="outside lower left", ncols=4)
    return figure


def label(row: dict) -> str:
    return textwrap.fill(row["implementation"], 26)


def bars(axes, rows: list[dict]) -> None:
    """Time and speed-up are written right of the bar and of what is marked there, of an interval
    that is wider than LONGEST allows over it."""
    name, unit = unit_of(max(row["seconds"] for row in rows))
    longest = LONGEST * max(max(row["seconds"], row["predicted"] or 0) for row in rows) / unit

    ends = []
    for at, row in enumerate(rows):
        value, predicted = row["seconds"] / unit, (row["predicted"] or 0) / unit
        axes.barh(at, value, 0.72, color=ENGINE if is_ours(row) else OTHERS)
        if row["low"] is not None:
            error = interval(row, unit)
            axes.errorbar(value, at, xerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
        if predicted:
            axes.vlines(predicted, at - 0.42, at + 0.42, color=PREDICTED, linewidth=2.5)
        ends.append(min(longest, max(value, predicted, (row["high"] or 0) / unit)))

    for at, (row, end) in enumerate(zip(rows, ends, strict=True)):
        text = f"{duration(row['seconds'])}, {row['speedup']:.2f}x"
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(text, (end, at), bbox={"fc": "white", "ec": "none", "pad": 1}, **place)

    axes.set_xlim(0, max(ends) * 1.28)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"time ({name})", fontsize=8, labelpad=1)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def bar_legend(rows: list[dict]) -> list:
    handles = []
    if any(map(is_ours, rows)):
        handles.append(Patch(color=ENGINE, label="this engine"))
    if not all(map(is_ours, rows)):
        handles.append(Patch(color=OTHERS, label="others"))
    if any(row["predicted"] for row in rows):
        tick = {"marker": "|", "markersize": 11, "markeredgewidth": 2.5, "linestyle": "none"}
        handles.append(Line2D([], [], color=PREDICTED, label=MODEL, **tick))
    if any(row["low"] is not None for row in rows):
        handles.append(Line2D([], [], color=INK, marker="|", lw=1, label="95% of other runs"))
    return handles


def growth(table: dict, along: str) -> Figure:
    """Time, and memory where it was taken, over what grows."""
    rows = [row for row in table["rows"] if row.get("along") == along]
    series: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (not is_ours(row), row["x"])):
        series[row["implementation"]].append(row)

    named, x_scale, y_scale = GROWS[along]
    memory = any(row.get("peak_bytes") for row in rows)
    dtypes = ", ".join(short(dtype) for dtype in dict.fromkeys(row["dtype"] for row in rows))

    height = 4.4 + 0.25 * (len(series) // 3) + (2.8 if memory else 0)
    figure = figure_of(height, table, f"One forward in {dtypes}, over {named}")
    panels = figure.subplots(2 if memory else 1, 1, sharex=True, squeeze=False).flat

    name, unit = unit_of(max(row["seconds"] for row in rows))
    time_curves(panels[0], series, unit)
    panels[0].set_ylabel(f"time of one forward ({name})")
    if memory:
        memory_curves(panels[1], series)
        panels[1].set_ylabel("peak memory (GiB)")

    most = LONGEST * max(max(row["seconds"], row["predicted"] or 0) for row in rows) / unit
    for panel, limit in zip(panels, (most, math.inf), strict=False):
        scale(panel, sorted({row["x"] for row in rows}), x_scale, y_scale, limit)

    panels[-1].set_xlabel(named)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def time_curves(axes, series: dict[str, list[dict]], unit: float) -> None:
    predicted: dict[float, float] = {}
    for (name, rows), colour, mark in zip(series.items(), *looks(len(series)), strict=True):
        x, y = [row["x"] for row in rows], [row["seconds"] / unit for row in rows]
        style = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1, "label": name}
        if any(row["low"] is not None for row in rows):
            pairs = [interval(row, unit) for row in rows]
            error = [[pair[side][0] for pair in pairs] for side in (0, 1)]
            axes.errorbar(x, y, yerr=error, capsize=3, **style)
        else:
            axes.plot(x, y, **style)
        predicted |= {row["x"]: row["predicted"] / unit for row in rows if row["predicted"]}
    if predicted:
        x, y = zip(*sorted(predicted.items()), strict=True)
        single = {"marker": "_", "markersize": 14} if len(x) == 1 else {}
        axes.plot(x, y, color=PREDICTED, linestyle="--", linewidth=1.3, label=MODEL, **single)


def memory_curves(axes, series: dict[str, list[dict]]) -> None:
    for (name, rows), colour, mark in zip(series.items(), *looks(len(series)), strict=True):
        points = [(row["x"], row["peak_bytes"] / 2**30) for row in rows if row.get("peak_bytes")]
        if points:
            style = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1}
            axes.plot(*zip(*points, strict=True), label=name, **style)


def looks(count: int) -> tuple[list[str], list[str]]:
    """A colour and a mark for each; no pair comes twice among the first 66."""
    return tuple([kinds[i % len(kinds)] for i in range(count)] for kinds in (COLOURS, MARKS))


def scale(axes, xs: list[float], x_scale: str, y_scale: str, limit: float) -> None:
    """x has a tick where something was measured, y plain numbers; limit: of a linear y."""
    axes.set_xscale(x_scale, **({"linthresh": 16} if x_scale == "symlog" else {}))
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.set_xticks([], minor=True)
    if y_scale == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        steps = (1, 2, 5) if high < 300 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, min(limit, 1.08 * axes.get_ylim()[1]))
    axes.grid(alpha=0.25)


def placed(row: dict) -> bool:
    """Whether a roofline has a place for it."""
    return bool(row.get("flops") and row.get("bytes"))


def roofline(table: dict) -> Figure:
    """A panel for each dtype: the roof, and each op as our best implementation and as what it is
    compared with, plain PyTorch."""
    rows = [row for row in table["rows"] if row.get("pass") == "forward" and placed(row)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    what = f"univigu bench {table['bench']}: forward passes under the measured roof"
    figure = figure_of(0.9 + 4.8 * len(dtypes), table, what)
    panels = figure.subplots(len(dtypes), 1, squeeze=False).flat

    ops = list(dict.fromkeys(row["case"] for row in rows))
    style = dict(zip(ops, zip(*looks(len(ops)), strict=True), strict=True))

    slopes = []
    for dtype, axes in zip(dtypes, panels, strict=True):
        roof = table["ceilings"][dtype]
        unit = ("TFLOP/s", 1e12) if roof["flops"] >= 1e13 else ("GFLOP/s", 1e9)
        points(axes, [row for row in rows if row["dtype"] == dtype], style, roof, unit[1])
        slopes.append(draw_roof(axes, roof, *unit))
        axes.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel=f"rate ({unit[0]})")
        axes.set_title(f"{short(dtype)} operations", loc="left", weight="bold")
        axes.grid(alpha=0.25)
        title = "operation: share of its roof"
        axes.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5), alignment="left")

    dot = {"color": INK, "marker": "o", "linestyle": "none"}
    kinds = [
        Line2D([], [], label="this engine, its fastest", **dot),
        Line2D([], [], label="plain PyTorch", markerfacecolor="white", **dot),
        Line2D([], [], label="measured ceilings", color=INK, linewidth=1.8),
    ]
    figure.legend(handles=kinds, loc="outside lower left", ncols=3)

    figure.draw_without_rendering()  # the axes get their places, and lines their angles
    for text, line in slopes:
        (x, y), (ridge, top), _ = text.axes.transData.transform(line.get_xydata())
        text.set_rotation(math.degrees(math.atan2(top - y, ridge - x)))
    return figure


def points(axes, rows: list[dict], style: dict, roof: dict, unit: float) -> None:
    """An op's two points, with a line between them."""
    for op in dict.fromkeys(row["case"] for row in rows):
        colour, mark = style[op]
        mine = [row for row in rows if row["case"] == op]
        plain = [row for row in mine if row["implementation"] == row["against"]]
        ours = [row for row in mine if is_ours(row) and row not in plain]
        shown = plain + sorted(ours, key=lambda row: row["seconds"])[:1]
        at = [(row["flops"] / row["bytes"], row["flops"] / row["seconds"] / unit) for row in shown]
        axes.plot(*zip(*at, strict=True), color=colour, linewidth=0.8, alpha=0.6)
        best = shown[-1]
        floor = max(best["flops"] / roof["flops"], best["bytes"] / roof["bytes"])
        label = f"{op}: {floor / best['seconds']:.0%}"
        for row, place in zip(shown, at, strict=True):
            face, size = ("white", 7) if row in plain else (colour, 8)
            look = {"color": colour, "markerfacecolor": face, "markersize": size}
            named = {"label": label} if row is best else {}
            axes.plot(*place, marker=mark, linestyle="none", **look, **named)


def draw_roof(axes, roof: dict, name: str, unit: float) -> tuple:
    """Memory's slope and the plateau of a large product, over the points and the ridge; -> what is
    to be written along the slope, and the line."""
    axes.set(xscale="log", yscale="log")
    ridge, top, slope = roof["flops"] / roof["bytes"], roof["flops"] / unit, roof["bytes"] / unit
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    left, right = min(left / 1.5, ridge / 30), max(right * 1.5, ridge * 8)
    low, high = min(low / 1.5, top / 100), max(high * 1.3, top * 2.2)
    corners = [left, ridge, right], [left * slope, top, top]
    (line,) = axes.plot(*corners, color=INK, linewidth=1.8, zorder=1)
    axes.set(xlim=(left, right), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    text = {"weight": "bold", "color": INK, "va": "bottom", "rotation_mode": "anchor"}
    scale, size = ("TB/s", 1e12) if roof["bytes"] >= 1e12 else ("GB/s", 1e9)
    middle = math.sqrt(max(left, low / slope) * ridge)
    said = f"copy {roof['bytes'] / size:.3g} {scale}"
    along = axes.text(middle, 1.08 * middle * slope, said, ha="center", **text)
    said = f"GEMM {top:,.0f} {name} " if top >= 100 else f"GEMM {top:.3g} {name} "
    axes.text(right, 1.04 * top, said, ha="right", **text)
    return along, line


def breakdown(table: dict) -> Figure:
    """Shares of one forward by operation, measured and predicted."""
    rows = sorted(table["breakdown"], key=lambda row: (row["calls"] is None, -row["seconds"]))
    keys = {"seconds": ("measured", ENGINE), "predicted": (MODEL, PREDICTED)}
    totals = {key: sum(row[key] for row in rows) for key in keys}

    dtype = f" in {short(rows[0]['dtype'])}" if rows[0].get("dtype") else ""
    what = f"One forward of the engine{dtype}: share of each operation x its calls"
    figure = figure_of(1.6 + 0.52 * len(rows), table, what)
    axes = figure.subplots()

    for side, (key, (name, colour)) in enumerate(keys.items()):
        total = totals[key] or 1
        shares = [100 * row[key] / total for row in rows]
        at = [i - 0.2 + 0.4 * side for i in range(len(rows))]
        named = f"{name}: {duration(totals[key])} in all"
        axes.barh(at, shares, 0.38, color=colour, label=named)
        for y, share, row in zip(at, shares, rows, strict=True):
            text = f"{share:.1f}%, {duration(row[key])}"
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (share, y), fontsize=8, **place)

    names = [row["op"] + (f" x {row['calls']}" if row["calls"] else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.set_xlabel("share of the forward (%)")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right")
    return figure
