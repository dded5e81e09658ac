"""The frame of the benchmarks: statistics, tables, comparison, the command line."""

import json
import math
import random
import statistics
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from bench import infer
from bench.harness import compare, groups, models, record, report, run, timing
from bench.pages import accuracy
from bench.roofline import Ceilings, Work
from engine import cli
from engine.errors import UsageError

QUICK = models.default("cpu", quick=True)


def drifting(rng: random.Random, names: int, processes: int) -> dict[str, list[list[float]]]:
    """Rounds whose noise is small beside what slows a process and all implementations in it."""
    slow = [rng.gauss(0, 0.02) for _ in range(processes)]
    return {
        f"{i}": [
            [(i + 1) * math.exp(drift + rng.gauss(0, 0.002)) for _ in range(7)] for drift in slow
        ]
        for i in range(names)
    }


def test_intervals_hold_the_figure_of_another_run():
    rng, inside, runs = random.Random(0), 0, 1000
    for _ in range(runs):
        first, again = (timing.figures(drifting(rng, 4, 3))["2"] for _ in range(2))
        inside += first.low <= again.value <= first.high
    assert 0.935 <= inside / runs <= 0.965


def test_speedups_are_left_alone_by_what_slows_a_process():
    slow = [1.0, 1.5, 0.7]
    samples = {
        "base": [[4 * s, 4 * s] for s in slow],
        "ours": [[2 * s * 1.001**i for _ in range(2)] for i, s in enumerate(slow)],
    }
    found = timing.speedups(samples, "base")["ours"]
    assert found.value == pytest.approx(2, rel=2e-3)
    assert found.high / found.low < 1.02
    assert timing.figures(samples)["ours"].high / timing.figures(samples)["ours"].low > 2


def test_one_process_has_no_interval():
    samples = {"a": [[1.0, 2.0, 3.0]], "b": [[1.0, 1.0, 1.5]]}
    assert timing.figures(samples)["a"] == (2.0, None, None)
    assert timing.speedups(samples, "a") == {"a": (1.0, None, None), "b": (2.0, None, None)}


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (6, 2.447), (12, 2.179), (30, 2.042)])
def test_quantiles_of_student(freedom, quantile):
    assert timing.student(freedom) == pytest.approx(quantile, rel=3e-3)


def test_implementations_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(calls, timing.Clock("cpu"), rounds=3, warm_up=1)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [3, 3]


def test_a_budget_ends_rounds_but_not_the_first_three():
    times = timing.interleaved({"a": lambda: None}, timing.Clock("cpu"), rounds=50, budget=0)
    assert len(times["a"]) == timing.LEAST


def test_what_is_wrong_or_raises_is_not_timed():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    failed, group = {}, groups.Group("case", "float32")
    calls, _ = groups.build(
        {"raises": broken, "wrong": lambda: sum, "nan": lambda: sum, "fine": lambda: int},
        failed,
        "cpu",
    )
    errors = {"wrong": 0.2, "fine": 1e-6, "nan": math.nan, "unchecked": None}
    groups.last(groups.timed(group, calls | {"unchecked": int}, errors, failed, 1e-3, QUICK))
    assert list(group.times) == ["fine", "unchecked"]
    assert group.refused == {
        "raises": "RuntimeError: no such kernel",
        "wrong": "differs by 2.0e-01 from plain PyTorch in fp32",
        "nan": "differs by nan from plain PyTorch in fp32",
    }


@torch.no_grad()
def test_peers_have_our_weights():
    """diffusers' transformer is ours without text rows: another permutation of q, k and v, or a
    weight left out, would show."""
    x = models.inputs(QUICK, torch.float32)
    truth = infer.forward_truths(QUICK)[models.DIFFUSERS]
    theirs = models.diffusers_model(QUICK, torch.float32)(x["video"], x["t_video"], x["context"])
    assert models.error(theirs.sample, truth) < 1e-5


def table(seconds: dict[str, float], spread=0.002, **changes) -> dict:
    samples = {n: [[t * (1 + spread * i)] for i in (-1, 0, 1)] for n, t in seconds.items()}
    work = Work("linear", 1, 10**9, 10**6)
    found = groups.Group("forward", "float32", work.flops, work.bytes)
    group = vars(found) | {"samples": samples, "parts": dict.fromkeys(seconds, [work])}
    roof = {"float32": Ceilings("cpu", 1e12, 1e10)}
    return {
        "schema": record.SCHEMA,
        "bench": "infer",
        "rows": run.rows(group, 3, roof),
        "environment": record.machine("cpu"),
        "setting": asdict(QUICK),
        "ceilings": {name: c._asdict() for name, c in roof.items()},
        "refused": {"forward: peer": "RuntimeError: no"},
        "absent": {"xformers": "pip install xformers"},
    } | changes


def test_rows_of_all_processes_alone():
    """What ran in two of three processes, or was wrong in one, is no figure."""
    group = vars(groups.Group("forward", "float32"))
    samples = {"a": [[1.0]] * 3, "b": [[1.0]] * 2, "c": [[1.0]] * 3}
    found = run.rows(group | {"samples": samples, "refused": {"c": "wrong"}}, 3, {})
    assert [row["implementation"] for row in found] == ["a"]


def test_the_report_says_it_all():
    text = report.markdown(table({"diffusers": 1.0, "engine": 0.5}))
    assert "| forward | fp32 | engine | 500 ms ±" in text and "| 2.00x |" in text
    assert "- not timed: forward: peer: RuntimeError: no" in text
    assert "- absent: xformers: pip install xformers" in text
    assert "| 2 GFLOP/s | 0% | 0 GB/s |" in text
    assert "GEMM 1000 GFLOP/s, copy 10 GB/s" in text


