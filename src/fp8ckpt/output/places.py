"""Where the extents of an output are written: into a file on this machine, or into memory until a store has them.

A part of a file in a store can only be replaced as a whole. So an extent that is filled at several times (with scales,
which are made with weights of other extents) is kept in a file here, and sent last.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fp8ckpt.output.extents import Extent
from fp8ckpt.output.files import OutputFile
from fp8ckpt.stores.store import Bytes
from fp8ckpt.stores.upload import Destination


class Sent(NamedTuple):
    """A part of a file that is for a store: its ``etag`` there and its MD5, both "" while it is kept here."""

    name: str
    number: int
    start: int
    stop: int
    etag: str = ""
    md5: str = ""


class Place(Protocol):
    """A sink for the bytes of an extent, by their offsets in the file."""

    def write(self, data: Bytes, offset: int) -> None:
        """Write some of the bytes."""

    def flush(self) -> Sent | None:
        """Return once all bytes written are safe, with what the store needs to know of them at the end."""

    def close(self) -> None:
        """Release what is held."""


class Kept:
    """An extent of a file here, which is sent at the end."""

    def __init__(self, file: Path, extent: Extent) -> None:
        self._file = OutputFile(file)
        self._sent = Sent(extent.layout.name, extent.number, extent.start, extent.stop)

    def write(self, data: Bytes, offset: int) -> None:
        self._file.write(data, offset)

    def flush(self) -> Sent:
        self._file.flush()
        return self._sent

    def close(self) -> None:
        self._file.close()


class Part:
    """An extent in memory, sent as a part of its file once complete; an incomplete one is left to a second pass."""

    def __init__(self, far: Destination, extent: Extent) -> None:
        self._far = far
        self._extent = extent
        self._held = bytearray(extent.nbytes)
        self._bytes = np.frombuffer(self._held, np.uint8)
        self._lock = threading.Lock()
        self._left = extent.nbytes

    def write(self, data: Bytes, offset: int) -> None:
        """As `Place.write`; each byte is written once."""
        start = offset - self._extent.start
        self._bytes[start : start + data.nbytes] = data
        with self._lock:
            self._left -= data.nbytes

    def flush(self) -> Sent | None:
        if self._left:
            return None
        layout, _, number, start, stop, _, again = self._extent
        return Sent(layout.name, number, start, stop, *self._far.send(layout.name, number, self._held, again=again))

    def close(self) -> None:
        del self._bytes
        self._held = bytearray()
