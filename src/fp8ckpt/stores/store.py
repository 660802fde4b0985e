"""Who keeps bytes, and the one way to ask for them.

A `Store` is the files below one place: a local directory (`fp8ckpt.stores.local`), memory (`fp8ckpt.stores.memory`),
and whatever else implements three methods. Names are relative, with forward slashes. Everything that is read of a
checkpoint is read through its store, so nothing above this room knows a path, a descriptor or a link.

A store promises:

- *whole or a named error*: ``read`` fills every buffer, or raises;
- *one version*: what a file is (`Stat`) is taken when it is first looked at or read, and a later read of anything
  else is a `SourceChangedError`; ``refuse_changes`` looks again at all that was seen, before something is published;
- *nothing but files*: a FIFO, a device, a link that leads away are refused by name, and nothing blocks.

A store that is far away (`fp8ckpt.stores.remote`) stands behind the same methods. Callers help it by asking for all
that they need at once (a slice of columns is one ``read`` of many ranges), from as many threads as it says
(``at_once``), and by saying in advance what they will read (``ahead``). A near one has nothing to do with any of it.
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
    """What a file is: its ``size`` in bytes, and a ``version`` that is another one once it was written again."""

    size: int
    version: str


class ByteRange(NamedTuple):
    """Bytes ``[start, stop)`` of a file of a store."""

    file: str
    start: int
    stop: int


class Store(Protocol):
    """The files below one place. For any number of threads."""

    @property
    def where(self) -> str:
        """The place, as messages show it."""

    @property
    def path(self) -> Path | None:
        """The directory, where the files are those of one on this machine."""

    @property
    def at_once(self) -> int:
        """How many reads at once are done sooner than one after the other."""

    def files(self) -> Mapping[str, Stat]:
        """Every file by its name. Looking one up takes its version, and raises `StorageError` for what is no file."""

    def read(self, wanted: Sequence[ByteRange], out: Sequence[Bytes]) -> None:
        """Fill each buffer with its range, which is as long.

        Raises `StorageError`, `TruncatedFileError` or `SourceChangedError`; the buffers then hold anything.
        """

    def ahead(self, reads: Iterable[Sequence[ByteRange]]) -> AbstractContextManager[object]:
        """While the context lasts, these will be read, about in this order: a store that is far away fetches some of
        them before they are asked for. Each is what one region needs; ``reads`` is taken from as it goes, by any
        thread.
        """

    def refuse_changes(self) -> None:
        """Raise `SourceChangedError` if a file that was looked at or read is no longer what it was."""


class Files(Mapping[str, Stat]):
    """The files of a store that looks only when it is asked: ``names`` lists them, ``look`` looks at one."""

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
        """What the file is. Raises `StorageError` where there is none."""
        found = self.store.files().get(self.name)
        if found is None:
            raise StorageError.of_absent(self.name)
        return found

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start`` on."""
        self.store.read([ByteRange(self.name, start, start + out.nbytes)], [out])

    def pieces(self) -> Iterator[Bytes]:
        """All bytes of the file in order, each piece good until the next."""
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
