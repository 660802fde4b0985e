"""Progress on stderr while a command works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from fp8ckpt.cli.printing import duration, size, speaks
from fp8ckpt.errors import shown

if TYPE_CHECKING:
    from rich.progress import Progress

INTERVAL = 30.0  # seconds between two lines, without a terminal

Report = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


@contextmanager
def progress(verb: str, *, quiet: bool) -> Iterator[Report | None]:
    """Yield a function that reports progress, or None if nothing is to be shown."""
    if quiet or not speaks():
        yield None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(verb, total=None, doing="opening")
            yield lambda done, total, doing: bar.update(task, completed=done, total=total, doing=shown(doing))
    else:
        yield Lines(verb, sys.stderr).report


def _bar() -> Progress:
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
    return Progress(*columns, console=Console(stderr=True), transient=True)


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
