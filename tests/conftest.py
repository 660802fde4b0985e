"""What every test shares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8ckpt.sample import DeepseekSizes, sample

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def sample_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature Mistral3 checkpoint. Read-only: copy it before you change it."""
    return sample(tmp_path_factory.mktemp("sample") / "fp8")


@pytest.fixture(scope="session")
def sample_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature DeepSeek-shaped checkpoint, with ragged blocks. Read-only."""
    return sample(tmp_path_factory.mktemp("sample") / "block", DeepseekSizes())


@pytest.fixture(scope="session")
def cli() -> Run:
    """Run the command line in a process of its own: ``cli("inspect", path)``."""

    def run(
        *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fp8ckpt", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=120
        )

    return run
