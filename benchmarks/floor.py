"""The floor: what reading, writing, filling new memory and copying take on this machine without us."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.measuring import interleaved, keep, pages, read_all, write_durably

SIZE = 1 << 30  # bytes


def touch(size: int, *, huge: bool) -> None:
    """Write a byte to each page of fresh memory, in pages of 2 MiB if the system gives them, or of 4 KiB."""
    torch.frombuffer(pages(size, huge=huge), dtype=torch.uint8).zero_()


def write_buffered(file: Path, size: int, threads: int, *, pushed: bool) -> None:
    """Write the same bytes as `write_durably` through the page cache, and flush; ``pushed``: write them back early."""
    piece = 4 << 20
    data = os.urandom(piece)
    fd = os.open(file, os.O_CREAT | os.O_WRONLY, 0o644)

    def write(first: int) -> None:
        for start in range(first * piece, size, threads * piece):
            os.pwrite(fd, data, start)
            if pushed:
                os.posix_fadvise(fd, start, piece, os.POSIX_FADV_DONTNEED)  # begins to write dirty pages

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, range(threads)))
        os.fdatasync(fd)
    finally:
        os.close(fd)


def copies() -> Callable[[], None]:
    """Copy bfloat16 to bfloat16, in memory that both have touched before: `SIZE` bytes of result."""
    source = torch.ones(SIZE // 2, dtype=torch.bfloat16)
    result = torch.empty_like(source)

    def copy() -> None:
        result.copy_(source)

    return copy


def measure(work: Path, threads: Sequence[int] = (1, 2, 4)) -> dict[str, dict[str, float]]:
    """Seconds for `SIZE` bytes of each."""
    write_durably(work / "source", SIZE)

    def writing(write: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            (work / "out").unlink(missing_ok=True)
            write(work / "out")

        return run

    runs: dict[str, Callable[[], None]] = {}
    for n in threads:
        runs[f"read, in the page cache, {n} threads"] = lambda n=n: read_all([work / "source"], n)  # type: ignore[misc]
    for n in threads:
        runs[f"durable write, O_DIRECT, {n} threads"] = writing(lambda out, n=n: write_durably(out, SIZE, n))  # type: ignore[misc]
    runs["durable write, O_DIRECT, 2 threads, pages of 4 KiB"] = writing(
        lambda out: write_durably(out, SIZE, 2, huge=False)
    )
    runs["durable write, buffered, 2 threads"] = writing(lambda out: write_buffered(out, SIZE, 2, pushed=False))
    runs["durable write, buffered and pushed, 2 threads"] = writing(
        lambda out: write_buffered(out, SIZE, 2, pushed=True)
    )
    runs["first touch, pages of 4 KiB"] = lambda: touch(SIZE, huge=False)
    runs["first touch, pages of 2 MiB"] = lambda: touch(SIZE, huge=True)
    runs["copy_ in memory"] = copies()
    for run in runs.values():
        run()
    return interleaved(runs, 3)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        rows = measure(Path(work))
    print(f"\nthe floor of this machine, for {SIZE / 1e9:.2f} GB")
    for name, row in rows.items():
        print(
            f"  {name:<48} {row['median']:6.3f} s  {SIZE / row['median'] / 1e9:6.2f} GB/s  (least {row['least']:.3f})"
        )
    keep("floor", {"bytes": SIZE, "seconds": rows})


if __name__ == "__main__":
    main()
