"""However much is wrong, a terminal gets the first of each kind, and a count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Run
from tests.distributed import rewrite

from fp8ckpt.errors import HeaderError
from fp8ckpt.tensors.checkpoint import open_checkpoint, survey

COUNT = 3000


def write(directory: Path, text: str) -> Path:
    """A checkpoint of one file, whose header is ``text`` and whose data is nothing."""
    directory.mkdir()
    raw = text.encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    return directory


def test_an_index_that_lacks_names(tmp_path: Path, cli: Run) -> None:
    """Twenty lines and a count; as JSON, all."""
    entries = {f"t{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(COUNT)}
    write(tmp_path / "in", json.dumps(entries))
    index = {"weight_map": {"t0": "model.safetensors"}}
    (tmp_path / "in/model.safetensors.index.json").write_text(json.dumps(index))
    found = cli("inspect", tmp_path / "in")
    assert found.returncode == 1
    assert found.stdout.count("IndexMismatchError: ") == 20
    assert f"  and {COUNT - 21:,} more: IndexMismatchError (--json has all)" in found.stdout
    assert len(json.loads(cli("inspect", tmp_path / "in", "--json").stdout)["defects"]) == COUNT - 1


def test_models_that_are_unlike(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Twenty lines of each kind of difference."""
    other = rewrite(sample_fp8, tmp_path / "other", lambda stored: {f"x.{name}": t for name, t in stored.items()})
    found = cli("verify", sample_fp8, other)
    assert found.returncode == 1
    assert found.stdout.count(": only in ") == 40
    assert found.stdout.count(" more: tensors that are only in ") == 2


@pytest.mark.parametrize("text", [
    lambda: json.dumps({"a": [[]] * 2_000_001}),
    lambda: json.dumps({str(i): 0 for i in range(2_000_001)}),
    lambda: json.dumps({"__metadata__": {"a": "x" * 25_000_000 + "\u00e9"}}, ensure_ascii=False),
])  # fmt: skip
def test_what_would_take_too_much_memory_is_not_parsed(text: Callable[[], str], tmp_path: Path) -> None:
    """Refused by what it would hold."""
    with pytest.raises(HeaderError, match="commas and brackets"):
        open_checkpoint(write(tmp_path / "in", text()))


def test_after_a_thousand_defects_no_more_is_looked_at(tmp_path: Path) -> None:
    """Malformed entries, and overlaps."""
    for name, entry in {"malformed": 0, "overlap": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}.items():
        defects = survey(write(tmp_path / name, json.dumps({str(i): entry for i in range(COUNT)}))).defects
        many = [defect for defect in defects if "the rest of the file was not checked" in defect.found]
        assert len(many) == 1
        assert len(defects) <= 1003
