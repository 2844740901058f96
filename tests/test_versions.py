"""The two tested sets of versions are the ends of the ranges in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LINTERS = {"ruff", "mypy"}  # not run on the lowest set


def pinned(file: str) -> dict[str, Version]:
    lines = (line for line in (ROOT / file).read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def ranges(*, docs: bool) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (needed for extra, needed in project["optional-dependencies"].items() if docs or extra != "docs")
    return [Requirement(line) for line in (*project["dependencies"], *(line for needed in extras for line in needed))]


def test_the_pinned_set_is_within_the_ranges():
    versions = pinned("constraints.txt")
    for needed in ranges(docs=True):
        assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), needed


def test_the_lowest_set_is_where_the_ranges_begin():
    versions, needed = pinned("constraints-lowest.txt"), ranges(docs=False)
    bounds = {
        canonicalize_name(requirement.name): Version(bound.version)
        for requirement in needed
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert bounds.keys() == {canonicalize_name(requirement.name) for requirement in needed}
    assert {name: versions[name] for name in bounds.keys() - LINTERS} == {
        name: bound for name, bound in bounds.items() if name not in LINTERS
    }
