"""What ranks of one machine share lies where others have files, too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fp8ckpt.stores import shared
from fp8ckpt.stores.shared import Shared


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the machine's."""
    monkeypatch.setattr(shared, "_MEMORY", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return tmp_path


def test_only_what_dead_jobs_left_goes(memory: Path) -> None:
    """Not what merely begins with our name."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    prefix = f"fp8ckpt-{os.getuid()}-"
    for name in ("notes", "12x", str(ended.pid), str(os.getpid())):
        (memory / f"{prefix}{name}").mkdir()
    assert Shared.of_this_job() is not None
    left = {path.name.removeprefix(prefix) for path in memory.iterdir()}
    assert left == {"notes", "12x", str(os.getpid()), str(os.getppid())}


def test_a_link_is_not_followed(memory: Path) -> None:
    """It leads where whoever made it wants: each rank fetches for itself."""
    (memory / "elsewhere").mkdir()
    (memory / f"fp8ckpt-{os.getuid()}-{os.getppid()}").symlink_to("elsewhere")
    assert Shared.of_this_job() is None
