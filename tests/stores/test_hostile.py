"""What stands in a checkpoint's directory and is no file of it: refused by name, by every job, and nothing hangs."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp8ckpt import convert, inspect, open_checkpoint, verify
from fp8ckpt.errors import Fp8CheckpointError, StorageError
from fp8ckpt.output.side_files import side_files
from fp8ckpt.stores.local import LocalStore
from fp8ckpt.tensors.checkpoint import survey
from tests.miniatures import families

INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
READ = ["config.json", INDEX, ONE, "hf_quant_config.json", "unnamed.safetensors"]
SIDE = ["params.json", "tokenizer.json", "assets/readme.md"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound checkpoint of two files with an index, to be spoiled."""
    return families()["per-tensor 0-d BF16"].write(tmp_path / "fp8")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def _device(path: Path) -> None:
    if os.geteuid() == 0:
        os.mknod(path, 0o20666, os.makedev(1, 3))
    else:  # only root may make one; a link to one leads away
        path.symlink_to("/dev/null")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def _nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def _round(path: Path) -> None:
    path.symlink_to(path.name)


def _away(path: Path) -> None:
    victim = path.parents[2 if path.parent.name == "assets" else 1] / "secret"
    victim.write_text("{}")
    path.symlink_to(victim)


def _chain_away(path: Path) -> None:
    _away(path.with_name("step"))
    path.symlink_to("step")


KINDS = [_fifo, _socket, _device, _folder, _nowhere, _round, _away, _chain_away]


def put(source: Path, name: str, make: Callable[[Path], None]) -> None:
    """Make something in the place of a file."""
    file = source / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    make(file)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", READ)
def test_what_is_read_on_opening(source: Path, name: str, make: Callable[[Path], None]) -> None:
    """Weights, the index, configurations: opening says which it is, among all defects; inspect and verify do, too."""
    put(source, name, make)
    defects = survey(source).defects
    assert {defect.file for defect in defects if isinstance(defect, StorageError) or name in str(defect)} >= {name}
    assert name in {defect.file for defect in inspect(source).defects}
    assert not verify(source).ok
    with pytest.raises(Fp8CheckpointError):
        convert(source, source.parent / "out")
    assert "out" not in {path.name.removesuffix(".partial") for path in source.parent.iterdir()}


@pytest.mark.parametrize("make", [kind for kind in KINDS if kind is not _folder])
@pytest.mark.parametrize("name", SIDE)
def test_side_files(source: Path, name: str, make: Callable[[Path], None]) -> None:
    """What would be copied: refused before anything is written; `open_checkpoint`, which reads none of it, opens."""
    put(source, name, make)
    assert open_checkpoint(source).tensors
    with pytest.raises(StorageError) as caught:
        convert(source, source.parent / "out")
    assert caught.value.file in (name, name.replace(Path(name).name, "step"))
    with pytest.raises(StorageError):
        verify(source, source)
    assert "out" not in {path.name.removesuffix(".partial") for path in source.parent.iterdir()}


def test_a_linked_folder(source: Path) -> None:
    """A link to a folder is refused even where it ends inside: its files would be written twice."""
    (source / "assets").mkdir()
    (source / "assets" / "a").write_text("x")
    (source / "again").symlink_to("assets")
    with pytest.raises(StorageError, match="again: it is a folder"):
        side_files(open_checkpoint(source))


@pytest.mark.parametrize("make", [_fifo, _socket, _device, _nowhere, _round])
def test_the_file_that_was_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """The same of a single file that the user named."""
    make(tmp_path / "one.safetensors")
    with pytest.raises(StorageError, match=r"one\.safetensors"):
        open_checkpoint(tmp_path / "one.safetensors")


def test_links_inside_are_followed(source: Path) -> None:
    """To a file in the directory, from a subfolder, over several links, and by an absolute path."""
    before = {name: open_checkpoint(source).read(name) for name in open_checkpoint(source).tensors}
    (source / "blobs").mkdir()
    for name in (ONE, "config.json"):
        shutil.move(source / name, source / "blobs" / name)
        (source / f"{name}.step").symlink_to(f"blobs/../blobs/{name}")
        (source / name).symlink_to(f"{name}.step")
    (source / "blobs" / "absolute").symlink_to(source / "config.json")
    checkpoint = open_checkpoint(source)
    assert all(checkpoint.read(name).equal(value) for name, value in before.items())
    assert "blobs/absolute" in side_files(checkpoint)


