"""A remote store: an object store, the Hub, a web server. Its client makes one request at a time (`Objects`);
everything else is here.

- *One version.* The listing gives each object's size and ETag (or blob id), and every request is for that version. If
  the object has changed, the request raises `SourceChangedError`; versions are never mixed.
- *Few requests, many at once.* Consecutive ranges of one read are joined into requests of at most 16 MiB. A gap between
  them is read and thrown away where that is cheaper than another request: up to 128 KiB, which takes about as long as a
  request costs while many are in flight. So a slice of columns reads at most the span of its strips. Ranges of
  different reads are joined by another rule (`fp8ckpt.stores.ahead`).
- *Nothing twice.* Before a job announces its reads, a short range is read together with the block of 128 KiB around it,
  which is kept: headers, configurations, scales, and the norms between them, are read several times.
- *A whole read or a named error.* A request that breaks (5xx, a reset, a short body, a stall, another range than
  requested) is retried from the byte at which it broke, after growing pauses, or those that the server asks for. After
  `ATTEMPTS` without progress, the error names store, object, range and attempt.
- *No secrets.* Messages show the URL without user, password and query, and say in our own words what a client met.

Bytes go straight into the caller's buffers, and bytes of gaps take no memory.
"""

from __future__ import annotations

import random
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from fp8ckpt.errors import SourceChangedError, StorageError, TruncatedFileError
from fp8ckpt.stores.ahead import Request, Wanted, Window, joined
from fp8ckpt.stores.shared import Shared, reads_over
from fp8ckpt.stores.store import ByteRange, Bytes, Files, Stat
from fp8ckpt.stores.unlogged import THREADS, unlogged

T = TypeVar("T")
wait = time.sleep

AT_ONCE = 32  # requests
ATTEMPTS = 8
ATTEMPTS_TO_LIST = 4  # a user who mistyped a host waits for all of them
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 16.0  # seconds
_MOST_PATIENT = 300.0  # seconds; the longest pause that a server may ask for: the Hub counts over five minutes
_PROGRESS = 64 << 10  # bytes; an attempt that brought as many is not counted
TIMEOUT = 30.0  # seconds without a byte are a stall
_BLOCK, _MOST_BLOCKS = 128 << 10, 256  # bytes of a block, and the number of blocks that are kept
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_FOREIGN_FOLDERS = (".git/", ".cache/")  # of the tools that fetched a checkpoint, not of the checkpoint


class Broken(Exception):
    """A request that failed, or ended early, and may succeed when it is made again. The message holds no secrets;
    ``remedy``: what to do if it never succeeds; ``after``: seconds to wait, if the server asks for that.
    """

    def __init__(self, found: str, remedy: str | None = None, *, after: str | None = None) -> None:
        super().__init__(found)
        self.remedy = remedy or "check that the store answers, and run it again"
        self.after = min(float(after), _MOST_PATIENT) if after and after.isdigit() else 0.0
        self.brought = 0  # bytes, before it failed


def refuse_other_range(said: str | None, start: int, stop: int, name: str, stat: Stat) -> None:
    """Check the ``Content-Range`` of an answer against the request; an answer may be shorter.

    Raises `Broken` if it is another range, or none, and `SourceChangedError` if the object has another size.
    """
    match = _CONTENT_RANGE.fullmatch(said or "")
    if match is None:
        raise Broken("the answer is not a range", "fetch the files, or read them where ranges are served")
    first, last, size = match.groups()
    if size not in (str(stat.size), "*"):
        raise SourceChangedError.of(file=name)
    if int(first) != start or int(last) >= stop:
        raise Broken(f"the answer is of bytes {first}-{last}")


def stat_of(where: str, name: str, size: object, version: str) -> Stat:
    """The size and version that a store gives for a file. Raises `StorageError` if one is missing."""
    if not version or not str(size).isdigit():
        raise StorageError.of_version(file=name, where=where)
    return Stat(int(str(size)), version)


_PLACE = "check the URL, the endpoint (AWS_ENDPOINT_URL, HF_ENDPOINT) and this machine's network"
_MET = {
    "NameResolutionError": ("the host name cannot be resolved", _PLACE),
    "NewConnectionError": ("the host does not answer", _PLACE),
    "ConnectError": ("the host does not answer", _PLACE),  # huggingface_hub's client is not more specific
    "ProxyError": ("the proxy does not answer", "check HTTPS_PROXY and NO_PROXY"),
    "SSLError": ("the server does not speak https there", "check whether the URL should begin with http://"),
}


