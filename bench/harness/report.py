"""What a benchmark leaves to be read: its table on the screen, as Markdown, and its pictures."""

import json
from pathlib import Path

from bench.harness.record import duration, percent, speed
from engine.errors import MissingPackage

HEAD = (
    "case",
    "dtype",
    "implementation",
    "time",
    "speed",
    "predicted (of the time)",
    "rate",
    "of GEMM",
    "bandwidth",
    "peak memory",
    "error",
)


def cells(row: dict, ceilings: dict) -> list[str]:
    name = row["case"] + (f" {row['pass']}" if "pass" in row else "")
    name += f", {row['along']} {row['x']}" if "along" in row else ""
    named = f"{row['implementation']}" + (f" ({row['note']})" if row.get("note") else "")

    found = [name, row["dtype"].replace("bfloat16", "bf16").replace("float32", "fp32"), named]
    found.append(duration(row["seconds"]) + percent(row, "seconds"))
    found.append(f"{row['speedup']:.2f}x" + percent(row, "speedup"))

    predicted = row.get("predicted")
    share = predicted and predicted / row["seconds"]
    found.append(f"{duration(predicted)} ({share:.0%})" if predicted else "")

    roof, flops = ceilings.get(row["dtype"]), row.get("flops")
    rate = flops / row["seconds"] if flops else None
    found.append("" if not rate else speed(rate))
    found.append("" if not rate or not roof else f"{rate / roof['flops']:.0%}")

    size = row.get("bytes")
    found.append("" if not size else f"{size / row['seconds'] / 1e9:.0f} GB/s")
    memory = row.get("peak_bytes")
    found.append("" if not memory else f"{memory / 2**20:.0f} MiB")
    found.append("" if row.get("error") is None else f"{row['error']:.0e}")
    return found


def rows_of(table: dict) -> list[list[str]]:
    """Heading and rows as text, without the columns that are empty."""
    rows = [cells(row, table["ceilings"]) for row in table["rows"]]
    used = [i for i in range(len(HEAD)) if any(row[i] for row in rows)]
    return [[row[i] for i in used] for row in [list(HEAD), *rows]]


def screen(table: dict) -> str:
    rows = rows_of(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines + remarks(table))


def remarks(table: dict) -> list[str]:
    lines = [f"not timed: {name}: {why}" for name, why in table["refused"].items()]
    return lines + [f"absent: {name}: {how}" for name, how in table["absent"].items()]


def markdown(table: dict) -> str:
    env, setting = table["environment"], table["setting"]
    changed = f" with changes to {', '.join(env['changed'])}" if env["changed"] else ""
    roofs = "; ".join(
        f"{dtype.replace('bfloat16', 'bf16').replace('float32', 'fp32')}: GEMM "
        f"{speed(roof['flops'])}, copy {roof['bytes'] / 1e9:.0f} GB/s"
        for dtype, roof in table["ceilings"].items()
    )
    sizes = ", ".join(f"{key} {value}" for key, value in setting.items())

    head, *rows = rows_of(table)
    lines = [
        f"# univigu bench {table['bench']}: {env['device']}",
        "",
        f"torch {env['torch']}, Python {env['python']}, {env['threads']} threads, commit "
        f"{env['commit']}{changed}. {sizes}.",
        "",
        f"Ceilings measured in the same run: {roofs}.",
        "",
        "Means over processes of medians over interleaved rounds. ±: where another run's figure "
        "is expected, 95% of the time (`bench/harness/timing.py`). Speed: against the first row of "
        "the case and dtype. Predicted: by the ceilings (`bench/roofline.py`). Error: relative, "
        f"against plain PyTorch in {'its own dtype' if table['bench'] == 'scale' else 'fp32'}; "
        "none: not taken.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in remarks(table)),
    ]
    return "\n".join(lines) + "\n"


def beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}{suffix}")


def write_json(table: dict, stem: Path) -> Path:
    """stem.json, whole at any moment: another file takes its place."""
    path, new = beside(stem, ".json"), beside(stem, ".json.new")
    stem.parent.mkdir(parents=True, exist_ok=True)
    new.write_text(json.dumps(table, indent=1) + "\n")
    new.replace(path)
    return path


def write(table: dict, stem: Path) -> list[Path]:
    """stem.json, stem.md and the pictures stem-*.png; -> their paths. Without matplotlib there are
    no pictures, and stem.md says so."""
    paths = [write_json(table, stem), beside(stem, ".md")]
    paths[1].write_text(markdown(table))
    try:
        from bench.harness import plots  # matplotlib takes half a second
    except MissingPackage as error:
        paths[1].write_text(f"{markdown(table)}- no pictures: {error}\n")
        return paths
    pictures = plots.write(table, stem)
    links = [f"![{path.stem}]({path.name})" for path in pictures]
    paths[1].write_text("\n".join([markdown(table), *links]).rstrip() + "\n")
    return paths + pictures
