"""Differences between operating systems: Linux has everything, macOS lacks some, and any other is refused by name.

Each function does the same on both, and checks at every call what the system offers.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fp8ckpt.errors import UnsupportedSystemError

try:
    import fcntl
except ImportError:
    raise UnsupportedSystemError.of(system=sys.platform) from None

#: The most bytes for one call of read or write: macOS refuses 2 GiB and more, Linux processes only a part.
MOST_AT_ONCE = 1 << 30
HUGE_PAGE = 2 << 20  # bytes
_BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTING = 5  # the index of the bit among a balloon's features


def cores() -> int:
    """Return the number of processors that this process may run on; if the system does not say, of all processors."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def ranks_stated(variable: str) -> int | None:
    """Return the number of ranks that a launcher's variable states, or None if it is not set. Raises `ValueError`."""
    text = os.environ.get(variable)
    if text and not text.isdecimal():
        raise ValueError(f"{variable} is {text!r}; expected how many ranks there are, or unset it to run alone")
    return int(text) if text else None


def read_at(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill flat buffers with the bytes from ``offset`` on. Return their number, less at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    done = 0
    for buffer in buffers:
        found = os.pread(fd, len(buffer), offset + done)
        buffer[: len(found)] = found
        done += len(found)
        if len(found) < len(buffer):
            break
    return done


def hint_huge_pages(ranges: Iterable[tuple[int, int]]) -> None:
    """Ask for huge pages in untouched parts of ranges of memory, (address, bytes). Their contents stay. In pages of 4
    KiB, fresh memory for a model takes as long as the rest of a load.

    Does nothing if the system has no huge pages, nor in a virtual machine that reports free memory to its host: the
    host has then taken back large pages, and giving them again takes longer than they save.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or any(
        path.read_text()[_REPORTING] == "1" for path in _BALLOONS.glob("virtio*/features")
    ):
        return
    import ctypes

    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start, size in ranges:
        if size >= HUGE_PAGE:
            # Whole pages, outwards: neighbours then stay one mapping, of which a process may have at most 65,530.
            low, high = start & -mmap.PAGESIZE, -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
            madvise(low, high - low, mmap.MADV_HUGEPAGE)


def flush(fd: int) -> None:
    """Wait until the file, or the names in the folder, are on disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, fsync() leaves data in the disk's own cache
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError:  # the file system does not support it
            pass
    os.fsync(fd)


def flush_data(fd: int) -> None:
    """As `flush`, for a file whose size does not change."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        flush(fd)


def reserve(fd: int, start: int, size: int) -> None:
    """Reserve room for bytes of a file, or raise `OSError`: writing to a mapping without room kills a process."""
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    os.posix_fallocate(fd, start, size)


def lock(fd: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Lock a file for this process until it is closed, alone or ``shared`` with others. Return False if another process
    has it and this one does not ``wait``.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
