"""Seeded bugs: each is planted in a copy of the kernels, and the tests of its file must fail.

    python tests/mutations.py             all of them, one line each; exit status 1 if one survives
    python tests/mutations.py adaln       those of one file

A mutation is (file, the text as it stands, the bug). Text that is no longer there is an error, so
the list keeps up with the code. `make mutations` runs it; minutes, so it is not in `make test`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels/univigu_kernels"
TESTS = {"_flash": "joint_attention", "_flash_backward": "joint_attention", "_gemm": "routed_ffn"}
MUTATIONS: list[tuple[str, str, str]] = []


def plant(file: str, before: str, after: str, folder: Path) -> None:
    shutil.copytree(PACKAGE, folder / "univigu_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / f"univigu_kernels/{file}.py"
    code = path.read_text()
    if code.count(before) < 1:
        raise SystemExit(f"mutations: {file}.py must hold {before!r}; it doesn't. Update the list.")
    path.write_text(code.replace(before, after, 1))


def survives(file: str, before: str, after: str) -> bool:
    stem = TESTS.get(file, file)
    with tempfile.TemporaryDirectory() as folder:
        plant(file, before, after, Path(folder))
        tests = [f"tests/test_{stem}.py", "tests/test_ops.py", "tests/test_model.py"]
        present = [test for test in tests if (ROOT / test).exists()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-o", f"pythonpath={folder} {ROOT}", "-k", f"{stem} or triton", *present]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode not in (0, 1):
        raise SystemExit(f"mutations: {file}: pytest could not run\n{process.stdout[-2000:]}")
    return process.returncode == 0


def main() -> int:
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or m[0] in sys.argv[1:]]
    escaped = 0
    for file, before, after in chosen:
        alive = survives(file, before, after)
        escaped += alive
        print(f"{'SURVIVES' if alive else 'caught'}: {file}: {before!r} -> {after!r}", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
