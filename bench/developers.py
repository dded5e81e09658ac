"""`make bench K=adaln BASE=main`: the entries of `bench/speed.py` with the kernels of this working
tree and with those of another commit, in turns: base, tree, base, tree.

The entries and their arguments are this tree's in both; `univigu_kernels` alone is the base's. Its
compiled module is this tree's where csrc is the same, and else is built; the tree's own is used as
it was built. The base is checked out in a temporary folder, which is removed in any case.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness.record import ROOT, git
from engine.cli import exit_code, one_line
from engine.errors import UsageError

COMPILED = ROOT / "kernels/univigu_kernels"
SOURCES = "csrc", "setup.py"


def parsed(argv: list[str]) -> argparse.Namespace:
    """op "" is all of them, base "" none. Errors: UsageError for one that is unknown."""
    from univigu_kernels import OPS

    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="", help="K: one operation")
    parser.add_argument("--base", default="", help="BASE: a commit")
    parser.add_argument("--rounds", type=int, default=5, help="at least, of each entry and run")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each entry and run")
    asked = parser.parse_args(argv)
    if asked.op and asked.op not in OPS:
        raise UsageError(
            f"bench: K must be one of {', '.join(OPS)}; got {asked.op!r}. Correct the name."
        )
    if asked.base:
        commit = git("rev-parse", "--verify", "--quiet", f"{asked.base}^{{commit}}")
        if not commit:
            raise UsageError(
                f"bench: BASE must be a commit, a branch or a tag; got {asked.base!r}. See git log."
            )
        asked.base = commit
    return asked


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A work tree of `commit` with the compiled module, in a folder that lasts as long."""
    with TemporaryDirectory(prefix="univigu-bench-") as folder:
        tree = Path(folder) / "base"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            compile_or_link(tree, commit)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def compile_or_link(tree: Path, commit: str) -> None:
    added = git("ls-files", "--others", "--exclude-standard", *SOURCES)
    if added or git("diff", "--name-only", commit, "--", *SOURCES):
        print("bench: csrc differs, building the base's", file=sys.stderr, flush=True)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
        return
    for module in COMPILED.glob("_C*.so"):
        (tree / "kernels/univigu_kernels" / module.name).symlink_to(module)


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True)


def measure(tree: Path, asked: argparse.Namespace, into: Path) -> None:
    """Runs the entries with the kernels of `tree`. Errors: RuntimeError."""
    kernels = tree / "kernels"
    paths = [str(kernels), str(ROOT)]

    flags = """--quiet -p no:cacheprovider --import-mode=importlib --benchmark-quiet
    --benchmark-disable-gc --benchmark-warmup=on --benchmark-warmup-iterations=2""".split()
    command = [
        *(sys.executable, "-m", "pytest", "bench/speed.py", *flags),
        *("-o", f"pythonpath={shlex.join(paths)}"),
        f"--benchmark-json={into}",
        f"--benchmark-min-rounds={asked.rounds}",
        f"--benchmark-max-time={asked.seconds}",
    ]

    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "UNIVIGU_BENCH_OP": asked.op}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=sys.stderr)
    if done.returncode:
        raise RuntimeError(
            f"bench: pytest with the kernels of {tree} must end with 0; got {done.returncode}. "
            "Read its output above."
        )

    for entry in json.loads(into.read_text())["benchmarks"]:
        found = Path(entry["extra_info"]["kernels"])
        if not found.is_relative_to(kernels):
            raise RuntimeError(
                f"bench: the kernels must be those of {kernels}; got {found}. Remove what puts "
                "another univigu_kernels first on sys.path."
            )


def run(asked: argparse.Namespace) -> None:
    """Measures, and prints pytest-benchmark's table."""
    with TemporaryDirectory(prefix="univigu-bench-") as folder:
        results = Path(folder)
        if asked.base:
            with checked_out(asked.base) as base:
                for turn in (1, 2):
                    measure(base, asked, results / f"base-{turn}.json")
                    measure(ROOT, asked, results / f"tree-{turn}.json")
        else:
            measure(ROOT, asked, results / "tree.json")
        command = [sys.executable, "-m", "pytest_benchmark", "compare"]
        command += ["--group-by=name", "--sort=name", "--columns=min,median,iqr,rounds"]
        subprocess.run([*command, *sorted(map(str, results.iterdir()))], cwd=folder, check=True)


def main(argv: list[str]) -> int:
    try:
        run(parsed(argv))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        print(one_line(str(error) or type(error).__name__), file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
