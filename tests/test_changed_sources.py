"""A file that changes while it is read, or between two runs, is never mixed with what it was: nothing is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fp8ckpt.output.extents as writing
from fp8ckpt import FP8StorageReader, FP8StorageWriter, SafetensorsStorageWriter, convert, open_checkpoint, verify
from fp8ckpt.errors import Fp8CheckpointError, ResumeMismatchError, SourceChangedError
from fp8ckpt.output.files import OutputFile, copy_whole, create, open_to_write, write_whole
from fp8ckpt.stores.local import local_file
from tests.miniatures import families

INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
NAMES = [ONE, INDEX, "config.json", "assets/tokenizer.json"]


@pytest.fixture
def fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two files with an index and a side file; outputs are written in small pieces."""
    monkeypatch.setattr(writing, "CHUNK", 4096)
    monkeypatch.setattr(writing, "EXTENT", 4096)
    source = families()["per-tensor 0-d BF16"].write(tmp_path / "fp8")
    (source / "assets").mkdir()
    (source / "assets" / "tokenizer.json").write_text("{}")
    return source


def rewritten(file: Path) -> None:
    """Other bytes (the same in JSON), as many and with the same time: only the time of the change tells."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read()
        stream.seek(-1, os.SEEK_END)
        stream.write(last if file.suffix == ".json" else bytes([last[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """Another file under the same name, of the same size and time."""
    before = file.stat()
    other = file.with_name("other")
    shutil.copyfile(file, other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


def grown(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b" ")


def removed(file: Path) -> None:
    file.unlink()


CHANGES = [rewritten, replaced, grown, removed]


def once(step: Callable[[], None]) -> Callable[..., None]:
    """A progress that takes the step at the first piece written."""
    todo = [step]
    return lambda *_: todo.pop()() if todo else None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_changes_during_a_conversion(fp8: Path, name: str, change: Callable[[Path], None]) -> None:
    """Whichever file it is, and though size and time are kept: a named error, and nothing is left of the output."""
    with pytest.raises(SourceChangedError, match="it changed after it was opened") as error:
        convert(fp8, fp8.parent / "out", workers=1, progress=once(lambda: change(fp8 / name)))
    assert (error.value.file, error.value.remedy) == (name, "run it again when nothing writes to the file any more")
    assert os.listdir(fp8.parent) == ["fp8"]


@pytest.mark.parametrize("side", ["source", "base"])
@pytest.mark.parametrize("name", [ONE, "config.json"])
def test_either_side_of_a_conversion_back(fp8: Path, side: str, name: str) -> None:
    """The same to FP8, of the source and of the base."""
    convert(fp8, fp8.parent / "bf16")
    file = (fp8 if side == "base" else fp8.parent / "bf16") / name
    with pytest.raises(SourceChangedError, match=name):
        convert(
            fp8.parent / "bf16", fp8.parent / "out", to="fp8", like=fp8, workers=1,
            progress=once(lambda: rewritten(file)),
        )  # fmt: skip
    assert sorted(os.listdir(fp8.parent)) == ["bf16", "fp8"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_changes_between_two_runs(fp8: Path, name: str, change: Callable[[Path], None]) -> None:
    """What was begun of a file that is no longer the same is not taken up, and the message names the file."""
    out = fp8.parent / "out"
    left = stopped(fp8, out)
    change(fp8 / name)
    with pytest.raises(Fp8CheckpointError) as error:
        convert(fp8, out)
    if change in (rewritten, replaced):
        assert isinstance(error.value, ResumeMismatchError)
        assert f"{name}, which it is made from, has changed since" in str(error.value)
        assert f"delete {out}.partial to start again" in str(error.value)
    assert sorted(os.listdir(fp8.parent)) == ["fp8", "out.partial"]
    assert left == set((fp8.parent / "out.partial").rglob("*"))


def stopped(source: Path, out: Path) -> set[Path]:
    """Begin a conversion and stop it at its second piece; returns what it left."""
    pieces = count()

    def stop(*_: Any) -> None:
        if next(pieces):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, workers=1, progress=stop)
    return set(out.with_name("out.partial").rglob("*"))


def test_nothing_changed(fp8: Path) -> None:
    """Reading a file, and a new one that nobody asked for yet, are no change: what was begun is gone on with."""
    out = fp8.parent / "out"
    stopped(fp8, out)
    assert verify(fp8).ok
    (fp8 / ".cache").mkdir()
    assert convert(fp8, out).bytes_resumed > 0


def test_a_load_of_a_source_that_changes(fp8: Path) -> None:
    """A state dict is not said to be loaded from a file that was written to meanwhile."""
    reader = FP8StorageReader(fp8)
    checkpoint = reader.checkpoint
    name = next(iter(checkpoint.tensors))
    rewritten(fp8 / ONE)
    state = {name: torch.zeros(checkpoint[name].shape, dtype=torch.bfloat16)}
    with pytest.raises(BaseException, match="SourceChangedError"):
        dcp.load(state, storage_reader=reader)


@pytest.mark.parametrize(
    ("writer", "name"),
    [(FP8StorageWriter, ONE), (FP8StorageWriter, "assets/tokenizer.json"), (SafetensorsStorageWriter, ONE)],
)
def test_a_base_that_changes_during_a_save(fp8: Path, writer: Any, name: str) -> None:
    """A save in a base's layout publishes nothing once the base is another."""
    base = open_checkpoint(fp8)
    state = {tensor: base.read(tensor) for tensor in base.tensors}
    storage = writer(fp8.parent / "out", like=base)
    write = storage.write_data

    def changing(*arguments: Any) -> Any:
        done = write(*arguments)
        rewritten(fp8 / name)
        return done

    storage.write_data = changing
    with pytest.raises(BaseException, match=f"SourceChangedError: {name}"):
        dcp.save(state, storage_writer=storage, no_dist=True)
    assert os.listdir(fp8.parent) == ["fp8"]


