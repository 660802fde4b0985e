"""Bytes in and out at known offsets: whole reads or a named error, whole writes or a named error.

`read_region` fetches one region of a stored tensor and reads no byte outside it. `OutputFile` writes around the page cache
where the file system can (``O_DIRECT``), so that a file of any size leaves the machine's memory alone and is durable once
its metadata is flushed; where it cannot, it writes through the cache, with the same result.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.errors import RegionError, StorageError, TruncatedFileError
from fp8ckpt.storage.header import DTYPE_BITS, TensorSpan

#: Direct writes start, and end, at multiples of this (bytes); a page, and a multiple of every disk's block.
ALIGNMENT = 4096

Bytes = npt.NDArray[np.uint8]
Region = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes; in the coordinates of the full tensor


def aligned_buffer(size: int) -> Bytes:
    """A buffer of ``size`` bytes that begins at a page, as direct writes need."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def open_to_read(file: Path) -> int:
    """A descriptor for reading ``file``, which the caller closes."""
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"cannot be opened: {error.strerror}", file=file, remedy="restore the file") from error


class LastFile:
    """Keeps the file that was read last open: the next tensor is likely in it. For one thread."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._fd = -1

    def descriptor(self, file: Path) -> int:
        """A descriptor for reading ``file``, good until the next call."""
        if file != self._file:
            self.close()
            self._fd = open_to_read(file)
            self._file = file
        return self._fd

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._fd)
            self._file = None


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """A descriptor for reading ``file``, closed in the end."""
    fd = open_to_read(file)
    try:
        yield fd
    finally:
        os.close(fd)


def read_into(fd: int, buffer: npt.NDArray[Any], offset: int, file: Path) -> None:
    """Fill a contiguous ``buffer`` with the bytes of ``file`` from ``offset`` on; all of them, or an error."""
    view = buffer.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise StorageError(f"reading at byte {offset + done} failed: {error.strerror}", file=file, remedy="check the disk") from error
        if count == 0:
            found = f"the file ends at byte {offset + done}"
            raise TruncatedFileError(
                found, file=file, expected=f"at least {offset + len(view)} bytes", remedy="it changed while it was read"
            )
        done += count


def checked_region(span: TensorSpan, offsets: tuple[int, ...] | None, sizes: tuple[int, ...] | None) -> Region:
    """The region, with None standing for the whole tensor; raises `RegionError` where it reaches outside."""
    offsets = tuple(offsets) if offsets is not None else (0,) * len(span.shape)
    if len(offsets) == len(span.shape):
        sizes = tuple(sizes) if sizes is not None else tuple(dim - start for dim, start in zip(span.shape, offsets, strict=True))
        if len(sizes) == len(span.shape) and all(
            min(start, size) >= 0 and start + size <= dim for start, size, dim in zip(offsets, sizes, span.shape, strict=True)
        ):
            return offsets, sizes
    found = f"offsets {offsets} and sizes {sizes} reach outside the tensor"
    raise RegionError(found, tensor=span.name, file=span.file, expected=f"a region of {span.shape}")


def pieces(region: Region, most: int) -> Iterator[Region]:
    """The region in pieces of at most ``most`` elements that follow one another in its row-major order."""
    offsets, sizes = region
    count = prod(sizes)
    if count <= most:
        if count:
            yield region
        return
    axis = next(i for i, size in enumerate(sizes) if size > 1)
    step = max(1, sizes[axis] * most // count)
    for first in range(0, sizes[axis], step):
        size = min(step, sizes[axis] - first)
        yield from pieces(((*offsets[:axis], offsets[axis] + first, *offsets[axis + 1 :]), (*sizes[:axis], size, *sizes[axis + 1 :])), most)


def within(piece: Region, region: Region) -> tuple[slice, ...]:
    """Where a piece lies in an array of the region's sizes."""
    return tuple(slice(at - start, at - start + size) for at, start, size in zip(piece[0], region[0], piece[1], strict=True))