def test_a_linked_directory_and_a_linked_single_file(source: Path, tmp_path: Path) -> None:
    """What the user names is followed wherever it leads: it is the user's own word."""
    (tmp_path / "link").symlink_to(source)
    assert open_checkpoint(tmp_path / "link").tensors
    assert side_files(open_checkpoint(tmp_path / "link")).keys() >= {"config.json"}
    single = families()["per-tensor 0-d BF16"].write(tmp_path / "single", files=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one.safetensors").symlink_to(single / "model.safetensors")
    assert open_checkpoint(tmp_path / "elsewhere" / "one.safetensors").tensors


def snapshot_of(source: Path, cache: Path) -> Path:
    """The directory in the layout of the hub's cache, with a subfolder."""
    blobs, snapshot = cache / "models--org--name" / "blobs", cache / "models--org--name" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (blobs / "side").write_text("x")
    (snapshot / "sub" / "side").symlink_to("../../../blobs/side")
    return snapshot


@pytest.mark.parametrize("given", ["itself", "a link to it", "through a linked cache", "blobs on another disk"])
def test_a_snapshot_of_the_hub_cache(source: Path, tmp_path: Path, given: str) -> None:
    """Links to the blobs of the same cache are followed, however the snapshot is reached."""
    snapshot = snapshot_of(source, tmp_path / "cache")
    if given == "a link to it":
        (tmp_path / "model").symlink_to(snapshot)
        snapshot = tmp_path / "model"
    elif given == "through a linked cache":
        (tmp_path / "other").symlink_to(tmp_path / "cache")
        snapshot = tmp_path / "other" / snapshot.relative_to(tmp_path / "cache")
    elif given == "blobs on another disk":
        blobs = tmp_path / "cache" / "models--org--name" / "blobs"
        shutil.move(blobs, tmp_path / "disk")
        blobs.symlink_to(tmp_path / "disk")
    assert verify(snapshot, source).tensor_differences == ()
    assert "sub/side" in side_files(open_checkpoint(snapshot))


@pytest.mark.parametrize("target", ["../../../models--other--name/blobs/0", "../../refs/main", "../4567/config.json"])
def test_a_snapshot_that_links_elsewhere(source: Path, tmp_path: Path, target: str) -> None:
    """Another model's blobs, other folders of the cache and other snapshots are not this snapshot's."""
    snapshot = snapshot_of(source, tmp_path / "cache")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    place = snapshot / target
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("{}")
    with pytest.raises(StorageError, match=r"config\.json: it is a link that leads out of the directory"):
        open_checkpoint(snapshot)


# ---------------------------------------------------------------- listing


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def bound_by_permissions(step: Callable[[], object]) -> object:
    """What a step returns or raises when a user takes it whom permissions bind: for root, a child that is nobody."""
    if os.geteuid():
        return _outcome(step)
    end, begin = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(begin, pickle.dumps(_outcome(step)))
        finally:
            os._exit(0)
    os.close(begin)
    with os.fdopen(end, "rb") as stream:
        outcome = stream.read()
    os.waitpid(child, 0)
    return pickle.loads(outcome)


def _outcome(step: Callable[[], object]) -> object:
    try:
        return step()
    except Exception as error:
        return error


@pytest.mark.parametrize("mode", [0o311, 0o000, 0o444])
@pytest.mark.parametrize("where", ["", "assets", "assets/deep"])
@pytest.mark.parametrize("job", ["inspect", "convert", "verify", "open"])
def test_a_folder_that_cannot_be_listed(readable: Path, where: str, mode: int, job: str) -> None:
    """Neither the directory nor a folder in it is passed over in silence: its files would be missing in the output."""
    source = families()["per-tensor 0-d BF16"].write(readable / "fp8")
    (source / "assets" / "deep").mkdir(parents=True)
    (source / "assets" / "deep" / "file").write_text("x")
    (source / where).chmod(mode)
    jobs: dict[str, Callable[[], object]] = {
        "inspect": lambda: str(inspect(source)),
        "verify": lambda: str(verify(source)),
        "open": lambda: str(open_checkpoint(source)),
        "convert": lambda: str(convert(source, readable / "out")),
    }
    outcome = bound_by_permissions(jobs[job])
    (source / where).chmod(0o755)
    if mode == 0o444 and where and job != "convert":  # what is in it can be listed, and nobody looks at it
        return
    assert "Permission denied" in str(outcome)
    assert isinstance(outcome, Fp8CheckpointError) or (mode == 0o444 and job in ("inspect", "verify"))
    assert mode == 0o444 or (where or "fp8") in str(outcome)
    assert sorted(os.listdir(readable)) == ["fp8"]


def test_a_file_that_cannot_be_read(readable: Path) -> None:
    """A tokenizer without permission is named before anything is written."""
    source = families()["per-tensor 0-d BF16"].write(readable / "fp8")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").chmod(0)
    readable.chmod(0o777)
    outcome = bound_by_permissions(lambda: convert(source, readable / "out"))
    assert isinstance(outcome, StorageError)
    assert "tokenizer.json: cannot be opened: Permission denied" in str(outcome)


def test_folders_of_other_tools_are_not_listed(source: Path) -> None:
    """Version control and download caches are not part of the checkpoint, whatever is in them."""
    for name in (".git", ".cache"):
        (source / name).mkdir()
        os.mkfifo(source / name / "pipe")
    assert not [name for name in LocalStore(source).files() if name.startswith(".")]
