"""What every store promises: whole reads in any order, one version of each file, and nothing but files."""

from __future__ import annotations

import errno
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fp8ckpt import open_checkpoint
from fp8ckpt.errors import SourceChangedError, StorageError, TruncatedFileError
from fp8ckpt.stores.local import LocalStore, kept_open
from fp8ckpt.stores.memory import MemoryStore
from fp8ckpt.stores.store import ByteRange, File, Store, same_bytes
from tests.miniatures import families

CONTENTS = {"a": bytes(range(256)) * 20, "b/c": b"xyz", "empty": b""}
Spoil = Callable[[str, bytes | None], None]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Spoil]:
    """A store of `CONTENTS`, and a means of writing to a file of it, or of removing it."""
    if request.param == "memory":
        memory = MemoryStore(CONTENTS)

        def spoil(name: str, data: bytes | None) -> None:
            memory.contents.pop(name)
            if data is not None:
                memory.contents[name] = data

        return memory, spoil

    def write(name: str, data: bytes | None) -> None:
        file = tmp_path / "store" / name
        if data is None:
            file.unlink()
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    for name, data in CONTENTS.items():
        write(name, data)
    return LocalStore(tmp_path / "store"), write


def read(store: Store, ranges: list[tuple[str, int, int]]) -> list[bytes]:
    """These ranges, in one read."""
    out = [np.full(stop - start, 77, np.uint8) for _, start, stop in ranges]
    store.read([ByteRange(*part) for part in ranges], out)
    return [buffer.tobytes() for buffer in out]


def test_files_are_listed_with_their_sizes(store: tuple[Store, Spoil]) -> None:
    """Names are relative; a name that is not there is none."""
    files = store[0].files()
    assert {name: files[name].size for name in files} == {name: len(data) for name, data in CONTENTS.items()}
    assert files.get("absent") is None
    assert "a" in files


def test_ranges_are_read_in_any_order(store: tuple[Store, Spoil]) -> None:
    """Neighbours, overlaps, gaps, steps back, other files and empty ranges: each buffer gets its own bytes."""
    draw = random.Random(0)
    for _ in range(50):
        ranges = []
        for _ in range(draw.randint(0, 40)):
            name = draw.choice(list(CONTENTS))
            start = draw.randint(0, len(CONTENTS[name]))
            if ranges and ranges[-1][0] == name and draw.random() < 0.5:
                start = ranges[-1][2]
            ranges.append((name, start, draw.randint(start, len(CONTENTS[name]))))
        assert read(store[0], ranges) == [CONTENTS[name][start:stop] for name, start, stop in ranges]


def test_thousands_of_neighbours(store: tuple[Store, Spoil]) -> None:
    """More buffers than a system call takes."""
    ranges = [("a", i, i + 1) for i in range(len(CONTENTS["a"]))]
    assert b"".join(read(store[0], ranges)) == CONTENTS["a"]


@pytest.mark.parametrize("ranges", [[("a", 5119, 5121)], [("a", 0, 10), ("a", 10, 6000)], [("b/c", 3, 4)]])
def test_more_than_there_is(store: tuple[Store, Spoil], ranges: list[tuple[str, int, int]]) -> None:
    """A range beyond the end is a named error, never a short read."""
    with pytest.raises(TruncatedFileError, match="the file ends at byte") as caught:
        read(store[0], ranges)
    assert caught.value.file == ranges[-1][0]


def test_what_is_not_there(store: tuple[Store, Spoil]) -> None:
    """A file that is not there is a named error."""
    with pytest.raises(StorageError, match="absent"):
        read(store[0], [("absent", 0, 1)])
    with pytest.raises(StorageError, match="absent: there is no such file"):
        _ = File(store[0], "absent").stat


@pytest.mark.parametrize("seen_by", ["looking", "reading"])
@pytest.mark.parametrize("after", [b"other", CONTENTS["a"][::-1], None], ids=["size", "bytes", "removed"])
def test_a_file_that_changes(store: tuple[Store, Spoil], seen_by: str, after: bytes | None) -> None:
    """What was seen is what is read later, or nothing; other files are none of it."""
    files, spoil = store
    if seen_by == "looking":
        assert files.files()["a"]
    else:
        read(files, [("a", 0, 1)])
    files.refuse_changes()
    spoil("a", after)
    with pytest.raises(SourceChangedError, match="a: it changed after it was opened"):
        files.refuse_changes()
    with pytest.raises(SourceChangedError):
        read(files, [("a", 0, 1)])
    assert read(files, [("b/c", 0, 3)]) == [b"xyz"]