def runs(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The region as (first element, count) runs that are contiguous in a row-major tensor, in order and as few as can be."""
    if not prod(sizes):
        return
    # Trailing dimensions that are taken whole merge into one run with the dimension before them.
    split = len(shape)
    while split and sizes[split - 1] == shape[split - 1]:
        split -= 1
    split = max(split - 1, 0)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    length = prod(sizes[split:])
    base = sum(start * stride for start, stride in zip(offsets, strides, strict=True))
    for index in np.ndindex(*sizes[:split]):
        yield base + sum(i * stride for i, stride in zip(index, strides, strict=False)), length


def read_region(fd: int, span: TensorSpan, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Bytes) -> None:
    """Read a checked region of a tensor of whole bytes into ``out`` (flat, contiguous, in the region's row-major order)."""
    itemsize = DTYPE_BITS[span.dtype] // 8
    view = out.data
    done = 0
    for first, count in runs(span.shape, offsets, sizes):
        start, size = span.start + first * itemsize, count * itemsize
        # Runs may be short and many, as of a slice of columns: the common case is one call.
        try:
            whole = os.preadv(fd, (view[done : done + size],), start) == size
        except OSError:
            whole = False  # read_into will meet it again, and name it
        if not whole:
            read_into(fd, out[done : done + size], start, span.file)
        done += size


class OutputFile:
    """A file of known size, written in pieces at their offsets, by any number of threads and processes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._cached = self._open(os.O_WRONLY | os.O_CLOEXEC)
        try:
            direct = getattr(os, "O_DIRECT", 0)
            self._direct = os.open(file, os.O_WRONLY | os.O_CLOEXEC | direct) if direct else None
        except OSError:  # the file system has no direct writes: tmpfs before Linux 6.6, and others
            self._direct = None

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.file, flags, 0o666)
        except OSError as error:
            raise write_error(error, self.file) from error

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of ``data`` at ``offset``: the whole pages directly, if in memory they lie as they do on disk, and the rest not."""
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
                done += os.pwrite(fd, view[done:], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and fd == self._direct:
                    fd = self._cached  # opened for direct writes, and yet refuses one of this alignment
                    continue
                raise write_error(error, self.file) from error

    def flush(self) -> None:
        """Return when all that was written is on disk."""
        try:
            os.fdatasync(self._cached)
        except OSError as error:
            raise write_error(error, self.file) from error

    def close(self) -> None:
        """Release the descriptors; does not flush."""
        for fd in (self._cached, self._direct):
            if fd is not None:
                os.close(fd)


class OutputFiles:
    """The files of a directory that a process writes to, each opened when it is first asked for; for any number of threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, OutputFile] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> OutputFile:
        """The file of that name, which exists."""
        with self._lock:
            if name not in self._files:
                self._files[name] = OutputFile(self._directory / name)
            return self._files[name]

    def flush(self) -> None:
        """Return when all that was written is on disk."""
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Release the descriptors; does not flush."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def create(file: Path, size: int) -> None:
    """Create ``file`` with ``size`` bytes of nothing; one that is there keeps what it has."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise write_error(error, file) from error


def write_whole(file: Path, data: bytes) -> None:
    """Write a small file and flush it to disk."""
    try:
        with file.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise write_error(error, file) from error


def copy_whole(source: Path, file: Path) -> None:
    """Copy a file's bytes and flush them to disk; memory is one buffer."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with opened(source) as fd, file.open("wb", buffering=0) as stream:
            while data := os.read(fd, 1 << 20):
                stream.write(data)
            os.fsync(stream.fileno())
    except StorageError:
        raise
    except OSError as error:
        raise write_error(error, file) from error


def flush_directory(directory: Path) -> None:
    """Return when the names in ``directory`` are on disk."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_error(error: OSError, file: Path) -> StorageError:
    """The named error for a write that the operating system refused."""
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
    return StorageError(f"writing failed: {error.strerror}", file=file, remedy=remedy)