def met(error: BaseException, where: str) -> Exception:
    """Return the error for what a client met, in our own words: the client's text may hold a secret."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError.of_certificate(file=where)
    kind = type(error).__name__
    return Broken(*_MET.get(kind, (f"the answer is incomplete ({kind})",)))


class Objects(Protocol):
    """The client of one kind of store. Thread-safe; each call is one attempt."""

    @property
    def where(self) -> str:
        """The place as messages show it: no user, no password, no query."""

    def list(self) -> Mapping[str, Stat]:
        """Every object below the place. Raises `Broken`, `CheckpointNotFoundError` or `StorageError`."""

    def get(self, name: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        """Yield the bytes ``[start, stop)`` of that version, in pieces; may end early.

        Raises `Broken`, `SourceChangedError` if the object now has another version, and `StorageError`.
        """


class RemoteStore:
    """The objects below one place; ``pause`` waits for a number of seconds before a retry."""

    at_once = AT_ONCE
    path = None

    def __init__(self, objects: Objects, pause: Callable[[float], None] | None = None) -> None:
        self._objects = objects
        self._pause = pause
        self._lock = threading.Lock()
        self._listing: dict[str, Stat] | None = None
        self._looked_at: set[str] = set()
        self._files = Files(self._listed, self._look)
        self._windows: list[Window] = []
        self._blocks: dict[tuple[str, int], Bytes] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._shared = Shared.of_this_job()

    @property
    def where(self) -> str:
        """The URL, without secrets."""
        return self._objects.where

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.where)

    def _key(self) -> object:  # includes what `where` does not show of the URL
        return self._objects.__reduce__()

    def __reduce__(self) -> tuple[Any, ...]:  # another process makes its own connections, to the same versions
        return _restored, (self._objects, self._listing)

    def files(self) -> Mapping[str, Stat]:
        """As `fp8ckpt.stores.store.Store.files`; the store is listed once, and versions are those of that time."""
        self._listed()
        return self._files

    def _listed(self) -> dict[str, Stat]:
        with self._lock:
            if self._listing is None:
                self._listing = self._list()
            return self._listing

    def _look(self, name: str) -> Stat | None:
        self._looked_at.add(name)
        return self._listed().get(name)

    def read(self, wanted: Sequence[ByteRange], out: Sequence[Bytes]) -> None:
        """As `fp8ckpt.stores.store.Store.read`; what was announced by `ahead` is taken from what was fetched."""
        left: Iterable[tuple[ByteRange, Bytes]] = self._take_known(zip(wanted, out, strict=True))
        for window in tuple(self._windows):
            left = window.take(left)
        requests = list(_requests(left))
        if len(requests) == 1:
            self._fetch_or_keep(requests[0])
        elif requests:
            futures = [self.submit(self._fetch_or_keep, request) for request in requests]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:  # no thread writes into a buffer after this returns
                    future.cancel()
                    if not future.cancelled():
                        future.exception()

    def ahead(self, reads: Iterable[Sequence[ByteRange]]) -> AbstractContextManager[object]:
        return Window(self, self._windows, ([part for part in read if self._known(part) is None] for read in reads))

    def _known(self, part: ByteRange) -> Bytes | None:
        """The bytes of a range that lies in a block that is kept, or None."""
        number, at = divmod(part.start, _BLOCK)
        block, end = self._blocks.get((part.file, number)), at + part.stop - part.start
        return None if block is None or end > block.size else block[at:end]

    def _take_known(self, reads: Iterable[tuple[ByteRange, Bytes]]) -> Iterator[tuple[ByteRange, Bytes]]:
        for part, buffer in reads:
            known = self._known(part)
            if known is None:
                yield part, buffer
            else:
                buffer[:] = known

    def _fetch_or_keep(self, request: Request) -> None:
        """Fetch a request; if it lies in one block, fetch and keep the whole block, while there is room."""
        number = request.start // _BLOCK
        start = number * _BLOCK
        stat = self.files().get(request.file)
        full = self._windows or len(self._blocks) >= _MOST_BLOCKS
        if full or stat is None or request.stop > min(stat.size, start + _BLOCK):
            self.fetch(request)
            return
        block = np.empty(min(_BLOCK, stat.size - start), np.uint8)
        self.fetch(Request(request.file, start, start + block.size, [(start, block)]))
        for at, buffer in request.parts:
            buffer[:] = block[at - start :][: buffer.size]
        self._blocks[request.file, number] = block

    def refuse_changes(self) -> None:
        """As `fp8ckpt.stores.store.Store.refuse_changes`: the store is listed again."""
        now, seen = self._list(), self._listed()
        for name in sorted(self._looked_at & seen.keys()):
            if now.get(name) != seen[name]:
                raise SourceChangedError.of(file=name)

    def submit(self, step: Callable[[T], None], item: T) -> Future[None]:
        """Run a step in one of the threads that wait for requests."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(AT_ONCE, THREADS)
            return self._pool.submit(step, item)

    def fetch(self, request: Request) -> None:
        """Fill the buffers of a request, in as many attempts as it takes."""
        stat = self.files().get(request.file)
        if stat is None:
            raise StorageError.of_no_object(file=request.file, where=self.where)
        if request.stop > stat.size:
            raise TruncatedFileError.of_listed_end(file=request.file, end=stat.size, least=request.stop)
        if self._shared is not None and reads_over(request):
            self._shared.fetch(request, f"{self.where} {stat.version}", stat.size, partial(self._fetch, stat))
        else:
            self._fetch(stat, request)

    def _fetch(self, stat: Stat, request: Request) -> None:
        filling = _Filling(request)

        def attempt() -> None:
            begun = filling.at
            try:
                for data in self._objects.get(request.file, begun, request.stop, stat):
                    filling.take(data)
                if filling.at < request.stop:
                    raise Broken(f"the body ended at byte {filling.at}")
            except Broken as error:
                error.brought = filling.at - begun
                raise

        what = f"bytes {request.start}-{request.stop - 1} of {self.where}"
        attempted(attempt, ATTEMPTS, f"reading {what}", request.file, self._pause)

    def _list(self) -> dict[str, Stat]:
        listing = attempted(self._objects.list, ATTEMPTS_TO_LIST, f"listing {self.where}", None, self._pause)
        return {name: listing[name] for name in sorted(listing) if not name.startswith(_FOREIGN_FOLDERS)}


