"""Files about the project: workflows call targets that exist, links of CONTRIBUTING lead somewhere."""

from __future__ import annotations

import re

import pytest
import yaml
from documentation import ROOT
from mutants import MUTANTS

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    targets = re.findall(r"\bmake ([\w-]+)", " ".join(step.get("run", "") for step in steps))
    known = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert known is not None and {"lint", "fast", "docs"} <= {*targets} <= {*known[1].split()}
    assert {"lint", "tests", "docs", "build"} <= {*jobs}
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_the_citation_can_be_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= {*citation}
    assert citation["license"] == "Apache-2.0"


def test_links_between_files_of_the_project_lead_somewhere():
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
        assert all((ROOT / link).exists() for link in links), name
        assert links or name != "CONTRIBUTING.md"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_passage_of_a_mutant_is_still_there(mutant):
    """The mutants themselves run by hand, see `mutants.py`."""
    assert (ROOT / "trl_diffusion" / mutant.file).read_text().count(mutant.right) == 1
