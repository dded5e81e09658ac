"""`python -m bench`: what `univigu bench` starts, and the children that it starts itself.

    run '{"bench": "infer", ...}'      measures (the flags of `univigu bench` as JSON)
    compare A.json B.json              regressions of B; exit code 8 if there are any
    under PID COMMAND ...              the command, which ends when its parent PID does
    pages                              rewrites the generated tables and pictures of docs/
    threads [OUTPUT.json]              two threads beside one on a Pipeline; without a path, once
    clip OUTPUT.json                   where a clip's time goes, here and in diffusers
    few OUTPUT.json                    a clip of the model of few steps, beside 24 guided ones
    caption-time OUTPUT.json           where a caption's time goes
    serve OUTPUT.json                  what the server adds to a job, and captions together
    accuracy, footprints               print two tables of docs/: held-out cases, training memory

Exit code 9: nothing was measured, or an implementation of ours was refused.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

UNMEASURED = 9


def run(text: str) -> int:
    from bench.harness import report
    from bench.harness.models import ENGINE, default
    from bench.harness.run import run as measured

    asked = {"limit": math.inf} | json.loads(text)
    setting = default(asked["device"], asked["quick"])
    if asked["bench"] == "train" and asked["device"] == "cpu":
        setting = replace(setting, samples=2)
    repeats = asked["repeats"] or (1 if asked["quick"] else 4)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def save(table: dict) -> None:
        if asked["output"]:
            report.write_json(table, Path(asked["output"]))

    table = measured(asked["bench"], setting, repeats, asked["only"], asked["limit"], say, save)
    print(report.screen(table))
    if asked["output"]:
        for path in report.write(table, Path(asked["output"])):
            say(f"wrote {path}")
    ours = any(f": {ENGINE}" in name for name in table["refused"])
    return UNMEASURED if ours or not table["rows"] else 0


def compare(a: str, b: str) -> int:
    from bench.harness import compare as comparing
    from bench.harness import record

    found = comparing.compare(record.read(Path(a)), record.read(Path(b)))
    print(comparing.report(found))
    return comparing.REGRESSED if any(c.verdict in ("slower", "gone") for c in found) else 0


def pages() -> int:
    from bench.pages import write as writing

    writing.write(Path(__file__).resolve().parent.parent / "docs")
    return 0


def accuracy() -> int:
    from bench.pages import accuracy as grading

    print(grading.markdown())
    return 0


def footprints() -> int:
    from bench.pages import footprints as counting

    print(counting.markdown())
    return 0


def threads(output: str | None = None) -> int:
    from bench import threads as timing

    if output is None:
        timing.work()
    else:
        timing.write(Path(output))
    return 0


def clip(output: str) -> int:
    from bench import clip as timing

    timing.write(Path(output))
    return 0


def few(output: str) -> int:
    from bench import clip as timing

    timing.write(Path(output), timing.few)
    return 0


def caption_time(output: str) -> int:
    from bench import caption_time as timing

    timing.write(Path(output))
    return 0


def serve(output: str) -> int:
    from bench import serve as timing

    timing.write(Path(output))
    return 0


def main(argv: list[str]) -> int:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started as a file, it is bench/
    command, *arguments = argv or ["--help"]
    if command == "under":
        from bench.harness.children import end_with

        parent, command, *arguments = arguments
        end_with(int(parent))
    from engine.cli import exit_code, one_line

    if command in ("work", "roof", "kernels", "alone", "parts"):
        from bench.harness import run as running

        getattr(running, command)(*arguments)
        return 0
    timings = threads, clip, few, caption_time, serve
    known = run, compare, pages, *timings, accuracy, footprints
    commands = {f.__name__.replace("_", "-"): f for f in known}
    if command not in commands:
        print(__doc__)
        return 2
    try:
        return commands[command](*arguments)
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        print(f"univigu: {one_line(str(error) or type(error).__name__)}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
