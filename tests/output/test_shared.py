"""What is read is never written, by whatever name: every job refuses it by name, and touches nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from fp8ckpt import FP8StorageWriter, SafetensorsStorageWriter, convert, open_checkpoint, save_model
from fp8ckpt.checkpoint.storage_writer import SideFiles
from fp8ckpt.errors import OutputExistsError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Job = Callable[[Path, Path, Path], object]  # of what is read, what else is needed, and the destination


class Held(nn.Module):
    """A model of a checkpoint's own tensors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        checkpoint = open_checkpoint(path)
        self._tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}

    def state_dict(self, *arguments: object, **more: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self._tensors


def write(writer: FP8StorageWriter | SafetensorsStorageWriter, model: Path) -> None:
    """A plain ``dcp.save``, whose error is taken out of torch's."""
    try:
        save(Held(model).state_dict(), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        raise error.failures[0][0] from error


JOBS: dict[str, Job] = {
    "to bf16": lambda read, other, out: convert(read, out),
    "to fp8 like": lambda read, other, out: convert(other, out, to="fp8", like=read),
    "to fp8 like, from": lambda read, other, out: convert(read, out, to="fp8", like=other),
    "to fp8 by a scheme": lambda read, other, out: convert(read, out, to="fp8", scheme="block"),
    "save_model bf16": lambda read, other, out: save_model(Held(other), out, base=read),
    "save_model fp8": lambda read, other, out: save_model(Held(other), out, to="fp8", base=read),
    "FP8StorageWriter": lambda read, other, out: write(FP8StorageWriter(out, base=read), other),
    "SafetensorsStorageWriter": lambda read, other, out: write(
        SafetensorsStorageWriter(out, base=open_checkpoint(read)), other
    ),
    "side files": lambda read, other, out: write(
        SafetensorsStorageWriter(out, side_files=SideFiles(copies={"config.json": read / "config.json"})), other
    ),
}
PLAIN = ("to fp8 like, from", "to fp8 by a scheme")  # these read what is not FP8


@pytest.fixture
def mounts() -> Iterator[Callable[[Path, Path], Path]]:
    """Shows a directory by a second name, as containers do."""
    made: list[Path] = []

    def bind(directory: Path, name: Path) -> Path:
        name.mkdir()
        done = subprocess.run(["mount", "--bind", directory, name], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here ({done.stderr.strip()}); links are tested without")
        made.append(name)
        return name

    yield bind
    for name in made:
        subprocess.run(["umount", name], check=True)


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file by its path, with its inode and its bytes."""
    return {
        file.relative_to(directory).as_posix(): (file.stat().st_ino, file.read_bytes())
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def assert_refused(job: str, read: Path, other: Path, out: Path, tree: Path) -> None:
    """The error names what is in the way, and every file below ``tree`` is as it was."""
    before = contents(tree)
    with pytest.raises(OutputExistsError) as caught:
        JOBS[job](read, other, out)
    assert "delete" not in str(caught.value)
    assert contents(tree) == before


def copies(job: str, sample_fp8: Path, sample_bf16: Path, to: Path) -> tuple[Path, Path]:
    """What the job reads, copied to ``to``; and what else it needs."""
    read, other = (sample_bf16, sample_fp8) if job in PLAIN else (sample_fp8, sample_bf16)
    return Path(shutil.copytree(read, to)), other


@pytest.mark.parametrize(
    ("job", "name"),
    [(job, "itself") for job in JOBS]
    + [(job, name) for job in ("to bf16", "save_model fp8") for name in ("a link", "dots", "below", "linked files")],
)
def test_what_stands_at_the_partial_output(
    job: str, name: str, sample_fp8: Path, sample_bf16: Path, tmp_path: Path
) -> None:
    """The source or the base is ``DST.partial``, or lies in it, by its own name or another."""
    at = {"below": "model.partial/release", "linked files": "elsewhere"}.get(name, "model.partial")
    read, other = copies(job, sample_fp8, sample_bf16, tmp_path / at)
    if name == "a link":
        (tmp_path / "release").symlink_to(read)
        read = tmp_path / "release"
    elif name == "dots":
        (tmp_path / "folder").mkdir()
        read = tmp_path / "folder" / ".." / read.name
    elif name == "linked files":
        (tmp_path / "model.partial").mkdir()
        for file in read.iterdir():
            os.link(file, tmp_path / "model.partial" / file.name)
    assert_refused(job, read, other, tmp_path / "model", tmp_path)


@pytest.mark.parametrize("job", ["to bf16", "save_model fp8"])
@pytest.mark.parametrize("where", ["", "output"])
def test_what_is_ours_already(job: str, where: str, sample_fp8: Path, sample_bf16: Path, tmp_path: Path) -> None:
    """What is read lies in a partial output that would be taken up: of a run that was cut off, or made to look so."""
    read, other = copies(job, sample_fp8, sample_bf16, tmp_path / "model.partial" / where)
    (tmp_path / "model.partial/.fp8ckpt").mkdir()
    (tmp_path / "model.partial/.fp8ckpt/plan.json").write_text("{}")
    assert_refused(job, read, other, tmp_path / "model", tmp_path)


@pytest.mark.parametrize("job", ["to bf16", "save_model fp8"])
def test_bind_mounts(
    job: str, sample_fp8: Path, sample_bf16: Path, tmp_path: Path, mounts: Callable[[Path, Path], Path]
) -> None:
    """A directory that is mounted twice is one directory."""
    read, other = copies(job, sample_fp8, sample_bf16, tmp_path / "model.partial")
    seen = mounts(read, tmp_path / "seen")
    assert_refused(job, seen, other, tmp_path / "model", tmp_path / "model.partial")
    assert_refused(job, read, other, seen / "out", tmp_path / "model.partial")


@pytest.mark.parametrize(
    ("job", "name"),
    [(job, "inside") for job in JOBS if job != "side files"]
    + [("to bf16", name) for name in ("by a link", "by a link to the parent", "dots")],
)
def test_destination_inside_what_is_read(
    job: str, name: str, sample_fp8: Path, sample_bf16: Path, tmp_path: Path
) -> None:
    """Nothing is written into a checkpoint, by whatever name."""
    read, other = copies(job, sample_fp8, sample_bf16, tmp_path / "release")
    out = read / "out"
    if name == "by a link":
        (tmp_path / "link").symlink_to(read)
        out = tmp_path / "link/out"
    elif name == "by a link to the parent":
        (tmp_path / "link").symlink_to(tmp_path)
        out = tmp_path / "link/release/sub/out"
    elif name == "dots":
        out = tmp_path / "release/../release/out"
    assert_refused(job, read, other, out, tmp_path)


def test_links_that_go_round(sample_fp8: Path, tmp_path: Path) -> None:
    """A destination below a link to itself is a named error."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        convert(sample_fp8, tmp_path / "loop" / "out")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "", ".", "model.safetensors"])
def test_side_files_stay_below_the_directory(name: str, tmp_path: Path) -> None:
    """And each has a name of its own, which no file of weights has."""
    writer = SafetensorsStorageWriter(tmp_path / "out", side_files=SideFiles(texts={name: b"evil"}))
    with pytest.raises(CheckpointException, match="the path of one file below the directory"):
        save({"x": torch.ones(2)}, storage_writer=writer, no_dist=True)
    assert os.listdir(tmp_path) == []
