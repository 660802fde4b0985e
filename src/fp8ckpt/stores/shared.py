"""Bytes that ranks of one machine read over are fetched once, for all of these ranks.

A shard of columns is read in strips. The bytes between two strips, which the request reads over, are those that other
ranks want. Such a request is cut into blocks. The first rank that needs a block locks the block's file in shared memory
and fetches into it. The others wait for the lock, fetch what they still miss, and take the rest from there. A block is
removed once as many bytes were taken from it as were fetched.

The ranks of a machine are those that one launcher started (``LOCAL_WORLD_SIZE``). At most `SHARED` bytes are held;
without room, or without shared memory, each rank fetches for itself. A rank that dies releases its lock, and what a
dead job leaves is removed when the next one begins.
"""

from __future__ import annotations

import atexit
import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.stores.ahead import Request
from fp8ckpt.stores.store import Bytes
from fp8ckpt.system import lock, ranks_stated, reserve

SHARED = 256 << 20  # bytes
BLOCK = 16 << 20  # bytes
_EDGE = 64 << 10  # bytes; ranges end at multiples, or the next rank's last strip would be a request of its own
_MEMORY = Path("/dev/shm")

Fetch = Callable[[Request], None]


class Shared:
    """The blocks of one job on this machine, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_this_job(cls) -> Shared | None:
        """The blocks of the ranks that a launcher started here; None for a single rank, or without shared memory."""
        if (ranks_stated("LOCAL_WORLD_SIZE") or 1) < 2 or not os.access(_MEMORY, os.W_OK):
            return None
        prefix = f"fp8ckpt-{os.getuid()}-"
        for left in _MEMORY.glob(prefix + "*"):
            process = left.name.removeprefix(prefix)
            if process.isdecimal() and not _lives(int(process)):  # other names are not ours
                shutil.rmtree(left, ignore_errors=True)
        folder = _MEMORY / f"{prefix}{os.getppid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # another user made it
            return None
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # a rank that still needs it fetches for itself
        return cls(folder)

    def fetch(self, request: Request, version: str, size: int, fetch: Fetch) -> None:
        """Fill the buffers of a request. ``fetch`` asks the store; ``version`` identifies the object's version across
        all stores; ``size`` is the object's size in bytes.
        """
        for begin in range(request.start // BLOCK * BLOCK, request.stop, BLOCK):
            parts = list(_within(request.parts, begin, begin + BLOCK))
            if parts:
                wanted = Request(request.file, parts[0][0], parts[-1][0] + parts[-1][1].size, parts)
                name = hashlib.sha256(f"{version}\0{request.file}\0{begin}".encode()).hexdigest()
                try:
                    fetched = self._fetch(wanted, begin, min(begin + BLOCK, size), self._folder / name, fetch)
                except Fp8CheckpointError:
                    raise
                except (OSError, ValueError):  # from the shared memory
                    fetched = False
                if not fetched:
                    fetch(wanted)

    def _fetch(self, wanted: Request, begin: int, end: int, file: Path, fetch: Fetch) -> bool:
        with _locked(file) as fd:
            have, taken = _state_of(fd)
            if not have and len(os.listdir(self._folder)) * BLOCK > SHARED:
                file.unlink()
                return False
            if not have:
                os.ftruncate(fd, BLOCK)
            missing = _missing(have, wanted.start, wanted.stop)
            if missing:
                first, last = missing[0][0], missing[-1][1]
                missing = _missing(have, max(begin, first - first % _EDGE), min(end, last + -last % _EDGE))
            for low, high in missing:
                reserve(fd, low - begin, high - low)
            block = np.frombuffer(mmap.mmap(fd, BLOCK), np.uint8)
            for low, high in missing:
                fetch(Request(wanted.file, low, high, [(low, block[low - begin : high - begin])]))
                have = _with(have, low, high)
            for start, out in wanted.parts:
                out[:] = block[start - begin :][: out.size]
                taken += out.size
            if taken >= sum(high - low for low, high in have) - 2 * _EDGE:
                file.unlink()
            else:
                state = np.array([(taken, 0), *have], np.int64)
                os.pwrite(fd, state.tobytes(), BLOCK)
                os.ftruncate(fd, BLOCK + state.nbytes)
            return True


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def reads_over(request: Request) -> bool:
    """Whether a request throws away much of what it asks for."""
    kept = sum(buffer.size for _, buffer in request.parts)
    return request.stop - request.start - kept > kept // 16


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """A file of that name, locked; created if there is none."""
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            lock(fd, wait=True)
            if os.fstat(fd).st_nlink:  # it may have been removed meanwhile
                yield fd
                return
        finally:
            os.close(fd)


def _state_of(fd: int) -> tuple[list[tuple[int, int]], int]:
    """Which bytes of a block are there, and how many were taken: the state is stored behind the block."""
    state = np.frombuffer(os.pread(fd, max(0, os.fstat(fd).st_size - BLOCK), BLOCK), np.int64).reshape(-1, 2)
    [[taken, _], *have] = state.tolist() or [[0, 0]]
    return [(low, high) for low, high in have], taken


def _with(have: Sequence[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """The ranges with one more, in order; ranges that touch are merged."""
    before = [one for one in have if one[1] < low]
    after = [one for one in have if one[0] > high]
    touched = [(low, high), *have[len(before) : len(have) - len(after)]]
    return [*before, (min(touched)[0], max(high for _, high in touched)), *after]


def _within(parts: Sequence[tuple[int, Bytes]], begin: int, end: int) -> Iterator[tuple[int, Bytes]]:
    for start, buffer in parts:
        low, high = max(start, begin), min(start + buffer.size, end)
        if low < high:
            yield low, buffer[low - start : high - start]


def _missing(have: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of a range that are not there; ``have`` is in order."""
    found, at = [], start
    for low, high in have:
        if low > at:
            found.append((at, min(low, stop)))
        at = max(at, high)
    found.append((at, stop))
    return [(low, high) for low, high in found if low < high]
