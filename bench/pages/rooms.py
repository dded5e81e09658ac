"""Who imports whom, read off the source: the floors of docs/map.md, and what the tests of the rules
ask of them.

An import counts wherever it stands, in a function too. A name that a door offers (see
`engine.lazy`) counts as an import of the file that holds it, by whoever takes it: a door itself
imports nothing. A room is a file or a folder at the top of a package.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bench.harness.record import ROOT
from bench.pages.tables import fill, table

PACKAGES = {"engine": ROOT, "bench": ROOT, "univigu_kernels": ROOT / "kernels"}
Graph = dict[str, set[str]]


@cache
def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file; a folder's `__init__` has the folder's name."""
    base, found = PACKAGES[package], {}
    for path in sorted((base / package).rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name that is taken from it or None) of every import of a file."""
    above = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = above[: len(above) + 1 - node.level] if node.level else []
            module = ".".join([*inside, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


@cache
def door(package: str, name: str) -> dict[str, str]:
    """The names that a package offers lazily, and the file that holds each."""
    path = modules(package)[name]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "attach":
            homes = ast.literal_eval(node.args[1])
            full = {f"{name}{home}" if home[0] == "." else home: n for home, n in homes.items()}
            return {offered: home for home, names in full.items() for offered in names}
    return {}


def resolve(package: str, module: str, name: str | None) -> str:
    """The file that an import reaches; through a door, and the next one, to what is behind."""
    known = modules(package)
    if name is None or module not in known:
        return module
    if f"{module}.{name}" in known:
        return f"{module}.{name}"
    home = door(package, module).get(name)
    return module if home is None else resolve(package, home, name)


@cache
def arrows(package: str) -> Graph:
    """The files that each file of a package imports, of the same package."""
    known, found = modules(package), {}
    for name, path in known.items():
        reached = {resolve(package, *taken) for taken in imported(name, path)}
        found[name] = (reached & known.keys()) - {name}
    return found


def room_of(package: str, module: str) -> str:
    """ "engine.train.step" -> "train"; the package's own `__init__` keeps its name."""
    return module.removeprefix(f"{package}.").split(".")[0] if "." in module else "__init__"


def between_rooms(package: str) -> Graph:
    found: Graph = {}
    for module, others in arrows(package).items():
        room = room_of(package, module)
        found.setdefault(room, set()).update(room_of(package, other) for other in others)
    return {room: others - {room} for room, others in found.items()}


def circle(graph: Graph) -> list[str] | None:
    """One chain of imports that ends where it began, or None."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (walk(n, [*path, name]) for n in sorted(graph[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(graph))), None)


def floors(graph: Graph) -> dict[str, int]:
    """1 for what imports nothing of the graph, else one more than the highest that is imported."""

    @cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, graph[name]), default=0)

    return {name: floor(name) for name in graph}


def said_of(package: str, room: str) -> str:
    """The first sentence of a room's docstring."""
    name = package if room == "__init__" else f"{package}.{room}"
    path = modules(package)[name]
    text = " ".join(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split())
    return re.split(r"(?<=\.)\s", text)[0]


def place(package: str, room: str) -> str:
    path = PACKAGES[package] / package / room
    folder = path.relative_to(ROOT).as_posix()
    return f"`{folder}/`" if path.is_dir() else f"`{folder}.py`"


def engine_table() -> str:
    """Rooms by floor, the highest first; those that all import stand in no row's last column."""
    graph = between_rooms("engine")
    level, common = floors(graph), {"errors", "config", "lazy", "__init__"}
    lines = []
    for room in sorted(graph, key=lambda room: (-level[room], room)):
        named = ", ".join(f"`{other}`" for other in sorted(graph[room] - common))
        said = said_of("engine", room).replace("|", "\\|")
        lines.append([str(level[room]), place("engine", room), said, named])
    return table(["floor", "room", "what it says of itself", "imports"], lines)


def tables() -> dict[str, str]:
    """What docs/map.md has between its markers, by name."""
    return {"engine": engine_table()}


def write(folder: Path) -> None:
    """Rewrites the table of folder/map.md."""
    page = folder / "map.md"
    page.write_text(fill(page.read_text(), tables()))
