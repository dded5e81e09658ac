"""Pictures of results say what the rows say, with units; the breakdown adds up to the forward."""

from collections import Counter

import pytest
import torch

from bench import roofline
from bench.harness import breakdown as timed
from bench.harness import plots
from bench.harness.models import default, ours
from univigu_kernels import OPS

ROOF = {"name": "a CPU", "flops": 2e12, "bytes": 5e10, "exps": None, "launch": 0.0}


def row(case="forward", implementation="engine", seconds=0.5, spread=0.1, **more):
    known = {"dtype": "bfloat16", "note": None, "against": "plain PyTorch", "speedup": 1.0}
    known |= dict.fromkeys(("error", "flops", "bytes", "predicted", "peak_bytes"))
    known |= {"case": case, "implementation": implementation, "seconds": seconds}
    known["low"] = None if spread is None else seconds * (1 - spread)
    known["high"] = None if spread is None else seconds * (1 + spread)
    return known | more


def table(rows, **more):
    environment = {"device": "AMD EPYC", "commit": "0123456789ab", "changed": []}
    roofs = {"bfloat16": ROOF, "float32": ROOF | {"flops": 1e11}}
    known = {"bench": "some", "environment": environment, "ceilings": roofs, "rows": rows}
    return known | more


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(holder):
    found = holder.legends[0] if hasattr(holder, "legends") else holder.get_legend()
    return [text.get_text() for text in found.get_texts()]


def error_sets(axes):
    return [bars for box in axes.containers if hasattr(box, "lines") for bars in box.lines[2]]


def error_bars(axes):
    """Segments of error bars: (begin, end)."""
    return [segment for bars in error_sets(axes) for segment in bars.get_segments()]


FORWARDS = [
    row(implementation="plain PyTorch", seconds=0.8, predicted=0.3),
    row(speedup=1.6, predicted=0.4),
    row(implementation="diffusers, torch.compile", seconds=0.0312, speedup=25.6),
]


def test_bars_have_times_speeds_intervals_and_predictions():
    rows = [*FORWARDS, row("t2v, guided", seconds=7.0, spread=0.02)]
    figure = plots.times(table(rows))
    first, second = figure.axes
    assert texts(first) == ["800 ms, 1.00x", "500 ms, 1.60x", "31.2 ms, 25.60x"]
    assert (first.get_xlabel(), second.get_xlabel()) == ("time (ms)", "time (s)")
    assert (first.get_title("left"), second.get_title("left")) == (
        "forward, bf16",
        "t2v, guided, bf16",
    )
    names = [tick.get_text() for tick in first.get_yticklabels()]
    assert names == [r["implementation"] for r in FORWARDS]
    assert [bar.get_width() for bar in first.patches] == pytest.approx([800, 500, 31.2])
    ends = sorted(end for segment in error_bars(first) for end in segment[:, 0])
    assert ends == pytest.approx([28.08, 34.32, 450, 550, 720, 880])
    ticks = [c for c in first.collections if c not in error_sets(first)]
    assert [tick.get_segments()[0][0, 0] for tick in ticks] == pytest.approx([300, 400])
    assert legend(figure) == ["this engine", "others", plots.MODEL, "95% of other runs"]
    assert figure.get_suptitle().endswith("AMD EPYC, commit 0123456789ab")


