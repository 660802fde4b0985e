"""The examples of public docstrings, run as they stand."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest
import torch

import fp8ckpt


def _examples() -> dict[str, doctest.DocTest]:
    parser = doctest.DocTestParser()
    found = {}
    for name in fp8ckpt.__all__:
        text = getattr(getattr(fp8ckpt, name), "__doc__", None) or ""
        if ">>>" in text:
            found[name] = parser.get_doctest(text, {"fp8ckpt": fp8ckpt, "torch": torch}, name, None, 0)
    return found


@pytest.mark.parametrize("name", _examples())
def test_examples_of_docstrings(name: str, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prints what it says, in a folder where ``sample-fp8`` is a copy of the sample."""
    shutil.copytree(sample_fp8, tmp_path / "sample-fp8")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(_examples()[name], out=said.append)
    assert outcome.attempted > 0
    assert outcome.failed == 0, "".join(said)
