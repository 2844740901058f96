"""The page on adding a method shows the real code, and the overview the real order of imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_imports import FLOOR

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


def test_the_overview_lists_the_packages_in_the_order_of_their_imports():
    listed = re.findall(r"^\| `trl_diffusion\.(\w+)` \|", (PAGE.parent / "index.md").read_text(), re.MULTILINE)
    assert {*listed} == {part for part in FLOOR if (ROOT / "trl_diffusion" / part).is_dir()}
    assert [FLOOR[part] for part in listed] == sorted(FLOOR[part] for part in listed)
