"""Write bytes at known offsets: all of them, or raise a named error.

`OutputFile` bypasses the page cache if the file system allows it (``O_DIRECT``): a file of any size then leaves the
machine's memory alone, and is durable once its metadata is flushed. Otherwise it writes through the cache, with the
same result.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from fp8ckpt.errors import Fp8CheckpointError, StorageError
from fp8ckpt.stores.local import refuse_irregular
from fp8ckpt.stores.store import Bytes, File
from fp8ckpt.system import HUGE_PAGE, MOST_AT_ONCE, flush, flush_data

#: Direct writes start and end at multiples of this (bytes): a page, and a multiple of every disk's block size.
ALIGNMENT = 4096


def aligned_buffer(size: int) -> Bytes:
    """Return a buffer of ``size`` bytes that begins at a page, as direct writes need: a huge page, if the system has
    them.

    A request to a disk may name a few hundred pieces of memory: 4 MiB in huge pages, an eighth of that in small ones.
    """
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    return buffer[-buffer.ctypes.data % HUGE_PAGE :][:size]


@contextmanager
def writing_to(file: Path) -> Iterator[None]:
    """Raise errors of the operating system as `StorageError`, with the name of the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Fp8CheckpointError):
            raise
        raise StorageError.of_writing(error, file) from error


class OutputFile:
    """A file of known size, written in pieces at their offsets, by any number of threads and processes. ``passing``: it
    is created if absent, and soon read and removed, so it should stay in the page cache.
    """

    def __init__(self, file: Path, *, passing: bool = False) -> None:
        self.file = file
        self._cached = open_to_write(file, os.O_WRONLY | (os.O_CREAT if passing else 0))
        try:
            direct = 0 if passing else getattr(os, "O_DIRECT", 0)
            self._direct = open_to_write(file, os.O_WRONLY | direct) if direct else None
        except StorageError:  # the file system has no direct writes: tmpfs before Linux 6.6, and others
            self._direct = None

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of ``data`` at ``offset``: whole pages directly, if they are aligned in memory as on disk, and the
        rest through the cache.
        """
        first = -offset % ALIGNMENT
        direct = (data.nbytes - first) // ALIGNMENT * ALIGNMENT
        if self._direct is None or direct <= 0 or (data.ctypes.data + first) % ALIGNMENT:
            self._write(self._cached, data, offset)
            return
        last = first + direct
        self._write(self._direct, data[first:last], offset + first)
        self._write(self._cached, data[:first], offset)
        self._write(self._cached, data[last:], offset + last)

    def _write(self, fd: int, data: Bytes, offset: int) -> None:
        view = data.data
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done : done + MOST_AT_ONCE], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and fd == self._direct:
                    fd = self._cached  # opened for direct writes, but refuses this alignment
                    continue
                raise StorageError.of_writing(error, self.file) from error

    def flush(self) -> None:
        """Return when everything that was written is on disk."""
        with writing_to(self.file):
            flush_data(self._cached)

    def close(self) -> None:
        """Release the descriptors; does not flush."""
        for fd in (self._cached, self._direct):
            with writing_to(self.file):  # a file server may report a failed write only now
                if fd is not None:
                    os.close(fd)


class OutputFiles:
    """The files of a directory that a process writes to, each opened when it is first asked for. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, OutputFile] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> OutputFile:
        """The file of that name, which must exist."""
        with self._lock:
            if name not in self._files:
                self._files[name] = OutputFile(self._directory / name)
            return self._files[name]

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def open_to_write(file: Path, flags: int = os.O_WRONLY) -> int:
    """Return a descriptor of a regular file, which the caller closes. Never blocks, and never follows a link."""
    try:
        fd = os.open(file, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StorageError.of_any_link(file=file) from error
        raise StorageError.of_writing(error, file) from error
    try:
        refuse_irregular(os.fstat(fd), file.name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create(file: Path, size: int) -> None:
    """Create ``file`` with ``size`` zero bytes; an existing one keeps its contents."""
    fd = open_to_write(file, os.O_WRONLY | os.O_CREAT)
    try:
        with writing_to(file):
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def write_whole(file: Path, data: bytes) -> None:
    """Write a small file and flush it to disk."""
    _write_pieces(file, [data])


def copy_whole(source: File, file: Path) -> None:
    """Copy a file's bytes and flush them to disk; memory is bounded by one buffer."""
    with writing_to(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    _write_pieces(file, (piece.data for piece in source.pieces()))


def _write_pieces(file: Path, pieces: Iterable[bytes | memoryview]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with writing_to(file), open(open_to_write(file, flags), "wb", buffering=0) as stream:
        for piece in pieces:
            done = 0
            while done < len(piece):
                done += stream.write(piece[done:]) or 0
        flush(stream.fileno())


def flush_directory(directory: Path) -> None:
    """Return when the names in ``directory`` are on disk, if its file system supports that."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flush(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # /proc, and some remote file systems, flush only files
            raise
    finally:
        os.close(fd)
