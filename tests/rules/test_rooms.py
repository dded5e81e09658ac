"""The rooms: few at the top of the engine, few floors, no circle; doors offer what is there."""

from importlib import import_module
from pathlib import Path

import pytest

from bench.pages import rooms
from bench.pages.tables import fill
from univigu_kernels import OPS

ROOT = Path(__file__).resolve().parents[2]
FILES, FOLDERS, FLOORS = 15, 13, 10
DOORS = [name for name, path in rooms.modules("engine").items() if path.name == "__init__.py"]


def test_few_rooms_at_the_top():
    """A folder without code, as that of the embedded model, is none."""
    inside = list((ROOT / "engine").iterdir())
    assert sum(path.is_file() for path in inside) <= FILES
    assert sum(path.is_dir() and any(path.glob("*.py")) for path in inside) <= FOLDERS


@pytest.mark.parametrize("package", rooms.PACKAGES)
def test_no_circle(package):
    """Neither among files, nor among folders taken as one."""
    assert rooms.circle(rooms.arrows(package)) is None
    assert rooms.circle(rooms.between_rooms(package)) is None


@pytest.mark.parametrize("package", rooms.PACKAGES)
def test_few_floors(package):
    assert max(rooms.floors(rooms.between_rooms(package)).values()) <= FLOORS


def test_only_the_registry_imports_operations():
    """What two of them share is in a module with a leading underscore."""
    operations = {f"univigu_kernels.{op}" for op in OPS}
    doors = {"univigu_kernels", "univigu_kernels.registry"}
    graph = rooms.arrows("univigu_kernels")
    assert operations < graph.keys() and operations <= graph["univigu_kernels.registry"]
    assert not {name for name, others in graph.items() if name not in doors and others & operations}


def test_a_circle_is_found():
    assert rooms.circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert rooms.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert rooms.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


def test_a_name_of_a_door_counts_for_who_takes_it():
    assert rooms.resolve("engine", "engine.data", "LatentSet") == "engine.data.shards"
    assert rooms.resolve("engine", "engine", "train_step") == "engine.train.step"
    assert rooms.resolve("engine", "engine.data", "manifest") == "engine.data.manifest"
    assert rooms.arrows("engine")["engine.data"] == {"engine.lazy"}
    assert "engine.data.shards" in rooms.arrows("engine")["engine.train.loop"]


@pytest.mark.parametrize("name", DOORS)
def test_a_door_offers_what_is_behind_it(name):
    module = import_module(name)
    offered = rooms.door("engine", name)
    assert list(offered) == module.__all__ and set(offered) <= set(dir(module))
    for public, home in offered.items():
        assert getattr(module, public) is getattr(import_module(home), public)
        assert f"{name}.{public}" not in rooms.modules("engine"), "a submodule would hide it"
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


def test_the_map_is_that_of_the_code():
    """`make pages` writes it."""
    page = (ROOT / "docs" / "map.md").read_text()
    assert fill(page, rooms.tables()) == page
