"""The one interface for reading bytes, whatever holds them.

A `Store` is the files below one place: a local directory (`fp8ckpt.stores.local`), memory (`fp8ckpt.stores.memory`), or
a remote place (`fp8ckpt.stores.remote`). File names are relative, with forward slashes. Every read of a checkpoint goes
through its store, so nothing above this room knows a path, a file descriptor or a link. A store promises:

- *a whole read or a named error*: ``read`` fills every buffer, or raises;
- *one version*: the store notes a file's size and version (`Stat`) when it first looks at it or reads it, and a later
  read of another version raises `SourceChangedError`; ``refuse_changes`` checks all of these files before a job
  publishes;
- *regular files only*: a FIFO, a device or a link that leads away is refused by name, and no call blocks.

Callers help a remote store in three ways: they ask for all ranges that they need at once (a slice of columns is one
``read`` of many ranges), they read from as many threads as ``at_once`` says, and they announce their reads (``ahead``).
A local store needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fp8ckpt.errors import StorageError

Bytes = npt.NDArray[np.uint8]  # flat and contiguous

_PIECE = 8 << 20  # bytes


class Stat(NamedTuple):
    """The ``size`` of a file in bytes, and a ``version`` that changes when the file is written again."""

    size: int
    version: str


class ByteRange(NamedTuple):
    """Bytes ``[start, stop)`` of a file of a store."""

    file: str
    start: int
    stop: int


class Store(Protocol):
    """The files below one place. Thread-safe."""

    @property
    def where(self) -> str:
        """The place, as messages show it."""

    @property
    def path(self) -> Path | None:
        """The directory that holds the files, if it is on this machine."""

    @property
    def at_once(self) -> int:
        """The number of concurrent reads that is faster than one read after another."""

    def files(self) -> Mapping[str, Stat]:
        """Every file by its name. A lookup takes the file's version, and raises `StorageError` for what is not a
        regular file.
        """

    def read(self, wanted: Sequence[ByteRange], out: Sequence[Bytes]) -> None:
        """Fill each buffer with its range, which has the buffer's length.

        Raises `StorageError`, `TruncatedFileError` or `SourceChangedError`; the contents of the buffers are then
        undefined.
        """

    def ahead(self, reads: Iterable[Sequence[ByteRange]]) -> AbstractContextManager[object]:
        """Announce ``reads``, which follow inside the context roughly in this order; a remote store fetches some in
        advance. Each item is what one region needs. Any thread may advance the iterator, which is advanced as reads
        happen.
        """

    def refuse_changes(self) -> None:
        """Raise `SourceChangedError` if a file that was looked at or read has changed since."""


class Files(Mapping[str, Stat]):
    """The files of a store that looks at a file only on demand: ``names`` lists them, ``look`` looks at one."""

    def __init__(self, names: Callable[[], Iterable[str]], look: Callable[[str], Stat | None]) -> None:
        self._names = names
        self._look = look

    def __getitem__(self, name: str) -> Stat:
        if (found := self._look(name)) is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class File(NamedTuple):
    """One file of a store."""

    store: Store
    name: str

    @property
    def stat(self) -> Stat:
        """The file's size and version. Raises `StorageError` if there is no such file."""
        found = self.store.files().get(self.name)
        if found is None:
            raise StorageError.of_absent(file=self.name)
        return found

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start`` on."""
        self.store.read([ByteRange(self.name, start, start + out.nbytes)], [out])

    def pieces(self) -> Iterator[Bytes]:
        """Yield all bytes of the file in order; each piece is valid until the next."""
        size = self.stat.size
        buffer = np.empty(min(size, _PIECE), np.uint8)
        for start in range(0, size, _PIECE):
            piece = buffer[: size - start]
            self.read(start, piece)
            yield piece


def same_bytes(a: File, b: File) -> bool:
    """Whether two files hold the same bytes."""
    if a.stat.size != b.stat.size:
        return False
    return all(np.array_equal(left, right) for left, right in zip(a.pieces(), b.pieces(), strict=True))
