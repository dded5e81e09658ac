"""The pictures of docs/growth.md, from what `bench.pages.growth_numbers` computes."""

from pathlib import Path

from bench.harness.plots import save
from bench.pages import growth_numbers as page
from bench.pages.cost_numbers import STEPS, rows
from bench.pages.cost_numbers import TEXT as TEXT_ROWS
from bench.pages.cost_pictures import STYLE
from engine.planning.memory import DECODING, DENOISING, TEXT

SIZE_LOOKS = {  # colour, mark
    "480p": ("#0072B2", "o"),
    "720p": ("#009E73", "s"),
    "1080p": ("#E69F00", "D"),
    "4K": ("#CC79A7", "^"),
}
WHOLE_RUNS = {"a minute": 60, "an hour": 3600, "a day": 86400, "a month": 30 * 86400}
STAGES = {  # label: stage, flags, colour, line
    "text encoding": (TEXT, {}, "#999999", "-"),
    "denoising": (DENOISING, {}, "#0072B2", "-"),
    "denoising, offload and fp8": (DENOISING, page.OFFLOAD | page.FP8, "#0072B2", "--"),
    "VAE decoding": (DECODING, {}, "#D55E00", "-"),
    "VAE decoding in tiles": (DECODING, page.TILING, "#D55E00", "--"),
}
SECONDS = [frames / page.FPS for frames in page.LENGTHS]


def _lengths(axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel="video, seconds at 16 frames a second")
    axes.set_xticks(SECONDS, [f"{x:.0f}" for x in SECONDS])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")


def _levels(axes, levels: dict[str, float], label: str | None) -> None:
    """Lines across; their names at the right, where there is a label for them."""
    for value in levels.values():
        axes.axhline(value, color="black", ls=":", lw=1.2)
    if label:
        right = axes.secondary_yaxis("right")
        right.set_yticks(list(levels.values()), list(levels))
        right.set_yticks([], minor=True)
        right.set_ylabel(label)


def time(figure) -> None:
    panels = figure.subplots(1, 2, sharey=True)

    for axes, model in zip(panels, page.MODELS, strict=True):
        for size, (colour, mark) in SIZE_LOOKS.items():
            V = [rows(size, frames) for frames in page.LENGTHS]
            y = [page.cost(model, v).step for v in V]
            fits = page.limit(model, size, 80).frames
            style = {"color": colour, "marker": mark, "ms": 6}
            axes.plot(SECONDS, y, lw=1.5, label=size, **style)
            beyond = [(x, s) for x, s, n in zip(SECONDS, y, page.LENGTHS, strict=True) if n > fits]
            axes.plot(*zip(*beyond, strict=True), ls="none", mfc="white", **style)

        _lengths(axes)
        steps = {name: seconds / STEPS for name, seconds in WHOLE_RUNS.items()}
        _levels(axes, steps, f"{STEPS} steps take" if axes is panels[-1] else None)
        axes.set(title=model, xlim=(4.2, 360))

    panels[0].set(ylabel="one guided step, seconds")
    panels[1].tick_params(labelleft=True)
    figure.suptitle(
        f"A step against the length of the video, {TEXT_ROWS} text rows; predicted, H100, "
        "published rates\nfilled: 80 GB hold it without flags; hollow: they do not"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def memory(figure) -> None:
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    frames = sorted({4 * round(81 * 1.12**i / 4) + 1 for i in range(37)} | set(page.LENGTHS))
    frames = [n for n in frames if n <= page.LENGTHS[-1]]
    gpus = {f"{gigabytes} GB, {gpu}": gigabytes for gpu, gigabytes in page.HOLDS.items()}

    for row, model in zip(panels, page.MODELS, strict=True):
        for axes, size in zip(row, ("480p", "1080p"), strict=True):
            for label, (stage, flags, colour, line) in STAGES.items():
                flags = tuple(flags.items())
                y = [page.peaks(model, size, n, flags)[stage] / 1e9 for n in frames]
                x = [n / page.FPS for n in frames]
                axes.plot(x, y, color=colour, ls=line, lw=1.7, label=label)

            _lengths(axes)
            _levels(axes, gpus, "a GPU has" if axes is row[-1] else None)
            axes.set(title=f"{model}, {size}", ylim=(6, 2500))
            axes.set_yticks([10, 20, 50, 100, 200, 500, 1000, 2000])
            axes.set_yticks([], minor=True)
            axes.label_outer()

        row[0].set(ylabel="held on the GPU, GB")

    figure.suptitle(
        f"Memory by stage, estimated: one GPU, bf16, guided, {TEXT_ROWS} text rows\n"
        "with the weights; without flags where none is named"
    )
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


PICTURES = {time: (9, 5), memory: (9, 7.4)}  # inches


def write(folder: Path) -> list[Path]:
    """Makes folder/growth-*.png; the same bytes every time."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = []
    with matplotlib.rc_context(STYLE):
        for draw, inches in PICTURES.items():
            figure = Figure(figsize=inches, dpi=100, layout="constrained")
            draw(figure)
            paths.append(folder / f"growth-{draw.__name__}.png")
            save(figure, paths[-1])
    return paths
