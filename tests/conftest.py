"""What every test shares."""

from __future__ import annotations

import gc
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

from fp8ckpt import convert
from fp8ckpt.cli import main
from fp8ckpt.sample import DeepseekSizes, sample
from fp8ckpt.system import cores

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is small is done before the threads of torch have met

# Outputs are flushed many thousand times: where there is room, to memory. PYTEST_DEBUG_TEMPROOT is another place.
with suppress(OSError):
    if shutil.disk_usage("/dev/shm").free > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

Run = Callable[..., subprocess.CompletedProcess[str]]


#: Files of tests that take seconds each; they begin first, and the short ones fill up the end.
LONG = (
    "readme", "rehearsal", "save_fp8", "there_and_back", "campaign", "memory", "load_model", "page", "package",
    "saving",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: a sixth of their time is waiting for disks, servers and ranks."""
    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


gc.disable()


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: the collector of garbage need not look at it ever."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 50, 100)  # of 700, 10 and 10 a sixteenth of all time is the collector's


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Ranks are forked of this process as it is now, without what pytest patches around each test."""
    if session.items:  # not where workers have them
        from tests.distributed import serve

        capture = session.config.pluginmanager.get_plugin("capturemanager")
        capture.resume_global_capture()  # what ranks print is captured, too
        serve()
        capture.suspend_global_capture()
    return (yield)


@pytest.fixture(scope="session")
def sample_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature Mistral3 checkpoint. Read-only: copy it before you change it."""
    return sample(tmp_path_factory.mktemp("sample") / "fp8")


@pytest.fixture(scope="session")
def sample_bf16(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `convert` makes of it. Read-only."""
    convert(sample_fp8, out := tmp_path_factory.mktemp("sample") / "bf16")
    return out


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
