"""What is built from this repository is complete, and its versions agree."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

import trl_diffusion

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "trl_diffusion"


def data_files() -> set[Path]:
    """Files of the package that are no Python, as git has them."""
    listed = subprocess.run(["git", "ls-files", "trl_diffusion"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so the files that belong to the package are not known")
    return {ROOT / name for name in listed.stdout.splitlines() if not name.endswith(".py")}


def test_every_data_file_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["trl_diffusion"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert data_files() - packaged == set() and len(packaged) > 40


def test_versions_agree():
    assert PROJECT["project"]["version"] == trl_diffusion.__version__
    assert f"## [{trl_diffusion.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_help_text_names_a_path_outside_the_repository():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "/work/" not in text and "../shared" not in text and "/home/" not in text, path
