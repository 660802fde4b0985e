"""What an output takes, before its first byte: disk space, bytes to read and to write, and time.

Nothing here creates or changes a named file. The speed of the disk is measured with a file that never has a name.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fp8ckpt.errors import NoRoomError
from fp8ckpt.output.extents import Extent, met
from fp8ckpt.output.files import aligned_buffer, writing_to
from fp8ckpt.system import flush_data

_BLOCK = 512  # bytes; the unit of st_blocks, whatever the file system's own is
_MEASURED = 64 << 20  # bytes, at most, that are written to learn how fast the disk is
_PIECE = 4 << 20


class Room(NamedTuple):
    """The bytes that an output ``needs`` at ``where``, and those ``free`` there; None if that is unknown."""

    where: Path
    needs: int
    free: int | None

    @property
    def fits(self) -> bool:
        """Whether there is enough space, as far as is known."""
        return self.free is None or self.needs <= self.free

    def refuse_too_little(self) -> None:
        """Raise `NoRoomError` if there is not enough space."""
        if self.free is not None and not self.fits:
            raise NoRoomError.of(file=str(self.where), needed=self.needs, free=self.free)


def room_for(sizes: Mapping[Path, int], holes: int = 0) -> Room:
    """The space for files of these sizes, all in one file system, less ``holes``: bytes that are never written. Bytes
    that the disk has already given to the files are not needed again.
    """
    where = next(folder for folder in next(iter(sizes)).parents if os.path.lexists(folder))
    try:
        disk = os.statvfs(where)
    except OSError:
        return Room(where, sum(sizes.values()) - holes, None)
    block = disk.f_frsize or 1
    needs = sum(max(0, -(-size // block) * block - _on_disk(file)) for file, size in sizes.items())
    return Room(where, max(0, needs - holes), disk.f_bavail * block if disk.f_blocks else None)


def _on_disk(file: Path) -> int:
    """Bytes that the disk has given to a file; holes do not count."""
    try:
        return os.lstat(file).st_blocks * _BLOCK
    except OSError:
        return 0


@dataclass(frozen=True)
class Forecast:
    """What a job would do, before it does it. Sizes are in bytes.

    ``files``: of the output. ``bytes_to_read``: from the source and a base; what turns out to need a second look is
    read again. ``bytes_to_write``: of all files, without the ``bytes_resumed`` that an earlier run wrote;
    ``bytes_to_upload`` of them go to a store. ``where``: the directory whose file system must have ``bytes_needed``;
    ``bytes_free`` there is None if it cannot tell. ``bytes_per_second``: the measured rate of the disk, and
    ``seconds``: the time to write at that rate; None if it was not measured. ``notes``: what a user should know.

    >>> fp8ckpt.plan_convert("sample-fp8", "planned").bytes_resumed
    0
    """

    destination: Path | str
    files: int
    bytes_to_read: int
    bytes_to_write: int
    bytes_to_upload: int
    bytes_resumed: int
    where: Path
    bytes_needed: int
    bytes_free: int | None
    fits: bool
    bytes_per_second: float | None
    seconds: float | None
    notes: tuple[str, ...]


def refuse_unwritable(folder: Path) -> None:
    """Raise `StorageError` if no file can be made in a folder that is there."""
    if not os.access(folder, os.W_OK | os.X_OK):
        with writing_to(folder):
            number = errno.EACCES if folder.is_dir() else errno.ENOTDIR
            number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else number
            raise OSError(number, os.strerror(number))


def bytes_read_for(extents: Iterable[Extent], made_of: Mapping[str, int]) -> int:
    """The bytes that are read to fill these extents; ``made_of``: the source bytes of each of their tensors."""
    parts = (part for extent in extents for chunk in extent.chunks for part in met(extent.layout, chunk))
    return sum((high - low) * made_of.get(span.name, 0) // span.nbytes for span, low, high in parts)


def measured_rate(directory: Path, most: int) -> float | None:
    """The bytes a second of a durable write of about ``most`` bytes, at least one piece and at most `_MEASURED`; None
    if it cannot be measured.
    """
    size = max(1, min(_MEASURED, most) // _PIECE) * _PIECE
    unnamed = getattr(os, "O_TMPFILE", None)  # Linux only, and not on every file system
    if unnamed is None:
        return None
    try:
        fd = os.open(directory, unnamed | os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError:
        return None
    try:
        piece = aligned_buffer(_PIECE)
        piece[:] = np.frombuffer(os.urandom(_PIECE), np.uint8)  # a file system cannot compress it
        begun = time.monotonic()
        for start in range(0, size, _PIECE):
            os.pwrite(fd, piece.data, start)
        flush_data(fd)
        taken = time.monotonic() - begun
    except OSError:
        return None
    finally:
        os.close(fd)
    return size / taken if taken > 0 else None
