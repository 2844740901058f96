"""The page on adding a method shows the real code, and the overview the real order of imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pages" / "adding_a_method.md"
FENCE = re.compile(r"^```python(?: title=\"(?P<path>[^\"]+)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

SNIPPETS = [(match["path"], match["code"]) for match in FENCE.finditer(PAGE.read_text())]


def test_every_block_of_python_names_its_file():
    assert len(SNIPPETS) == PAGE.read_text().count("```python") >= 10
    assert all(path is not None for path, _ in SNIPPETS)


@pytest.mark.parametrize(("path", "code"), SNIPPETS)
def test_snippets_are_whole_lines_of_their_file(path, code):
    source = "\n" + (ROOT / path).read_text()
    assert "\n" + code in source
    assert "\n" + code.replace("(", "((", 1).replace('"', "'", 1) not in source


def test_packages_import_in_the_order_of_the_overview():
    """Of the modules' own imports; one inside a function or for type checking makes no cycle."""
    (order,) = re.findall(r"^Imports point one way: (.*?)\.", (PAGE.parent / "index.md").read_text(), re.MULTILINE)
    packages = order.split(" → ")
    for rank, package in enumerate(packages):
        for path in (ROOT / "trl_diffusion" / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                imported = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
                above = [name for name in packages[:rank] if imported.startswith(f"trl_diffusion.{name}")]
                assert not above, f"{path} imports {imported}, which stands above it"
