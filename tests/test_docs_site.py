"""The documentation as a site: its reference, what is near the start page, what it loads; papers and notebook."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from documentation import PAGES, ROOT, blocks_of
from launching import HANG

from trl_diffusion.cli.names import CONFIGS, config_file, packaged
from trl_diffusion.credit import step_aware
from trl_diffusion.trainers import METHODS

DOCS = ROOT / "docs" / "pages"
PACKAGES = ("adapters", "credit", "evaluation", "likelihood", "losses", "models", "sampling", "tasks", "trainers")
# Names beyond the packages' faces that an extension uses.
HOOKS = (
    "trainers.DiffusionGRPOTrainer.credit",
    "trainers.DiffusionGRPOTrainer.likelihood",
    "trainers.DiffusionGRPOTrainer.loss",
    "sampling.unmasking.RULES",
    "sampling.unmasking.Rule",
    "models.families.register",
    "models.config.DiffusionConfigMixin",
    "models.layers.DiffusionAttention",
    "credit.Credit.centre",
    "credit.Credit.weigh",
    "likelihood.Likelihood.plan",
    "likelihood.Noise.draw",
)
# From the start page within two clicks: what is looked for, and words of the page that answers it.
QUESTIONS = {
    "own_data": "def right_total(completions",
    "resume": "--resume_from_checkpoint",
    "adding_a_method": "def credit(self)",
    "memory": "LLaDA-8B",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if find_spec("mkdocs") is None:
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml"]
    built = subprocess.run([*command, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def documented(site: Path) -> set[str]:
    """Names that the reference documents, without the name of this library."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    return {name.removeprefix("trl_diffusion.") for name in names}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    names = documented(site)
    for package in PACKAGES:
        module = importlib.import_module(f"trl_diffusion.{package}")
        for name in module.__all__:
            value = getattr(module, name)
            home = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            places = {f"{package}.{name}", home.removeprefix("trl_diffusion.")}
            assert places & names, f"{package}.{name} is not in docs/pages/reference"
    assert {*HOOKS} <= names
    assert "trainers.NoSuchTrainer" not in names and len(names) > 500


@pytest.mark.slow
def test_the_site_asks_nothing_of_third_parties(site):
    loads = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=[\"']?(https?:|//)[^\"'> ]*[^>]*>")
    for page in site.rglob("*.html"):
        found = [match[0] for match in loads.finditer(page.read_text()) if 'rel="canonical"' not in match[0]]
        assert not found, (page, found)
        assert 'data-md-component="source"' not in page.read_text()  # asks GitHub's API
    assert loads.search('<script src="https://cdn.example.org/x.js"></script>')


@pytest.mark.slow
def test_questions_are_answered_one_click_from_the_start_page(site):
    start = (site / "index.html").read_text()
    article = start[start.index("<article") : start.index("</article>")]
    for page, words in QUESTIONS.items():
        assert f'href="{page}/"' in article, page
        assert words in (DOCS / f"{page}.md").read_text(), page


def test_every_page_is_in_the_navigation():
    text = re.sub(r"!!python/name:\S+", "''", (ROOT / "docs" / "mkdocs.yml").read_text())

    def pages(entry) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    in_navigation = pages(yaml.safe_load(text)["nav"])
    assert in_navigation == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(DOCS)], ids=lambda page: page.stem)
def test_code_fits_the_page_and_tables_have_few_columns(page):
    for block in blocks_of(page):
        for line in block.code.splitlines():
            assert len(line) <= 80 or block.language == "diff", f"{block.place}: {line}"
    for line in page.read_text().splitlines():
        if re.match(r"\|[ :|-]+\|$", line):
            assert line.count("|") - 1 <= 7, f"{page}: a table of {line.count('|') - 1} columns"


# ---------------------------------------------------------------- papers

ROW = re.compile(
    r"^\| \[(?P<id>\d{4}\.\d{5})\]\(https://arxiv\.org/abs/(?P=id)\) \*(?P<title>[^*]+)\* \| `(?P<method>\w+)` "
    r"\| `(?P<trainer>\w+)` \| `(?P<config>[\w/]+)` \| \[[^\]]+\]\((?P<page>[\w/]+\.md)\) \|$",
    re.MULTILINE,
)
PAPERS = {match["method"]: match for match in ROW.finditer((DOCS / "papers.md").read_text())}


def test_the_paper_index_has_every_method():
    assert {*PAPERS} == {*METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_the_paper_index_says_what_the_trainers_say(name):
    row, trainer = PAPERS[name], METHODS[name]
    assert (row["id"], row["title"]) == (trainer._paper["id"], trainer._paper["title"])
    assert row["trainer"] == trainer.__name__
    assert yaml.safe_load(config_file(row["config"]).read_text()).get("method", name) == name
    page = (DOCS / row["page"]).read_text()
    assert f"`{trainer.__name__}`" in page and f"arxiv.org/abs/{row['id']}" in page


def test_the_paper_index_has_sapo():
    title = step_aware.PAPER["title"]
    assert f"arxiv.org/abs/2510.01544) *{title}*" in (DOCS / "papers.md").read_text().replace("\n", " ")


def test_the_index_of_examples_has_every_config_of_a_large_model():
    page = (DOCS / "examples.md").read_text()
    configs = [name for name in packaged(CONFIGS) if not name.startswith("embedded/")]
    assert len(configs) > 10
    assert not [name for name in configs if f"| `{name}` |" not in page]


# ---------------------------------------------------------------- notebook


@pytest.mark.slow
@pytest.mark.thorough
def test_the_notebook_runs(tmp_path, monkeypatch):
    """The cells run in order in one namespace, as in a fresh kernel, with fewer updates and held-out problems."""
    notebook = json.loads((ROOT / "docs" / "notebooks" / "first_run.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shorter = {"max_steps=30": "max_steps=2", '"test", 128': '"test", 8'}
    assert all(sum(long in cell for cell in code) == 1 for long in shorter)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        for long, short in shorter.items():
            cell = cell.replace(long, short)
        exec(compile(cell, f"cell {number}", "exec"), namespace)
    assert len(namespace["log"]) == 2 and namespace["after"].total == 8
