"""requirements.lock: all that README's two commands install on a CPU, each with a hash, in the
versions of constraints.txt."""

import importlib.util
import re
from importlib.metadata import requires

import pytest
from counting import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINE = re.compile(r"([a-z0-9-]+)==([\w.+]+) --hash=sha256:([0-9a-f]{64})")


def read_lock():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    matches = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(matches), "every line is a name, a version and a hash, and nothing else"
    assert len({match[1] for match in matches}) == len(matches)
    assert [match[1] for match in matches] == sorted(match[1] for match in matches)
    return {match[1]: match[2] for match in matches}


def asked_for():
    """The requirements by name, as the command that writes the lock asks for them."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    return [Requirement(text) for text in command.requirements()]


def test_everything_that_is_asked_for_is_locked_in_a_version_that_is_taken():
    locked = read_lock()
    asked = asked_for()
    names = {canonicalize_name(requirement.name) for requirement in asked}
    assert {"torch", "setuptools", "wheel", "ninja", "tokenizers", "av", "tyro"} <= names
    for requirement in asked:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"run make lock: {requirement}"


def test_the_versions_are_those_of_the_constraints():
    locked = read_lock()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if not line.startswith("#"))
    both = {n: v for n, v in constraints.items() if canonicalize_name(n) in locked}
    assert len(both) > 10
    found = {name: locked[canonicalize_name(name)].partition("+")[0] for name in both}
    assert found == both, "run make lock"


def test_what_the_packages_need_in_turn_is_locked_too():
    """Packages installed here in the locked version are asked; other versions need others."""
    from importlib.metadata import PackageNotFoundError, version

    locked, seen = read_lock(), 0
    for name, locked_version in locked.items():
        try:
            if version(name) != locked_version:
                continue
        except PackageNotFoundError:
            continue
        seen += 1
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in locked, f"{name} needs {requirement}"
    assert seen or pytest.skip("no package is installed in the locked version")


def test_no_index_is_named():
    text = (ROOT / "requirements.lock").read_text() + (ROOT / ".ci" / "lock.py").read_text()
    assert "://" not in text and "--index" not in text