def attempted(
    step: Callable[[], T], most: int, doing: str, file: str | None, pause: Callable[[float], None] | None = None
) -> T:
    """Return what ``step`` returns, retried at most ``most`` times without progress. Then raises `StorageError`, which
    says what was being done (``doing``).
    """
    count = 0
    while True:
        try:
            with unlogged():
                return step()
        except Broken as error:
            count = 1 if error.brought >= _PROGRESS else count + 1
            if count == most:
                raise StorageError.of_attempts(file=file, doing=doing, count=count, error=error) from None
            longest = min(_FIRST_PAUSE * 2 ** (count - 1), _LONGEST_PAUSE)
            pauses = longest * random.uniform(0.5, 1)  # or all ranks would repeat their requests at the same time
            (pause or wait)(max(pauses, error.after))


def _restored(objects: Objects, listing: dict[str, Stat] | None) -> RemoteStore:
    store = RemoteStore(objects)
    store._listing = listing
    return store


class _Filling:
    """The buffers of a request, filled as its bytes arrive."""

    def __init__(self, request: Request) -> None:
        self.at = request.start
        self._request = request
        self._starts = [start for start, _ in request.parts]

    def take(self, data: bytes) -> None:
        """Put the next bytes where they belong."""
        begin, end = self.at, self.at + len(data)
        if end > self._request.stop:
            raise Broken("the body is longer than what was asked for")
        bytes_ = np.frombuffer(data, np.uint8)
        for start, buffer in self._request.parts[max(0, bisect_right(self._starts, begin) - 1) :]:
            if start >= end:
                break
            low, high = max(start, begin), min(start + buffer.size, end)
            if low < high:
                buffer[low - start : high - start] = bytes_[low - begin : high - begin]
        self.at = end


def _requests(reads: Iterable[tuple[ByteRange, Bytes]]) -> Iterator[Request]:
    """Yield the requests of one read."""
    reads = [(wanted, buffer) for wanted, buffer in reads if buffer.size]
    buffers = (buffer for _, buffer in reads)
    room = np.empty(0, np.uint8)
    for group in joined(Wanted(*wanted, 0) for wanted, _ in reads):
        parts: list[tuple[int, Bytes]] = []
        for part in group:
            if not room.size:
                room = next(buffers)
            parts.append((part.start, room[: part.stop - part.start]))
            room = room[part.stop - part.start :]
        yield Request(group[0].file, group[0].start, group[-1].stop, parts)
