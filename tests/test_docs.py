"""The documentation hangs together. That it builds, without a warning, is `make docs`, which CI runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from benchmarks import table

import fp8ckpt

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    if "_site" not in path.parts
)


@lru_cache
def links_of(page: str) -> tuple[tuple[str, str], ...]:
    """(file, anchor) of each link that leads inside the repository; paths are the repository's."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            found.append((path.resolve().relative_to(ROOT).as_posix(), anchor))
    return tuple(found)


@lru_cache
def anchors_of(page: str) -> set[str]:
    """What headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Every link names a file, and every anchor a heading of it."""
    for file, anchor in links_of(page):
        assert (ROOT / file).exists(), file
        assert not anchor or anchor in anchors_of(file), f"{file}#{anchor}"


def test_every_page_is_reachable_from_the_readme() -> None:
    """Over links, and those of docs from their index at once."""
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        new = {file for page in new if page.endswith(".md") for file, _ in links_of(page)} - reached
    assert set(PAGES) - reached == set()
    assert {page for page in PAGES if page.startswith("docs/")} - {file for file, _ in links_of("docs/README.md")} == {
        "docs/README.md"
    }


def test_the_reference_has_every_public_name() -> None:
    """In a directive of its own."""
    text = (ROOT / "docs/reference.md").read_text()
    named = re.findall(r"auto(?:function|class):: fp8ckpt\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(set(fp8ckpt.__all__) - {"__version__"})


def test_every_schema_is_listed() -> None:
    """On their page."""
    linked = {file for file, _ in links_of("docs/schemas/README.md")}
    assert linked == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/schemas").glob("*.json")}


def test_the_worked_example_of_contributing(tmp_path: Path) -> None:
    """A format is a row: without it the example is refused, and with it read."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [example], [row] = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "text"))
    source = shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    table = source / "fp8ckpt/tensors/formats.py"
    with_it = table.read_text()
    assert with_it.count(row) == 1
    table.write_text(with_it.replace(row, ""))
    for said in re.findall(r"prints? `([^`]+)`", text):
        done = subprocess.run(
            [sys.executable, "-c", example], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(source)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stdout == f"{said}\n", done.stderr
        table.write_text(with_it)


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.parent.name)
def test_tables_are_what_the_results_make(page: Path) -> None:
    """Of the newest dated result of each benchmark: `python -m benchmarks.table` writes them."""
    assert page.read_text() == table.made(page)
