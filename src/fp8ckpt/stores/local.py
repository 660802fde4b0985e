"""A local directory as a store.

Anything but a regular file is refused by name, and opening never blocks. A link is followed only if it ends inside the
directory, or among the blobs of the hub cache that the directory is a snapshot of (``snapshots/REV/x ->
../../blobs/HASH``). The directory itself may be given as a link.
"""

from __future__ import annotations

import errno
import os
import stat as modes
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from fp8ckpt.errors import SourceChangedError, StorageError, TruncatedFileError
from fp8ckpt.stores.address import local_path
from fp8ckpt.stores.store import ByteRange, Bytes, File, Files, Stat, Store
from fp8ckpt.system import MOST_AT_ONCE, read_at

_TO_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
_FOREIGN_FOLDERS = (".git", ".cache")  # of the tools that fetched a checkpoint, not of the checkpoint
_MOST_OPEN = 16  # files
_MOST_BUFFERS = 1000  # of one system call; the system's own limit is 1024
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_KINDS = {
    modes.S_IFIFO: "a FIFO", modes.S_IFSOCK: "a socket", modes.S_IFCHR: "a device", modes.S_IFBLK: "a device",
    modes.S_IFDIR: "a folder", modes.S_IFLNK: "a link",
}  # fmt: skip


class LocalStore:
    """The files below ``directory``; ``named``: a file that the user named, which may be a link to anywhere.

    Listing skips ``.git`` and ``.cache``, and raises `StorageError` for a folder that cannot be listed.
    """

    def __init__(self, directory: str | Path, named: str | None = None) -> None:
        self.directory = Path(directory)
        self._named = named
        self._root = os.path.realpath(directory)  # so that a change of the working directory does not change the store
        self._blobs = _blobs_beside(self._root)
        self._seen: dict[str, _Identity] = {}

    at_once = 1

    @property
    def where(self) -> str:
        """The directory, as it was given."""
        return str(self.directory)

    @property
    def path(self) -> Path:
        """The same."""
        return self.directory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalStore) and self._root == other._root

    def __hash__(self) -> int:
        return hash(self._root)

    def __reduce__(self) -> tuple[Any, ...]:  # another process opens its own files, of the same versions
        return _restored, (self.directory, self._named, self._seen)

    def files(self) -> Mapping[str, Stat]:
        """As `fp8ckpt.stores.store.Store.files`; a file is looked at when it is looked up."""
        return Files(self._names, self._look)

    def read(self, wanted: Sequence[ByteRange], out: Sequence[Bytes]) -> None:
        """As `fp8ckpt.stores.store.Store.read`. Consecutive ranges of a file take one system call."""
        i, last, descriptor = 0, None, None
        while i < len(wanted):
            file, start, stop = wanted[i]
            k = i + 1
            while k < len(wanted) and k - i < _MOST_BUFFERS:
                following, begin, end = wanted[k]
                if begin != stop or following != file:
                    break
                stop = end
                k += 1
            if descriptor is None or file != last:
                last, descriptor = file, self._descriptor(file)
            try:
                whole = read_at(descriptor.fd, [part.data for part in out[i:k]], start) == stop - start
            except OSError:
                whole = False  # _read_slowly() will meet it again, and name it
            if not whole:
                for part, buffer in zip(wanted[i:k], out[i:k], strict=True):
                    _read_slowly(descriptor.fd, part, buffer)
            i = k

    def ahead(self, reads: Iterable[Sequence[ByteRange]]) -> AbstractContextManager[object]:
        """As `fp8ckpt.stores.store.Store.ahead`: does nothing, since the operating system reads ahead by itself."""
        return nullcontext()

    def refuse_changes(self) -> None:
        for name, seen in list(self._seen.items()):
            try:
                now = _identity(os.lstat(self._real(name)))
            except OSError:
                raise SourceChangedError.of(file=name) from None
            if now != seen:
                raise SourceChangedError.of(file=name)

    def _look(self, name: str) -> Stat | None:
        """The size and version of a file, as first seen; None if there is nothing of that name."""
        if not self._has(name):
            return None
        with self._naming(name):
            stat = os.lstat(self._real(name))
        refuse_irregular(stat, name)
        size, mtime, ctime, inode, _ = self._first_seen(name, stat)
        return Stat(size, f"{mtime}.{ctime}.{inode}")  # the device number may change on a restart

    def _has(self, name: str) -> bool:
        """Whether there is anything of that name, including a broken link."""
        try:
            os.lstat(self._path(name))
        except OSError as error:
            if error.errno in ABSENT:
                return False
            raise StorageError.of_reading(error, name) from error
        except ValueError:  # a name that no file can have
            return False
        return True

    def _names(self, folder: str = "") -> Iterator[str]:
        """Yield every file, in order; links to folders are listed, and not followed."""
        try:
            with os.scandir(self._path(folder)) as entries:
                found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            raise StorageError.of_reading(error, folder or self.where, "cannot be listed") from error
        for name, is_folder in found:
            if not is_folder:
                yield folder + name
            elif name not in _FOREIGN_FOLDERS:
                yield from self._names(f"{folder}{name}/")

    def _path(self, name: str) -> str:
        return os.path.join(self._root, name)  # noqa: PTH118 - Path is slow, and this is done for every file

    def _real(self, name: str) -> str:
        """The path that a name leads to. Raises `OSError` if it leads nowhere, and `StorageError` if it leads away."""
        path = self._path(name)
        if "/" not in name and modes.S_ISREG(os.lstat(path).st_mode):  # not a link, and in the directory itself
            return path
        real = os.path.realpath(path, strict=True)
        if real == path or name == self._named or Path(real).is_relative_to(self._root):
            return real
        if self._blobs is not None and Path(real).is_relative_to(self._blobs):
            return real
        raise StorageError.of_link(file=name)

    def _descriptor(self, name: str) -> _Descriptor:
        key = self._path(name), name == self._named
        if (found := _OPEN.get(key)) is None:
            with self._naming(name):
                found = _Descriptor(open_to_read(self._real(name), name))
            _OPEN.add(key, found)
        self._first_seen(name, os.fstat(found.fd))
        return found

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            if error.errno in ABSENT and name in self._seen:
                raise SourceChangedError.of(file=name) from error
            nowhere = error.errno == errno.ENOENT and self._has(name)
            failed = "it is a broken link" if nowhere else "cannot be opened"
            raise StorageError.of_reading(error, name, failed) from error

    def _first_seen(self, name: str, stat: os.stat_result) -> _Identity:
        """The file's identity. Raises `SourceChangedError` if it differs from the one first seen."""
        now = _identity(stat)
        if self._seen.setdefault(name, now) != now:
            raise SourceChangedError.of(file=name)
        return now


