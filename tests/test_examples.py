"""The examples of public docstrings, run as they stand."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest
import torch

import fp8ckpt
from tests.adapters import PREFIX, factors, write_adapter


def _examples() -> dict[str, doctest.DocTest]:
    parser = doctest.DocTestParser()
    public = {name: getattr(fp8ckpt, name) for name in fp8ckpt.__all__ if name != "__version__"}
    names = {"fp8ckpt": fp8ckpt, "torch": torch}
    return {name: parser.get_doctest(value.__doc__ or "", {**names}, name, None, 0) for name, value in public.items()}


@pytest.mark.parametrize("name", _examples())
def test_examples_of_docstrings(name: str, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public name has one. Each prints what it says, in a folder where ``sample-fp8`` is a copy of the sample,
    and ``sample-lora`` an adapter of it.
    """
    shutil.copytree(sample_fp8, tmp_path / "sample-fp8")
    module = PREFIX + "model.language_model.layers.0.self_attn.q_proj"
    write_adapter(tmp_path / "sample-lora", factors(module, cols=128, rows=128))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(_examples()[name], out=said.append)
    assert outcome.attempted > 0
    assert outcome.failed == 0, "".join(said)
