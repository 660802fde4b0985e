"""What every test shares."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fp8ckpt.cli import main
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
    """Run the command line: ``cli("inspect", path)``. In this process, which has imported all that it needs; in one of
    its own where an environment is given.
    """

    def run(
        *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fp8ckpt", *map(str, arguments)]
        if env is None:
            with chdir(cwd or "."):
                return run_here(command)
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd=cwd, timeout=120)

    return run


def run_here(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What ``python -m fp8ckpt ...`` would print and end with; an exception that would be a traceback is raised."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    code: int | str | None = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fp8ckpt", *command[3:]])
        try:
            main()
        except SystemExit as end:
            code = end.code
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(command, int(code or 0), *texts)
