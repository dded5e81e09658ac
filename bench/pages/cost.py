"""docs/cost.md: its tables, and with `write` its pictures. Every run writes the same bytes."""

import textwrap
from pathlib import Path

from bench.pages import cost_pictures
from bench.pages.cost_numbers import (
    AGAIN,
    CLIPS,
    FRAMES,
    JOINT,
    ONCE,
    PROMPT,
    SIZES,
    STEPS,
    TEXT,
    TEXTS,
    VIDEO,
    WAYS,
    Cost,
    by_group,
    cost,
    crossing,
    held,
    over_video,
    rows,
    time,
)
from bench.pages.tables import fill, table
from bench.roofline import H200


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def percent(share: float) -> str:
    if share < 5e-5:
        return "under +0.01%"
    return f"+{100 * share:.2f}%" if share < 0.1 else f"+{100 * share:.1f}%"


def answer() -> str:
    V = rows("480p")
    video, joint = cost(VIDEO, V), cost(JOINT, V)
    time = {way: percent(over_video(way, V, TEXT)).lstrip("+") for way in WAYS}
    gigabytes = {way: sum(held(way, "480p").values()) / 1e9 for way in WAYS}
    lines = (
        f"All of it is predicted. 480p, {FRAMES} frames, {TEXT} text rows and {STEPS} guided steps "
        f"take {joint.flops / 1e15:.1f} PFLOP jointly and {joint.seconds:.1f} s on an H100 "
        f"({joint.floor:.1f} s at the roofline). The video alone takes {video.flops / 1e15:.1f} "
        f"PFLOP and {video.seconds:.1f} s, so the text adds {time[JOINT]} of time.",
        f"A second diffusion that writes the text afterwards adds {time[AGAIN]} where it computes "
        f"the video's rows in every step, {time[ONCE]} where it computes them once and keeps their "
        f"keys and values, and {time[PROMPT]} where it never sees the video.",
        f"Joint is cheaper than the one that keeps the video up to about {crossing(V, 'seconds')} "
        f"text rows at 480p and {crossing(rows('4K'), 'seconds')} at 4K, and dearer beyond. It "
        f"holds {gigabytes[JOINT]:.1f} GB; two networks hold {gigabytes[AGAIN]:.1f} GB, or "
        f"{gigabytes[ONCE]:.1f} GB with the video kept.",
    )
    return "\n\n".join(textwrap.fill(line, 118) for line in lines)


def ways_table() -> str:
    V, lines = rows("480p"), []
    for way in WAYS:
        found, more = cost(way, V), [percent(over_video(way, V, TEXT, f)) for f in Cost._fields]
        more = [f" ({share})" if way != VIDEO else "" for share in more]
        times = found.floor, found.seconds
        cells = [f"{found.flops / 1e15:.2f}{more[0]}", *map("{:.1f}{}".format, times, more[1:])]
        lines.append([way, *cells, f"{time(way, V, TEXT, H200):.1f}"])
    h100 = ["s, H100, roofline", "s, H100, published rates"]
    return table(["way", "PFLOP", *h100, "s, H200, published rates"], lines)


def texts_table(figure: str) -> str:
    V = rows("480p")
    lines = [
        [way, *(percent(over_video(way, V, T, figure)) for T in TEXTS)]
        for way in WAYS
        if way != VIDEO
    ]
    return table(["text rows", *map(str, TEXTS)], lines)


def sizes_table(sizes: list[tuple[str, int]]) -> str:
    """sizes: (name, video rows)."""
    lines = []
    for name, V in sizes:
        cells = [name, f"{V:,}", duration(cost(VIDEO, V).floor), duration(cost(VIDEO, V).seconds)]
        lines.append(cells + [percent(over_video(way, V, TEXT)) for way in WAYS[1:]])
    head = ["", "video rows", "video alone, roofline", "video alone, published rates"]
    return table([*head, *WAYS[1:]], lines)


def crossings_table() -> str:
    cases = [(size, FRAMES) for size in SIZES] + [
        ("480p", clip) for clip in CLIPS if clip != FRAMES
    ]
    lines = []
    for size, frames in cases:
        V = rows(size, frames)
        found = [str(crossing(V, figure)) for figure in ("flops", "floor", "seconds")]
        lines.append([f"{size}, {frames} frames", f"{V:,}", *found, f"{V / 3 / STEPS:.0f}"])
    head = ["", "video rows", "by FLOPs", "by time, roofline", "by time, published rates"]
    return table([*head, "V / 3N"], lines)


def terms_table() -> str:
    V, lines = rows("480p"), []
    cases = [(way, T) for T in (TEXT, TEXTS[-1]) for way in (JOINT, ONCE)]
    video = by_group(VIDEO, V, 0)
    found = [by_group(way, V, T) for way, T in cases]
    for group in video:
        lines.append([group, *(f"{f[group] - video[group]:.2f}" for f in found)])
    lines.append(["in all", *(f"{sum(f.values()) - sum(video.values()):.2f}" for f in found)])
    return table(["seconds", *(f"{way}, T = {T}" for way, T in cases)], lines)


def memory_table() -> str:
    lines = [
        [way, f"{held(way, '480p')['weights'] / 1e9:.1f}"]
        + [f"{sum(held(way, size).values()) / 1e9:.1f}" for size in SIZES]
        for way in WAYS
    ]
    return table(["GB", "weights", *(f"all, {size}" for size in SIZES)], lines)


def tables() -> dict[str, str]:
    """What docs/cost.md has between its markers, by name."""
    return {
        "answer": answer(),
        "ways": ways_table(),
        "text, FLOPs": texts_table("flops"),
        "text, time": texts_table("seconds"),
        "resolution": sizes_table([(size, rows(size)) for size in SIZES]),
        "frames": sizes_table([(f"{clip} frames", rows("480p", clip)) for clip in CLIPS]),
        "crossings": crossings_table(),
        "terms": terms_table(),
        "memory": memory_table(),
    }


def write(folder: Path) -> None:
    """Rewrites the tables of folder/cost.md, and folder/cost-*.png."""
    page = folder / "cost.md"
    page.write_text(fill(page.read_text(), tables()))
    cost_pictures.write(folder)