# ---------------------------------------------------------------- links, where an output is written


@pytest.mark.parametrize("write", [
    OutputFile,
    open_to_write,
    lambda file: create(file, 10),
    lambda file: write_whole(file, b"ours"),
    lambda file: copy_whole(local_file(Path(__file__)), file),
], ids=["OutputFile", "open_to_write", "create", "write_whole", "copy_whole"])  # fmt: skip
@pytest.mark.parametrize("kind", ["link", "broken link", "FIFO", "folder"])
def test_no_output_is_written_through_a_link(tmp_path: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Whatever stands in the place of an output file and is no file is refused by name, and not followed."""
    victim, file = tmp_path / "victim", tmp_path / "config.json"
    victim.write_text("mine")
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(Fp8CheckpointError, match=r"config\.json: "):
        write(file)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "victim"]


@pytest.mark.parametrize(
    "place", ["", ".fp8ckpt", "output", "output/assets", "output/config.json", ".fp8ckpt/plan.json"]
)
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_a_partial_output_with_a_link(fp8: Path, place: str, kind: str) -> None:
    """The partial output itself, its folders and its files: a link in their place is refused, and its end untouched."""
    out, partial = fp8.parent / "out", fp8.parent / "out.partial"
    stopped(fp8, out)
    spoiled, kept = partial / place, fp8.parent / "kept"
    shutil.move(spoiled, kept)
    if kind == "link":
        spoiled.symlink_to(kept)
    else:
        os.mkfifo(spoiled)
    before = {file: file.lstat().st_mtime_ns for file in kept.rglob("*")}, kept.lstat().st_mtime_ns
    with pytest.raises(Fp8CheckpointError, match=r"out\.partial"):
        convert(fp8, out)
    assert before == ({file: file.lstat().st_mtime_ns for file in kept.rglob("*")}, kept.lstat().st_mtime_ns)
    assert not out.exists()
