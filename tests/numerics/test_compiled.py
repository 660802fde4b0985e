"""Where compiled code is kept: the first folder that can be written; and nothing fails where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fp8ckpt
from fp8ckpt.numerics import compiled

# Runs one kernel, and says which folder is in use.
SCRIPT = """
import numpy as np
from fp8ckpt.numerics.compiled import cache_folder
from fp8ckpt.numerics import kernels
out = np.empty(3, np.uint16)
kernels.look_up(np.arange(3, dtype=np.uint8), np.arange(256, dtype=np.uint16), out)
assert out.tolist() == [0, 1, 2]
print(cache_folder())
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, without compiled code."""
    copy = tmp_path / "site" / "fp8ckpt"
    shutil.copytree(Path(fp8ckpt.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def block(package: Path) -> None:
    """No folder can be made beside the package."""
    (package / "numerics" / "__pycache__").write_text("")


def run(package: Path, *, limit: str = "", **environment: str) -> Path | None:
    """Run a kernel of that copy, in a process of its own; returns the folder that it used."""
    given = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    given |= {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = ["bash", "-c", f'{limit} exec "$0" -c "$1"', sys.executable, SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return None if done.stdout == "None\n" else Path(done.stdout.strip())


def kept(folder: Path) -> list[str]:
    """The functions whose code is there."""
    return sorted(file.name.split("-")[0].removeprefix("kernels.") for file in folder.rglob("*.nbc"))


def test_beside_the_package(package: Path, tmp_path: Path) -> None:
    """Where that can be written; and what a process has compiled, the next one finds."""
    folder = run(package, HOME=str(tmp_path / "home"))
    assert folder == package / "numerics" / "__pycache__"
    assert kept(folder) == ["look_up"]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.nb?")}
    run(package, HOME=str(tmp_path / "home"))
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.nb?")} == before
    assert not (tmp_path / "home").exists()


def test_a_damaged_file(package: Path, tmp_path: Path) -> None:
    """Compiled code that was cut off is compiled again."""
    folder = run(package)
    assert folder is not None
    for file in folder.rglob("*.nb?"):
        file.write_bytes(file.read_bytes()[:20])
    run(package)
    assert kept(folder) == ["look_up"]


def test_users_cache_folder(package: Path, tmp_path: Path) -> None:
    """A package that others own."""
    block(package)
    folder = run(package, HOME=str(tmp_path))
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
    assert folder.name == "fp8ckpt"
    assert kept(folder) == ["look_up"]


def test_private_temporary_folder(package: Path, tmp_path: Path) -> None:
    """A container with an arbitrary user id: neither the package nor the home can be written."""
    block(package)
    folder = run(package, HOME="/dev/null", TMPDIR=str(tmp_path))
    assert folder == tmp_path / f"fp8ckpt-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert kept(folder) == ["look_up"]


@pytest.mark.parametrize("kind", ["writable by others", "a link"])
def test_temporary_folder_of_somebody_else(kind: str, package: Path, tmp_path: Path) -> None:
    """Code that others can put there is not run: nothing is kept."""
    block(package)
    folder = tmp_path / f"fp8ckpt-{os.getuid()}"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if kind == "a link":
        folder.symlink_to(theirs)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert run(package, HOME="/dev/null", TMPDIR=str(tmp_path)) is None
    assert not list(folder.iterdir())


def test_no_folder_at_all(package: Path) -> None:
    """Each process compiles for itself, and says nothing of it."""
    assert run(package, limit="ulimit -f 0;", HOME="/dev/null") is None


def test_a_folder_that_fills_up(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the probe, and none for the code: the loop runs all the same."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled.FunctionCache, "_save_overload", full)
    assert compiled.compiled()(lambda x: x + 1)(1) == 2


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python finds no place for temporary files: nothing is kept."""

    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(compiled, "__file__", "/dev/null/compiled.py")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")
    assert compiled.cache_folder.__wrapped__() is None
