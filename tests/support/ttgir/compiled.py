"""The TTGIR of a launch, compiled in a child process: where tests run without a GPU, this process
has Triton as its interpreter, which cannot compile.

The child takes launches as `ahead` writes them, one a line, and answers with the text. It ends with
its parent. Nothing goes through Triton's cache, which knows a kernel by its text: what another
checkout compiled names the lines of files that are there.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping

from univigu_kernels import ahead
from univigu_kernels._triton import Launch, triton

CAPABILITY = 90


def text_of(kernel, grid: tuple[int, ...], args: tuple, options: Mapping) -> str:
    """The TTGIR of a launch for Hopper. Errors: RuntimeError with what the compiler said."""
    return asked(ahead._written(Launch(kernel, grid, args, options), CAPABILITY))


@functools.cache
def asked(line: str) -> str:
    process = child()
    print(line, file=process.stdin, flush=True)
    answer = json.loads(process.stdout.readline())
    if answer["error"]:
        raise RuntimeError(answer["error"])
    return answer["text"]


@functools.cache
def child() -> subprocess.Popen:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", f"from {__name__} import work; work()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=variables, **pipes)


class _Reached(Exception):
    """The TTGIR is there."""


def _end_at_ttgir(*given):
    """Triton's hook for a compiler of one's own: without arguments, its name in the cache."""
    if not given:
        return "ttgir", "ttgir"

    def stop(module, metadata):
        raise _Reached(str(module))

    given[1]["llir"] = stop


def answer(line: str) -> dict[str, str]:
    try:
        launch = ahead._read(json.loads(line))
        with triton.knobs.runtime.scope(), ahead.target(CAPABILITY):
            triton.knobs.runtime.add_stages_inspection_hook = _end_at_ttgir
            ahead.compiled(launch)
    except _Reached as reached:
        return {"text": str(reached), "error": ""}
    except Exception as raised:  # told to the parent
        return {"error": f"{type(raised).__name__}: {raised}"}
    raise AssertionError(f"compiled without a TTGIR: {line}")


def work() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed goes to the errors
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=answers, flush=True)
