"""Runs a kernel for Hopper on the CPU: its compiled TTGIR, on torch tensors, with the hardware's
rules checked as it runs.

    ttgir.run(kernel, grid, args, options)          as kernel[grid](*args, **options)
    ttgir.run_text(text, grid, args)                the same for text, perhaps with a planted fault
    ttgir.altered(ttgir.text_of(...), name, nth)    such a text

What breaks a rule is a Fault, of a kind and at a line of Python; an operation that this machine
does not know is a NotImplementedError. parse.py reads the text; arithmetic.py, control.py,
accesses.py and hopper.py say what each operation does, memory.py and clocks.py what it may;
machine.py runs one program.

Not modelled: layouts and registers, time, what happens between the threads of one partition, what
Triton's later passes do (where buffers lie, which barriers and fences they add), clusters. Products
sum in 32 bits in torch's order, those of 8-bit numbers too.
"""

from .compiled import text_of
from .fault import Fault
from .launch import altered, run, run_text

__all__ = ["Fault", "altered", "run", "run_text", "text_of"]
