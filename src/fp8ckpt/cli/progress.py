"""Progress on stderr while a command works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from fp8ckpt.cli.printing import duration, size, speaks
from fp8ckpt.errors import shown

if TYPE_CHECKING:
    from rich.progress import Progress

INTERVAL = 30.0  # seconds between two lines, without a terminal

T = TypeVar("T")
Report = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


class _Heedless:
    """stderr, as long as it takes anything: a log's full disk, or a terminal that is gone, ends no job."""

    def write(self, text: str) -> int:
        return self._try(sys.stderr.write, text) or len(text)

    def flush(self) -> None:
        self._try(sys.stderr.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    @staticmethod
    def _try(step: Callable[..., T], *arguments: str) -> T | None:
        try:
            return step(*arguments)
        except OSError:
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - a name that is a text; open until the end
            return None


@contextmanager
def progress(verb: str, *, quiet: bool) -> Iterator[Report | None]:
    """Yield a function that reports progress, or None if nothing is to be shown."""
    if quiet or not speaks():
        yield None
        return
    stream: Any = _Heedless()
    if stream.isatty():
        with _bar(stream) as bar:
            task = bar.add_task(verb, total=None, doing="opening")
            yield lambda done, total, doing: bar.update(task, completed=done, total=total, doing=shown(doing))
    else:
        yield Lines(verb, stream).report


def _bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[doing]}", markup=False),
    )
    return Progress(*columns, console=Console(file=stream), transient=True)


class Lines:
    """Progress as lines of text, at most one every `INTERVAL` seconds; a command that finishes before that prints none.

    ``clock`` returns seconds.
    """

    def __init__(self, verb: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb = verb
        self._stream = stream
        self._clock = clock
        self._begun = self._printed = clock()

    def report(self, done: int, total: int, doing: str) -> None:
        """Print a line, if it is time for one."""
        now = self._clock()
        if now - self._printed < INTERVAL:
            return
        self._printed = now
        rate = done / (now - self._begun)
        left = f", {duration((total - done) / rate)} left" if rate else ""
        percent = f" ({100 * done / total:.1f} %)" if total else ""
        print(
            f"fp8ckpt: {self._verb}: {size(done)} of {size(total)}{percent}, {size(rate)}/s{left}: {shown(doing)}",
            file=self._stream,
            flush=True,
        )
