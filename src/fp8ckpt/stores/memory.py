"""A store in memory: for tests, which count what is read from it, and for planned files, which have no bytes yet."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from fp8ckpt.errors import SourceChangedError, StorageError, TruncatedFileError
from fp8ckpt.stores.store import ByteRange, Bytes, Files, Stat


class MemoryStore:
    """Files by name in ``contents``, which a test may change; ``reads`` records every range that was requested."""

    where = "memory"
    path = None
    at_once = 1

    def __init__(self, contents: Mapping[str, bytes] | None = None) -> None:
        self.contents = dict(contents or {})
        self.reads: list[ByteRange] = []
        self._seen: dict[str, Stat] = {}

    def files(self) -> Mapping[str, Stat]:
        return Files(lambda: sorted(self.contents), self._look)

    def read(self, wanted: Sequence[ByteRange], out: Sequence[Bytes]) -> None:
        for part, buffer in zip(wanted, out, strict=True):
            self.reads.append(part)
            if part.file not in self.contents and part.file not in self._seen:
                raise StorageError.of_reading(FileNotFoundError(errno.ENOENT, "there is no such file"), part.file)
            self._refuse_change(part.file)
            data = self.contents[part.file][part.start : part.stop]
            if len(data) < buffer.nbytes:
                raise TruncatedFileError.of_end(file=part.file, end=part.start + len(data), least=part.stop)
            buffer[:] = np.frombuffer(data, np.uint8)

    def ahead(self, reads: Iterable[Sequence[ByteRange]]) -> AbstractContextManager[object]:
        return nullcontext()

    def refuse_changes(self) -> None:
        for name in self._seen:
            self._refuse_change(name)

    def _look(self, name: str) -> Stat | None:
        return self._seen.setdefault(name, self._now(name)) if name in self.contents else None

    def _refuse_change(self, name: str) -> None:
        if name not in self.contents or self._seen.setdefault(name, self._now(name)) != self._now(name):
            raise SourceChangedError.of(file=name)

    def _now(self, name: str) -> Stat:
        data = self.contents[name]
        return Stat(len(data), hashlib.sha256(data).hexdigest())


#: The store of the files of an output that is only planned.
PLANNED = MemoryStore()
