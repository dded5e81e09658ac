"""The pictures of docs/cost.md, from what `bench.pages.cost_numbers` computes."""

from pathlib import Path

from bench.pages import cost_numbers as page

STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"axes.axisbelow": True, "legend.framealpha": 1.0}
SETTING = f"1.3B, {page.STEPS} guided steps"
PARTS = ("weights", "kept video K and V", "activations of a block")
REST = "prompt K and V, modulations, latents"
PART_COLOURS = dict(zip((*PARTS, REST), ("#999999", "#009E73", "#56B4E9", "#E69F00"), strict=True))
GROUPS = {  # of a step: colour, and what they are together
    "joint attention": ("#0072B2", "joint attention"),
    "feed-forward experts": ("#E69F00", "feed-forward experts"),
    "projections": ("#009E73", "projections"),
    "cross-attention": ("#56B4E9", "cross-attention"),
    "row operations, embedding, heads": ("#999999", page.OTHER, page.HEAD),
}
DARK = ("#0072B2", "#009E73")
SHORT = {
    page.JOINT: "joint",
    page.AGAIN: "recom-\nputed",
    page.ONCE: "kept",
    page.PROMPT: "prompt\nonly",
}


def _shares(axes, x: list[float], points: list[tuple[int, int]], figure: str = "seconds") -> None:
    """What the text adds; points: (V, T) of each x."""
    for way in page.WAYS[1:]:
        y = [100 * page.over_video(way, *point, figure) for point in points]
        axes.plot(x, y, color=page.COLOURS[way], marker=page.MARKS[way], label=way, ms=5)
    axes.set(yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _ticks(axes, x: list[float], names: list[str], label: str) -> None:
    axes.set(xscale="log", xlabel=label)
    axes.set_xticks(x, names)
    axes.set_xticks([], minor=True)


def text(figure) -> None:
    V = page.rows("480p")
    left, right = figure.subplots(1, 2, sharey=True)
    points = [(V, T) for T in page.TEXTS]
    for axes, what in ((left, "flops"), (right, "seconds")):
        _shares(axes, page.TEXTS, points, what)
        _ticks(axes, page.TEXTS, list(map(str, page.TEXTS)), "text rows")
    left.set(title="FLOPs", ylabel="added to the video alone, %")
    right.set(title="time, H100, published rates")
    right.tick_params(labelleft=True)
    figure.suptitle(
        f"What text adds, predicted: {SETTING}, 480p, {page.FRAMES} frames ({V:,} video rows)"
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def size(figure) -> None:
    (a, b), (c, d) = figure.subplots(2, 2, sharey="row", sharex="col")

    by_size = [page.rows(name) for name in page.SIZES]
    by_clip = [page.rows("480p", clip) for clip in page.CLIPS]
    along = [
        (a, c, by_size, list(page.SIZES), f"resolution at {page.FRAMES} frames"),
        (b, d, by_clip, list(map(str, page.CLIPS)), "frames at 480p"),
    ]

    for above, below, x, names, label in along:
        for way in (page.JOINT, page.AGAIN):
            y = [page.cost(way, V).seconds / 60 for V in x]
            style = {"color": page.COLOURS[way], "marker": page.MARKS[way], "ms": 5}
            above.plot(x, y, label=way, **style)

        floor = [page.cost(page.JOINT, V).floor / 60 for V in x]
        above.plot(x, floor, color=page.COLOURS[page.JOINT], ls=":", label="joint, roofline")
        above.set(yscale="log")
        said = "the ways not drawn lie\non the line of joint"
        above.text(0.03, 0.96, said, va="top", fontsize=9, transform=above.transAxes)
        above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

        _shares(below, x, [(V, page.TEXT) for V in x])
        _ticks(below, x, names, label)

    a.set(ylabel="whole run, minutes")
    c.set(ylabel="added to the video alone, % of time")
    figure.suptitle(f"{SETTING}, {page.TEXT} text rows; {page.PREDICTED}")

    handles, labels = a.get_legend_handles_labels()
    more = [line for line in c.get_lines() if line.get_label() not in labels]
    handles += more
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)


def step(figure) -> None:
    """Where the time of a joint run goes."""
    axes = figure.subplots()
    bars = [(size, page.FRAMES) for size in page.SIZES]
    bars = [("480p", page.CLIPS[0]), *bars]
    names = [f"{size}, {frames} frames" for size, frames in bars]
    found = [page.by_group(page.JOINT, page.rows(*bar), page.TEXT) for bar in bars]

    left = [0.0] * len(bars)
    for label, (colour, *groups) in GROUPS.items():
        width = [100 * sum(f[g] for g in groups) / sum(f.values()) for f in found]
        axes.barh(names, width, left=left, color=colour, label=label, edgecolor="white", lw=0.5)

        for y, (start, share) in enumerate(zip(left, width, strict=True)):
            if share >= 4:
                place = {"ha": "center", "va": "center", "fontsize": 9}
                axes.text(
                    start + share / 2,
                    y,
                    f"{share:.0f}%",
                    color="white" if colour in DARK else "black",
                    **place,
                )
        left = [a + b for a, b in zip(left, width, strict=True)]

    seconds = [sum(f.values()) / page.STEPS for f in found]
    for y, value in enumerate(seconds):
        axes.text(101, y, f"{value:.3g} s", va="center")

    axes.set(xlim=(0, 112), xticks=range(0, 101, 20), xlabel="share of a step's time, %")
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.set_title(f"One guided joint step, 1.3B, {page.TEXT} text rows; {page.PREDICTED}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def memory(figure) -> None:
    panels = figure.subplots(1, len(page.SIZES))
    ways = page.WAYS[1:]

    for axes, size in zip(panels, page.SIZES, strict=True):
        found = [page.held(way, size) for way in ways]
        bottom = [0.0] * len(ways)
        for part in (*PARTS, REST):
            height = [f[part] / 1e9 for f in found]
            style = {"color": PART_COLOURS[part], "label": part, "edgecolor": "white", "lw": 0.5}
            axes.bar([SHORT[way] for way in ways], height, bottom=bottom, **style)
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]

        for x, total in enumerate(bottom):
            axes.text(x, total, f"{total:.1f}", ha="center", va="bottom", fontsize=9)

        axes.set(title=size, ylim=(0, 1.1 * max(bottom)))
        if max(bottom) > 80:
            axes.axhline(80, color="black", ls="--", lw=1)
            axes.text(-0.45, 82, "an H100 has 80", va="bottom", fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", labelsize=8)

    panels[0].set(ylabel="GB")
    figure.suptitle(
        f"Memory of the stage that holds most, predicted: 1.3B in bf16, {page.FRAMES} frames, "
        f"{page.TEXT} text rows"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


PICTURES = {text: (9, 4.4), size: (9, 7.4), step: (9, 4), memory: (9, 4)}  # inches


def write(folder: Path) -> None:
    """Makes folder/cost-*.png; the same bytes every time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        for draw, inches in PICTURES.items():
            figure = Figure(figsize=inches, dpi=100, layout="constrained")
            draw(figure)
            path = folder / f"cost-{draw.__name__}.png"
            figure.savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})
