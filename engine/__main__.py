"""`python -m engine` is the command `univigu`."""

from engine.cli import program

program()