def test_a_change_before_anybody_looked(store: tuple[Store, Spoil]) -> None:
    """A file is what it is when it is first looked at."""
    files, spoil = store
    assert sorted(files.files()) == sorted(CONTENTS)
    spoil("a", b"other")
    assert read(files, [("a", 0, 5)]) == [b"other"]
    files.refuse_changes()


def test_same_bytes(store: tuple[Store, Spoil]) -> None:
    """Files are compared over stores."""
    other = MemoryStore({"x": CONTENTS["a"], "y": CONTENTS["a"][:-1] + b"!", "z": b""})
    a = File(store[0], "a")
    assert same_bytes(a, File(other, "x"))
    assert not same_bytes(a, File(other, "y"))
    assert not same_bytes(a, File(other, "z"))
    assert same_bytes(File(store[0], "empty"), File(other, "z"))


@pytest.mark.parametrize("name", ["block 128 ragged F32", "MXFP8 U8"])
def test_a_checkpoint_in_memory(tmp_path: Path, name: str) -> None:
    """A checkpoint opens from any store, and means the same."""
    family = families()[name]
    directory = family.write(tmp_path / "checkpoint")
    memory = MemoryStore({file.name: file.read_bytes() for file in directory.iterdir()})
    local, checkpoint = open_checkpoint(directory), open_checkpoint(memory)
    assert list(checkpoint.tensors) == list(local.tensors)
    for tensor in checkpoint.tensors:
        assert checkpoint.read(tensor).equal(local.read(tensor))


def test_a_local_store_in_another_process(tmp_path: Path) -> None:
    """A pickled store opens its own files, and knows what they were."""
    (tmp_path / "a").write_bytes(b"abc")
    store = LocalStore(tmp_path)
    assert read(store, [("a", 0, 3)]) == [b"abc"]
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert read(copy, [("a", 1, 2)]) == [b"b"]
    (tmp_path / "a").write_bytes(b"abd")
    with pytest.raises(SourceChangedError):
        read(pickle.loads(pickle.dumps(store)), [("a", 0, 3)])


def test_few_files_stay_open(tmp_path: Path) -> None:
    """A job on hundreds of files does not use up descriptors; between jobs no file is open: disks can be removed."""
    for i in range(100):
        (tmp_path / str(i)).write_bytes(bytes([i]))

    def held() -> int:
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum(link.startswith(str(tmp_path)) for link in links)

    store = LocalStore(tmp_path)
    with kept_open():
        for _ in range(2):
            assert read(store, [(str(i), 0, 1) for i in range(100)]) == [bytes([i]) for i in range(100)]
        assert 0 < held() <= 16
    assert held() == 0
    read(store, [("1", 0, 1)])
    assert held() == 0


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means what it meant when the store was made."""
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    store = LocalStore(".")
    monkeypatch.chdir("/")
    assert read(store, [("a", 0, 3)]) == [b"abc"]


REASONS = {
    errno.EIO: "check the disk",
    errno.EACCES: "get the permission to read it",
    errno.ESTALE: "the file was replaced on the file server: run it again",
    errno.ETIMEDOUT: "check that the file server answers, and run it again",
    errno.EMFILE: "raise the limit on open files",
    errno.ENODEV: "restore the file",
}


@pytest.mark.parametrize("code", REASONS)
@pytest.mark.parametrize("call", ["open", "lstat", "scandir", "preadv"])
def test_what_to_do_about_a_read_that_failed(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the operating system refuses, on whichever call: its reason, the file, and what helps."""
    (tmp_path / "a").write_bytes(b"abc")
    store = LocalStore(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    steps: dict[str, Callable[[], object]] = {
        "scandir": lambda: list(store.files()),
        "lstat": lambda: store.files()["a"],
    }
    read = partial(store.read, [ByteRange("a", 0, 3)], [np.empty(3, np.uint8)])
    with pytest.raises(StorageError) as caught:
        steps.get(call, read)()
    assert f"{os.strerror(code)}; {REASONS[code]}" in str(caught.value)
    assert caught.value.file == (str(tmp_path) if call == "scandir" else "a")


def test_a_path_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path below what may not be entered, or on a disk that fails, is not called missing."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(StorageError, match="Permission denied; get the permission to read it"):
        open_checkpoint(tmp_path / "model")
