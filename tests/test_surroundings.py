"""What surrounds a command may be broken, too: one line that says what helps, a failing exit status, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fp8ckpt.cli import main
from fp8ckpt.ranks import threads_of_this_rank
from fp8ckpt.workers import share
from tests.conftest import Run

COMMAND = f"{sys.executable} -m fp8ckpt"


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which ``fp8ckpt`` is ours and ``$0``, ``$1`` ... are the arguments."""
    script = f'set -o pipefail; fp8ckpt() {{ {COMMAND} "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", ["inspect $0", "inspect $0 --json", "verify $0", "--help", "--version"])
def test_output_that_cannot_be_written(command: str, sample_fp8: Path) -> None:
    """A full disk behind a redirection."""
    done = shell(f"fp8ckpt {command} > /dev/full", sample_fp8)
    assert (done.returncode, done.stderr) == (1, "fp8ckpt: standard output: No space left on device\n")


@pytest.mark.parametrize("command", ["inspect $0", "inspect $0 --json", "--help"])
def test_reader_that_has_seen_enough(command: str, sample_fp8: Path) -> None:
    """A pipe that is closed: no word, and the reader's exit status is the one that counts."""
    done = shell(f"fp8ckpt {command} | true; exit ${{PIPESTATUS[1]}}", sample_fp8)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams(closed: str, sample_fp8: Path) -> None:
    """A caller that closed them hears nothing, and the exit status tells."""
    assert shell(f"fp8ckpt inspect $0 {closed}", sample_fp8).returncode == 0
    done = shell(f"fp8ckpt inspect $0/nowhere {closed}", sample_fp8)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variables", ["WORLD_SIZE=2", "WORLD_SIZE=2 RANK=1", "WORLD_SIZE=0", "WORLD_SIZE="])
def test_a_shell_in_a_pod(variables: str, sample_fp8: Path) -> None:
    """It has variables of a job, and no launcher: what asks no other rank speaks, as it does alone."""
    done = shell(f"export {variables}; fp8ckpt inspect $0; fp8ckpt inspect $0/nowhere", sample_fp8)
    assert done.stdout.endswith("defects: none\n")
    assert (done.returncode, done.stderr.count("there is no such directory")) == (1, 1)


@pytest.mark.parametrize("variables", ["WORLD_SIZE=abc", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=-3"])
def test_ranks_that_cannot_meet(variables: str, sample_fp8: Path, tmp_path: Path) -> None:
    """Wrong usage, which says of what."""
    done = shell(f"env {variables} {COMMAND} convert $0 $1", sample_fp8, tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert variables.partition("=")[0] in done.stderr
    assert "to run it alone" in done.stderr or "to run alone" in done.stderr


def test_a_working_directory_that_is_gone(sample_fp8: Path, tmp_path: Path) -> None:
    """It is what is named."""
    done = shell('mkdir "$1" && cd "$1" && rmdir "$1" && fp8ckpt convert $0 out', sample_fp8, tmp_path / "gone")
    assert (done.returncode, done.stderr) == (1, "fp8ckpt: the working directory: No such file or directory\n")


@pytest.mark.parametrize("command", ["convert", "sample"])
@pytest.mark.parametrize(("destination", "found", "remedy"), [
    ("x" * 255, "File name too long", "choose a shorter name"),
    ("x" * 256, "File name too long", "choose a shorter name"),
    ("x" * 256 + "/out", "File name too long", "choose a shorter name"),
    ("/", "the destination exists", "choose another destination"),
    (".", "the destination exists", "choose another destination"),
    ("file/out", "Not a directory", "choose a place below a directory"),
    ("loop/out", "Too many levels of symbolic links", "correct the links"),
    ("/proc/out", "No such file or directory", "run it again"),
    ("dangling/out", "No such file or directory", "run it again"),
    ("new/..", "the destination exists", "choose another destination"),
])  # fmt: skip
def test_destinations_that_cannot_be(
    command: str,
    destination: str,
    found: str,
    remedy: str,
    sample_fp8: Path,
    tmp_path: Path,
    cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A place where nothing can be made is refused, by a plan as well, and nothing is made."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    for plan in ([], *([["--plan"]] if destination != "/proc/out" else [])):  # whose permissions say that root may
        done = cli(command, *[sample_fp8] * (command == "convert"), destination, *plan)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
        assert found in done.stderr
        assert remedy in done.stderr
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("path", "remedy"), [
    ("nowhere", "; check the path\n"),
    ("./nowhere", "; check the path\n"),
    (
        "org/nowhere",
        "; check the path; or, for a model of the hub, fetch it first: hf download org/nowhere; or read it there: hf://org/nowhere\n",
    ),
    ("a/b/c", "; check the path\n"),
])  # fmt: skip
def test_mistyped_path(path: str, remedy: str, cli: Run, tmp_path: Path) -> None:
    """The path is what to look at first; only what can be a hub id can be fetched."""
    done = cli("inspect", path, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(remedy)


def test_more_workers_than_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions are as many as make sense; and where the system gives no more threads, those that there are do it."""
    assert threads_of_this_rank(10**9) < 1000
    begin, left = threading.Thread.start, 0

    def start(thread: threading.Thread) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    for threads in (0, 1):
        left, done = threads, []
        share(range(5), [done.append] * 3)
        assert sorted(done) == [0, 1, 2, 3, 4]


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no traceback."""

    def none_left(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fp8ckpt.cli.app", none_left)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == (
        "fp8ckpt: there is not enough memory; --workers 1 takes the least, where there is that option\n"
    )
