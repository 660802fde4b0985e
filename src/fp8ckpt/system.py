"""What differs between operating systems: Linux has all of it, macOS lacks some, and any other is refused by name.

Each function does the same on both, and asks at every call for what the system has.
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
    raise UnsupportedSystemError.of(sys.platform) from None

#: Bytes that one call reads or writes at most: macOS refuses calls of 2 GiB and more, Linux does a part of them.
MOST_AT_ONCE = 1 << 30
HUGE_PAGE = 2 << 20  # bytes
_BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTING = 5  # the bit, among a balloon's features


def cores() -> int:
    """The processors that this process may run on; where the system does not say, those that there are."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def read_at(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill flat buffers with the bytes from ``offset`` on. Returns how many there were, at the end of a file fewer."""
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
    """Ask for huge pages in ranges of memory, (address, bytes), as far as nobody has touched them yet; what they hold
    stays. In pages of 4 KiB, fresh memory for a model takes as long as all else that a load does.

    Nothing happens where the system has none, nor in a virtual machine that reports free memory to its host: large
    pages are those that the host has taken back, and it takes longer to give them than they save.
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
            # Whole pages, outwards: so neighbours stay one mapping, of which a process may have no more than 65,530.
            low, high = start & -mmap.PAGESIZE, -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
            madvise(low, high - low, mmap.MADV_HUGEPAGE)


def flush(fd: int) -> None:
    """Return when the file, or the names in the folder, are on disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # of macOS, whose fsync() leaves them in the disk's own cache
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError:  # the file system has none
            pass
    os.fsync(fd)


def flush_data(fd: int) -> None:
    """The same as `flush`, for a file whose size does not change."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        flush(fd)


def reserve(fd: int, start: int, size: int) -> None:
    """Have room for bytes of a file, or raise `OSError`: what is mapped and has none would end the process."""
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    os.posix_fallocate(fd, start, size)


def lock(fd: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Take a file for this process, until it is closed, or together with others that ``shared`` it; False where another
    has it, and this one does not ``wait``.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