def local_file(path: Path) -> File:
    """A file that the user named. Raises `UnsupportedStoreError` for the URL of a store."""
    path = local_path(path)
    return File(LocalStore(path.parent, path.name), path.name)


@contextmanager
def local_copy(store: Store, names: Sequence[str]) -> Iterator[Path]:
    """Yield a directory with those of the files ``names`` that exist: the store's own, or a temporary one."""
    if store.path is not None:
        yield store.path
        return
    with tempfile.TemporaryDirectory(prefix="fp8ckpt-") as folder:
        for name in store.files().keys() & set(names):
            Path(folder, name).write_bytes(b"".join(piece.tobytes() for piece in File(store, name).pieces()))
        yield Path(folder)


def open_to_read(file: str | Path, name: str) -> int:
    """Return a descriptor for reading a regular file, which the caller closes. Never blocks; follows no link.

    Raises `OSError`, and `StorageError` for anything but a regular file, under its ``name``.
    """
    refuse_irregular(os.lstat(file), name)  # before opening, which may already affect a device
    fd = os.open(file, _TO_READ)
    try:
        refuse_irregular(os.fstat(fd), name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_irregular(stat: os.stat_result, name: str) -> None:
    """Raise `StorageError` for anything but a regular file: a FIFO, a socket, a device, a folder, a link."""
    if not modes.S_ISREG(stat.st_mode):
        raise StorageError.of_kind(file=name, kind=_KINDS.get(modes.S_IFMT(stat.st_mode), "no file"))


def read_whole(file: Path) -> bytes:
    """The bytes of a small file of our own. Raises `OSError`, and `StorageError` for anything but a regular file."""
    with open(open_to_read(file, file.name), "rb") as stream:
        return stream.read()


class _Descriptor:
    """An open file, closed when nothing uses it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._close = os.close  # still there at interpreter exit

    def __del__(self) -> None:
        self._close(self.fd)


_Key = tuple[str, bool]  # a path, and whether it was followed because the user named it


class _OpenFiles:
    """Files that stay open while a job asks for it (`kept_open`). Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs = 0
        self._files: OrderedDict[_Key, _Descriptor] = OrderedDict()

    def get(self, key: _Key) -> _Descriptor | None:
        with self._lock:
            if (found := self._files.get(key)) is not None:
                self._files.move_to_end(key)
            return found

    def add(self, key: _Key, file: _Descriptor) -> None:
        with self._lock:
            if self._jobs:
                self._files[key] = file
            if len(self._files) > _MOST_OPEN:
                self._files.popitem(last=False)  # closed once no thread reads it

    def count(self, jobs: int) -> None:
        with self._lock:
            self._jobs += jobs
            if not self._jobs:
                self._files.clear()


_OPEN = _OpenFiles()


@contextmanager
def kept_open() -> Iterator[None]:
    """Keep a few files open between reads while a job lasts, and close them after it. Also a decorator."""
    _OPEN.count(1)
    try:
        yield
    finally:
        _OPEN.count(-1)


_Identity = tuple[int, int, int, int, int]


def _identity(stat: os.stat_result) -> _Identity:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _restored(directory: Path, named: str | None, seen: dict[str, _Identity]) -> LocalStore:
    store = LocalStore(directory, named)
    store._seen.update(seen)
    return store


def _blobs_beside(root: str) -> str | None:
    """The blobs of the hub cache that a directory is a snapshot of, or is in a snapshot of."""
    for folder in (Path(root), *Path(root).parents):
        if folder.parent.name == "snapshots":
            return os.path.realpath(folder.parent.parent / "blobs")
    return None


def _read_slowly(fd: int, part: ByteRange, buffer: Bytes) -> None:
    """Fill one buffer, in as many system calls as it takes."""
    view = buffer.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        at = part.start + done
        try:
            count = read_at(fd, [view[done : done + MOST_AT_ONCE]], at)
        except OSError as error:
            raise StorageError.of_reading(error, part.file, f"reading at byte {at} failed") from error
        if count == 0:
            raise TruncatedFileError.of_end(file=part.file, end=at, least=part.stop)
        done += count
