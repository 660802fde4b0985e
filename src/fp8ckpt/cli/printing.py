"""How results are printed: tables and sentences for people, JSON for machines, colour on a terminal."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

from fp8ckpt.cli.options import usage
from fp8ckpt.errors import Fp8CheckpointError, shown

if TYPE_CHECKING:
    from fp8ckpt.encodings.results import ConvertResult, WeightReport
    from fp8ckpt.merge import MergedWeight, MergeResult
    from fp8ckpt.output.forecast import Forecast

T = TypeVar("T")

_MOST_OF_A_KIND = 20  # lines
_GRACE = 2.0  # seconds
_STYLES = {"bold": 1, "red": 31, "green": 32, "yellow": 33}  # numbers of the terminal's own


def speaks() -> bool:
    """Whether this process prints: under torchrun, only the first rank does."""
    return os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ  # a pod's shell has the first alone


def fail(message: str) -> NoReturn:
    """End with a line on stderr and exit code 1."""
    if speaks():  # under torchrun every rank meets the same error
        print(f"{styled('fp8ckpt:', 'red', sys.stderr)} {message}", file=sys.stderr)
    sys.exit(1)


def refuse(error: Fp8CheckpointError) -> NoReturn:
    """End like `fail`; with ``--json``, stdout gets the facts of the error."""
    if "--json" in map(str.lower, sys.argv) and speaks():  # the command has ended, and its options are gone
        import json

        print(json.dumps({"error": _plain(error)}, indent=2))
    fail(error.message)


@contextmanager
def job(destination: Path | None = None) -> Iterator[None]:
    """Run a job that Ctrl-C ends within seconds; one that writes says what it leaves, and how to continue. A
    `ValueError` about its arguments is wrong usage.

    After Ctrl-C, work in progress gets `_GRACE` seconds: a store or a disk may not answer, and a run may be interrupted
    at any moment.
    """

    def leave() -> None:
        if speaks():
            from fp8ckpt.convert import kept_of

            kept = None if destination is None else kept_of(destination)
            where = f"; what was written is in {shown(kept)}, and the same command continues from there" if kept else ""
            print(f"fp8ckpt: interrupted{where}", file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(_GRACE, leave)
        timer.daemon = True
        timer.start()
        if callable(before):
            before(number, frame)  # raises KeyboardInterrupt

    if before is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        with usage():
            yield
    except KeyboardInterrupt:
        leave()
    finally:
        signal.signal(signal.SIGINT, before)


def answer(result: T, print_text: Callable[[T], None], *, as_json: bool, quiet: bool, **more: object) -> None:
    """Print a result as text or JSON; ``more`` is printed in JSON only."""
    if not speaks():
        return
    if as_json:
        import json  # not needed for help

        print(json.dumps({**more, **dataclasses.asdict(result)}, indent=2, default=_plain))  # type: ignore[call-overload]  # T is a dataclass
    elif not quiet:
        print_text(result)


def _plain(value: Any) -> Any:
    if isinstance(value, Fp8CheckpointError):
        facts = {name: getattr(value, name) for name in ("tensor", "file", "found", "expected", "remedy", "message")}
        return {"kind": type(value).__name__, **facts}
    return str(value)


def answer_plan(plan: Callable[[], Forecast], *, as_json: bool, quiet: bool) -> None:
    """Print what a job would do; exit 1 if there is not enough disk space."""
    with usage():
        forecast = plan()
    answer(forecast, _print_forecast, as_json=as_json, quiet=quiet)
    if not forecast.fits:
        sys.exit(1)


def _print_forecast(forecast: Forecast) -> None:
    print(f"{forecast.destination}: {forecast.files:,} files; nothing was written")
    resumed = f"; {size(forecast.bytes_resumed)} are there from an earlier run" if forecast.bytes_resumed else ""
    written = "upload" if forecast.bytes_to_upload else "write"
    print(f"to read: {size(forecast.bytes_to_read)}; to {written}: {size(forecast.bytes_to_write)}{resumed}")
    free = "an unknown amount" if forecast.bytes_free is None else size(forecast.bytes_free)
    room = styled("there is room", "green") if forecast.fits else styled("there is no room", "red")
    print(f"on the disk of {forecast.where}: {size(forecast.bytes_needed)} needed, {free} free: {room}")
    if forecast.seconds is not None and forecast.bytes_per_second is not None:
        rate = f"{size(forecast.bytes_per_second)}/s, which the disk took just now"
        print(f"writing takes {duration(forecast.seconds)} at {rate}")
    print_notes(forecast.notes)


def duration(seconds: float) -> str:
    """A time, in units that suit it."""
    if seconds < 1:
        return "less than a second"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """``text`` in a colour, or bold, if the stream is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\033[{_STYLES[style]}m{text}\033[0m"


def size(count: float) -> str:
    """A number of bytes, in a unit that suits it."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.{0 if units[0] == 'B' else 1}f} {units[0]}"


def share(part: int, whole: int) -> str:
    """``part`` of ``whole``, also in percent."""
    return f"{part:,} of {whole:,}" + (f" ({100 * part / whole:.3g} %)" if whole else "")


def table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    """Print columns of text; numbers are aligned to the right."""
    cells = [tuple(f"{cell:,}" if isinstance(cell, int) else shown(cell) for cell in row) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [isinstance(cell, int) for cell in rows[0]]
    for i, row in enumerate(cells):
        columns = zip(row, widths, right, strict=True)
        line = "  ".join(cell.rjust(width) if r else cell.ljust(width) for cell, width, r in columns).rstrip()
        print("  " + (line if i else styled(line, "bold")))


def print_written(result: ConvertResult | MergeResult, did: str) -> None:
    """Print what a job wrote, and its notes."""
    written = f"{result.tensors} tensors in {size(result.bytes_written)}"
    print(f"{result.destination}: {written}, {did}{result.seconds:.1f} s")
    if result.bytes_resumed:
        print(f"{size(result.bytes_resumed)} were there from an earlier run")
    print_notes(result.notes)


def print_scales(total: WeightReport | MergedWeight, moved: str = "") -> None:
    """Print which scales were kept, and what was clipped."""
    kept = f"{share(total.scales - total.fresh, total.scales)} scales kept, {total.fresh:,} new"
    print(f"{moved}{total.clipped:,} elements clipped, {kept}")
    if total.fresh_factors:
        print(f"{total.fresh_factors:,} weights have a new second level of scales")


def print_first(lines: Iterable[tuple[str, str]]) -> None:
    """Print ``(kind, line)``: the first twenty lines of each kind, and the number of the others, which JSON has."""
    counts: Counter[str] = Counter()
    for kind, line in lines:
        counts[kind] += 1
        if counts[kind] <= _MOST_OF_A_KIND:
            print(line)
    for kind, count in counts.items():
        if count > _MOST_OF_A_KIND:
            print(f"  and {count - _MOST_OF_A_KIND:,} more: {kind} (--json has all)")


def print_defects(defects: Sequence[Fp8CheckpointError], kind: str = "defects") -> None:
    """Print the number of defects, and the first of each class."""
    print(f"{kind}: {styled(f'{len(defects):,}', 'red') if defects else 'none'}")
    names = [type(defect).__name__ for defect in defects]
    print_first(
        (name, f"  {styled(name, 'red')}: {defect.message}") for name, defect in zip(names, defects, strict=True)
    )


def print_notes(notes: Sequence[str]) -> None:
    """Print what a user should know."""
    print_first(("notes", f"{styled('note:', 'yellow')} {note}") for note in notes)


def print_nan_codes(nan_codes: dict[str, int], where: str = "") -> None:
    """Print the number of NaN codes, and the first tensor that has one."""
    if not nan_codes:
        print(f"0 NaN codes{where}")
        return
    count = styled(f"{sum(nan_codes.values())} NaN codes", "yellow")
    first = shown(next(iter(nan_codes)))
    print(f"{count}{where}, in {len(nan_codes)} tensors, the first {first}: carried over as NaN")
