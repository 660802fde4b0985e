"""docs/families.md is what ``python -m benchmarks families`` writes, and has a row for each family of the table."""

from __future__ import annotations

from benchmarks import families

from tests.families.releases import RELEASES


def test_the_page_has_the_rows_of_the_table() -> None:
    """No family is missing, no cell, and no word was changed by hand."""
    text = families.PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    start = lines.index(f"| family | {' | '.join(families.CHECKS)} |")
    rows = [tuple(line.strip("| ").split(" | ")) for line in lines[start + 2 :]]
    assert [row[0] for row in rows] == list(RELEASES)
    assert {len(row) for row in rows} == {1 + len(families.CHECKS)}
    assert families.page(rows) == text


def test_the_page_says_what_the_table_says() -> None:
    """Of what does not come back, and of what needs the model's layout; nothing failed when it was written."""
    for line in families.PAGE.read_text().splitlines():
        if (release := RELEASES.get(line.strip("| ").split(" | ")[0])) is not None:
            assert ("`--layout model`" in line) != release.understood
            assert ("all but" in line) == bool(release.rounded)
            assert "no: " not in line