def test_comparison_flags_what_is_beyond_noise():
    before = table({"diffusers": 1.0, "engine": 0.5, "gone": 1.0})
    after = table({"diffusers": 1.005, "engine": 0.6, "new": 1.0})
    found = {c.key.split(", ")[-1]: c for c in compare.compare(before, after)}
    verdicts = {name: c.verdict for name, c in found.items()}
    assert verdicts == {"diffusers": "same", "engine": "slower", "gone": "gone", "new": "new"}
    assert compare.compare(after, before)[1].verdict == "faster"
    assert found["engine"].ratio == pytest.approx(1.2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bench": "train"}, "same benchmark"),
        ({"environment": {"device": "other"}}, "same device"),
        ({"setting": asdict(replace(QUICK, samples=2))}, "same setting"),
    ],
)
def test_what_does_not_compare_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        compare.compare(table({"a": 1.0}), table({"a": 1.0}, **changes))


def test_changed_files_are_named_whole(tmp_path, monkeypatch):
    def git(*arguments: str):
        identity = ["-c", "user.name=a", "-c", "user.email=a"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    (tmp_path / "a.txt").write_text("one")
    git("init", "-q")
    git("add", "a.txt")
    git("commit", "-qm", "one")
    (tmp_path / "a.txt").write_text("two")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.machine("cpu")["changed"] == ["a.txt"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', "{}"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="bench: .*a.json must be"):
        record.read(path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("compare a.json", "compare must have two results; got 1"),
        ("infer a.json", "results go with compare alone"),
        ("infer --repeats 0", "--repeats must be"),
        ("infer --device tpu", "--device must be"),
    ],
)
def test_wrong_flags(flags, message):
    command = cli.parse(["bench", *flags.split()])
    with pytest.raises(UsageError, match=message):
        command.run()


def test_the_command(tmp_path, capfd):
    """`univigu bench` as a user runs it: two processes of a case, files, a comparison."""
    stem = tmp_path / "folder" / "a"
    flags = f"caption --quick --repeats 2 --output-path {stem}"
    cli.parse(["bench", *flags.split()]).run()
    shown = capfd.readouterr().out
    assert "engine, video frozen" in shown and "absent: xformers" in shown
    found = record.read(stem.with_suffix(".json"))
    assert [len(row["samples"]) for row in found["rows"]] == [2] * 4
    assert not found["refused"] and found["environment"]["commit"]
    assert all(row["peak_bytes"] > 2**26 and row["error"] < 0.05 for row in found["rows"])
    assert all(row["low"] < row["seconds"] < row["high"] for row in found["rows"])
    medians = [statistics.median(s) for s in found["rows"][0]["samples"]]
    assert found["rows"][0]["seconds"] == statistics.geometric_mean(medians)
    assert {path.suffix for path in stem.parent.iterdir()} == {".json", ".md", ".png"}
    cli.parse(["bench", "compare", *[str(stem.with_suffix(".json"))] * 2]).run()
    assert "4 same" in capfd.readouterr().out


def test_accuracy_has_a_row_for_each_way():
    """Shares in percent with the spread of other cases; only captions have a cache."""
    modes = {mode: {"all": 0.975, "not in any prompt": 1.0} for mode in accuracy.GRADED}
    graded = modes | {"cases": 200, "video_cache": "exact"}
    assert accuracy.row("exact", graded) == (
        "| exact | 97.5% ±1.2 | 97.5% ±1.0 | 100.0% | 97.5% ±1.0 |"
    )
    frozen = accuracy.row("frozen", graded | {"video_cache": "frozen"})
    assert frozen == "| frozen | - | 97.5% ±1.0 | 100.0% | - |"


@pytest.mark.parametrize("device, index", [("cuda", 0), ("cuda:1", 1), ("cpu", None)])
def test_a_child_works_on_its_device(device, index, monkeypatch):
    """set_device takes no device without an index."""
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: seen.append(_get_device_index(d)))
    setting = replace(QUICK, device=device)
    assert run.decoded(run.encoded(setting)) == setting
    assert seen == ([] if index is None else [index])


def test_what_has_no_time_is_left_out():
    found = run.run("caption", QUICK, 1, limit=0.0, say=lambda line: None)
    assert not found["rows"] and set(found["refused"].values()) == {"no time was left"}


def test_a_case_that_fails_leaves_the_others(monkeypatch):
    """A child that dies, as by a kernel's fault or for want of memory, is a line of the report."""
    broken = replace(QUICK, text_rows=-1)
    found = run.run("caption", broken, 1, say=lambda line: None)
    (why,) = [why for said, why in found["refused"].items() if said.startswith("v2t")]
    assert "the process ended with 1 and said: RuntimeError" in why and not found["rows"]


def test_unknown_cases_are_refused():
    with pytest.raises(UsageError, match="--only must name some of v2t; got forward"):
        run.run("caption", QUICK, 1, ["forward"])


def test_a_regression_has_an_exit_code(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, seconds in zip(paths, (1.0, 1.2), strict=True):
        path.write_text(json.dumps(table({"engine": seconds})))
    compared = cli.parse(["bench", "compare", *map(str, paths)])
    with pytest.raises(SystemExit) as stop:
        compared.run()
    assert stop.value.code == compare.REGRESSED == 8
    cli.parse(["bench", "compare", *map(str, reversed(paths))]).run()