def test_the_engine_has_its_colour_and_the_rest_have_another():
    (axes,) = plots.times(table(FORWARDS)).axes
    colours = [plots.matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [plots.OTHERS, plots.ENGINE, plots.OTHERS]


def test_one_repeat_and_one_row():
    figure = plots.times(table([row(spread=None)]))
    assert not error_bars(figure.axes[0])
    assert legend(figure) == ["this engine"]


def test_wide_intervals_leave_the_bars_legible():
    """Two processes under different load: the second's interval is a hundred times its bar."""
    rows = [row(spread=0.1), row(implementation="plain PyTorch", high=50.0)]
    (axes,) = plots.times(table(rows)).axes
    assert axes.get_xlim()[1] < 1000
    rows = [r | {"high": 1e3} for r in grown(along="frames")]
    assert plots.growth(table(rows), "frames").axes[0].get_ylim()[1] < 20


def grown(spread=0.1, peak=2**29, along="rows"):
    xs = (256, 1024, 4096)
    return [
        row(
            implementation=name,
            seconds=factor * x / 1e3,
            spread=spread,
            along=along,
            x=x,
            predicted=x / 2e3,
            peak_bytes=peak and peak * factor,
        )
        for name, factor in (("plain PyTorch", 2), ("engine", 1))
        for x in xs
    ]


def test_growth_of_time_and_memory():
    figure = plots.growth(table(grown()), "rows")
    time, memory = figure.axes
    assert sorted(legend(figure)) == sorted(["engine", "plain PyTorch", plots.MODEL])
    assert time.get_ylabel() == "time of one forward (s)"
    assert memory.get_ylabel() == "peak memory (GiB)"
    assert memory.get_xlabel() == "video rows of a sample"
    assert (time.get_xscale(), time.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in memory.get_xticklabels()] == ["256", "1,024", "4,096"]
    bars = [segment[:, 1] for segment in error_bars(time)]
    assert len(bars) == 6
    assert bars[0] == pytest.approx([0.9 * 0.256, 1.1 * 0.256])  # the engine is first
    (predicted,) = (line for line in time.lines if line.get_label() == plots.MODEL)
    assert list(predicted.get_ydata()) == pytest.approx([0.128, 0.512, 2.048])
    assert [list(line.get_ydata()) for line in memory.lines] == [[0.5] * 3, [1.0] * 3]


def test_growth_without_intervals_or_memory():
    (axes,) = plots.growth(table(grown(None, None, "frames")), "frames").axes
    assert not error_bars(axes)
    assert axes.get_xlabel() == "video frames"
    assert axes.get_ylim()[0] == 0


def ops_rows(ops=("adaln", "joint_attention"), backends=("engine, cpu",), passes=("forward",)):
    """An op's FLOP per byte is four times the one's before it."""
    return [
        row(
            op,
            name,
            1e-3 * (len(backends) + 1 - i),
            speedup=1.0,
            against="plain PyTorch",
            flops=4.0**n * 1e7,
            bytes=1e7,
            predicted=2e-4,
            **{"pass": which},
        )
        for which in passes
        for n, op in enumerate(ops)
        for i, name in enumerate(("plain PyTorch", *backends))
    ]


def test_the_roofline_has_a_roof_and_two_points_of_each_op():
    rows = ops_rows(backends=("engine, cpu", "torch.compile"))
    (axes,) = plots.roofline(table(rows)).axes
    assert texts(axes) == ["copy 50 GB/s", "GEMM 2,000 GFLOP/s "]
    assert axes.get_xlabel() == "arithmetic intensity (FLOP per byte)"
    assert axes.get_ylabel() == "rate (GFLOP/s)"
    # 1e7 bytes at 5e10 B/s are 0.2 ms; the engine took 2 ms, torch.compile 1.
    assert legend(axes) == ["adaln: 10%", "joint_attention: 10%"]
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [line.get_xdata()[0] for line in points] == [1, 1, 4, 4]
    assert [line.get_ydata()[0] for line in points] == pytest.approx([10 / 3, 5, 40 / 3, 20])
    hollow = [line.get_markerfacecolor() == "white" for line in points]
    assert hollow == [True, False, True, False]
    roof = axes.lines[-1]
    assert list(roof.get_xdata())[1] == 40
    assert list(roof.get_ydata())[1:] == [2000, 2000]


def test_a_roof_for_each_dtype():
    rows = ops_rows() + [r | {"dtype": "float32"} for r in ops_rows()]
    figure = plots.roofline(table(rows))
    assert [texts(axes)[1] for axes in figure.axes] == ["GEMM 2,000 GFLOP/s ", "GEMM 100 GFLOP/s "]


def test_no_two_ops_look_the_same():
    assert len(set(zip(*plots.looks(len(OPS) * 3), strict=True))) == len(OPS) * 3


PARTS = [
    {"op": "linear", "calls": 8, "seconds": 0.3, "predicted": 0.1},
    {"op": timed.OTHER, "calls": None, "seconds": 0.4, "predicted": 0.1},
    {"op": "adaln", "calls": 1, "seconds": 0.1, "predicted": 0.05},
]


def test_the_breakdown_shows_shares_of_both():
    figure = plots.breakdown(table([], breakdown=PARTS))
    (axes,) = figure.axes
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["linear x 8", "adaln x 1", timed.OTHER]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([37.5, 12.5, 50, 40, 20, 40])
    assert texts(axes)[0] == "37.5%, 300 ms"
    assert legend(axes) == ["measured: 800 ms in all", f"{plots.MODEL}: 250 ms in all"]
    assert axes.get_xlabel() == "share of the forward (%)"


def test_each_benchmark_gets_its_pictures():
    assert set(plots.pictures(table(FORWARDS, breakdown=PARTS))) == {"times", "breakdown"}
    assert set(plots.pictures(table(grown() + grown(along="text")))) == {"rows", "text"}
    ops = set(plots.pictures(table(ops_rows(passes=("forward", "backward")))))
    assert ops == {"times-forward-bf16", "times-backward-bf16", "roofline"}
    assert plots.pictures(table([])) == {}


def test_the_largest_file_is_small(tmp_path):
    peers = "engine, cpu", "torch.compile", "sdpa[flash]", "flash-attn", "xformers"
    with plots.matplotlib.rc_context(plots.STYLE):
        figure = plots.times(table(ops_rows(list(OPS), peers)), ("forward", "bfloat16"))
        path = plots.save(figure, tmp_path / "largest.png")
    assert path.stat().st_size < 130_000
    assert plots.Image.open(path).width == 900


def test_files_are_the_same_every_time(tmp_path):
    result = table(ops_rows(["adaln"]), breakdown=PARTS)
    first, second = (plots.write(result, tmp_path / name) for name in ("a.b", "again"))
    names = ["a.b-times-forward-bf16.png", "a.b-roofline.png", "a.b-breakdown.png"]
    assert [path.name for path in first] == names
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_every_operation_of_a_forward_is_in_the_breakdown():
    setting = default("cpu", quick=True)
    rows = {row["op"]: row for row in timed.breakdown(setting, "float32")}
    expected = Counter()
    for part in roofline.forward_parts(setting.cfg, itemsize=4, **setting.sizes):
        expected[timed.RUN_AS.get(part.op, part.op)] += part.calls
    ops = {op: row["calls"] for op, row in rows.items() if op != timed.OTHER}
    assert ops == {op: calls for op, calls in expected.items() if op in OPS}
    assert {"joint_attention", "residual_adaln", "routed_ffn", "linear"} <= set(ops)
    assert all(row["seconds"] > 0 and row["predicted"] > 0 for row in rows.values())


def test_parts_add_up_to_the_forward_and_to_the_prediction():
    spans = [("linear", 0.2), ("adaln", 0.1), ("linear", 0.3), (timed.WHOLE, 1.0)]
    roof = roofline.Ceilings("a CPU", 1e9, 1e9)
    named = ("adaln", "linear", "context_embedder", "gelu")
    parts = [roofline.Work(op, 1, 10**9, 0) for op in named]
    rows = {row["op"]: row for row in timed.assigned(spans, parts, roof)}
    assert {op: row["seconds"] for op, row in rows.items()} == pytest.approx(
        {"adaln": 0.1, "linear": 0.5, timed.OTHER: 0.4}
    )
    assert [row["predicted"] for row in rows.values()] == pytest.approx([1, 2, 1])
    assert [row["calls"] for row in rows.values()] == [1, 2, None]


def test_watched_operations_give_what_they_gave():
    setting, kind = default("cpu", quick=True), torch.float32
    watch, x = timed.Stopwatch("cpu"), torch.randn(3, 4)
    linear = ours(setting, kind).ops.linear
    assert torch.equal(watch.around("linear", linear)(x, torch.eye(4)), linear(x, torch.eye(4)))
    ((name, seconds),) = watch.read()
    assert name == "linear"
    assert seconds > 0
    assert watch.read() == []
