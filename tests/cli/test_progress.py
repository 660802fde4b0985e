"""Progress where there is no terminal: lines, seldom, with all that one wants to know. The clock is the test's."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from fp8ckpt.cli.progress import INTERVAL, Lines, progress


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(*reports: tuple[float, int, int, str]) -> list[str]:
    """The lines that come of reports of (seconds since the start, done, total, doing)."""
    clock, stream = Clock(), io.StringIO()
    lines = Lines("converting", stream, clock)
    for seconds, *report in reports:
        clock.now = 100 + seconds
        lines.report(*report)  # type: ignore[arg-type]  # a star loses the types
    return stream.getvalue().splitlines()


def test_a_line_says_it_all() -> None:
    """Done, of how much, the rate, the time left, and what is being done."""
    (line,) = told((30, 3_000_000_000, 12_000_000_000, "writing model-00001-of-00002.safetensors"))
    assert line == (
        "fp8ckpt: converting: 3.0 GB of 12.0 GB (25.0 %), 100.0 MB/s, 1 min 30 s left: "
        "writing model-00001-of-00002.safetensors"
    )


def test_a_line_every_thirty_seconds() -> None:
    """However often progress is reported."""
    lines = told(*((second / 10, second, 3000, "x") for second in range(1, 1000)))
    assert len(lines) == 3
    assert INTERVAL == 30


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_takes_nothing_ends_no_job(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of a log is full, or a terminal is gone."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr("fp8ckpt.cli.progress.INTERVAL", 0.0)
    monkeypatch.setattr(sys, "stderr", Gone())
    with progress("converting", quiet=False) as report:
        assert report is not None
        report(1, 2, "writing")
        report(2, 2, "writing")
    sys.stderr.close()


def test_what_is_done_at_once_prints_nothing() -> None:
    """A command of less than thirty seconds leaves logs alone."""
    assert told((1, 1, 2, "x"), (29.9, 2, 2, "x")) == []


@pytest.mark.parametrize(
    ("done", "total", "seconds", "left"),
    [(1, 3, 30, "1 min 00 s"), (1, 2, 30, "30 s"), (1, 500, 30, "4 h 09 min"), (5, 5, 30, "less than a second")],
)
def test_time_left(done: int, total: int, seconds: int, left: str) -> None:
    """In the unit that suits it."""
    (line,) = told((seconds, done, total, "x"))
    assert f", {left} left: x" in line


def test_nothing_done_yet() -> None:
    """No rate, so no time left; and nothing to do is no division by zero."""
    assert told((30, 0, 100, "x")) == ["fp8ckpt: converting: 0 B of 100 B (0.0 %), 0 B/s: x"]
    assert told((30, 0, 0, "x")) == ["fp8ckpt: converting: 0 B of 0 B, 0 B/s: x"]
