"""The TTGIR of a launch, compiled in a child process: where tests run without a GPU, this process
has Triton as its interpreter, which cannot compile.

The child takes pickled launches on its input, whose tensors are on the meta device, and answers
with the text. It ends with its parent.
"""

import functools
import importlib
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import BinaryIO

import torch
from torch import Tensor

CAPABILITY = 90


def bare(value):
    """An argument without its numbers: what it takes to compile for it."""
    if isinstance(value, Tensor):
        offset = value.data_ptr() % 16
        return torch.empty(64, dtype=torch.uint8, device="meta")[offset:][:32].view(value.dtype)
    if is_dataclass(value):  # a tensor descriptor
        return replace(value, base=torch.empty(16, dtype=value.base.dtype, device="meta"))
    return value


def text_of(kernel, grid: tuple[int, ...], args: tuple, options: Mapping) -> str:
    """The TTGIR of a launch for Hopper. Errors: RuntimeError with what the compiler said."""
    function = kernel.fn
    module = function.__module__ if function.__module__ != "__main__" else sys.argv[0]
    launch = (module, function.__name__, grid, [bare(value) for value in args], dict(options))
    return asked(pickle.dumps(launch))


@functools.cache
def asked(launch: bytes) -> str:
    write(child().stdin, launch)
    text, error = pickle.loads(read(child().stdout))
    if error:
        raise RuntimeError(error)
    return text


@functools.cache
def child() -> subprocess.Popen:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", f"from {__name__} import work; work()"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe)


def write(stream: BinaryIO, message: bytes) -> None:
    stream.write(len(message).to_bytes(8) + message)
    stream.flush()


def read(stream: BinaryIO) -> bytes:
    """A message, or b"" at the end."""
    return stream.read(int.from_bytes(stream.read(8)))


def answer(launch: bytes) -> tuple[str, str]:
    """-> (text, error)."""
    from univigu_kernels import ahead
    from univigu_kernels._triton import Launch

    module, name, grid, args, options = pickle.loads(launch)
    try:
        if module.endswith(".py"):
            kernel = runpy.run_path(module)[name]
        else:
            kernel = getattr(importlib.import_module(module), name)
        with ahead.target(CAPABILITY):
            return ahead.compiled(Launch(kernel, grid, args, options)).asm["ttgir"], ""
    except Exception as raised:  # told to the parent
        return "", f"{name} did not compile: {type(raised).__name__}: {raised}"


def work() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed goes to the errors
    while launch := read(sys.stdin.buffer):
        write(answers, pickle.dumps(answer(launch)))
