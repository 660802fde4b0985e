"""Bytes of local files: whole reads at known offsets, or a named error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8ckpt.errors import StorageError, TruncatedFileError

Bytes = npt.NDArray[np.uint8]


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
            raise StorageError(
                f"reading at byte {offset + done} failed: {error.strerror}", file=file, remedy="check the disk"
            ) from error
        if count == 0:
            found = f"the file ends at byte {offset + done}"
            raise TruncatedFileError(
                found, file=file, expected=f"at least {offset + len(view)} bytes", remedy="it changed while it was read"
            )
        done += count
