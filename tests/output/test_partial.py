"""An output directory that is not seen until it is whole: fresh, resumed, refused, published."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from fp8ckpt.errors import OutputBusyError, OutputExistsError, ResumeMismatchError, StorageError
from fp8ckpt.output import goal as module
from fp8ckpt.output import state
from fp8ckpt.output.partial import PartialOutput, partial_of

PLAN = {"source": "abc", "dtype": "BF16", "sizes": [1, 2]}
NAMES = ("model.safetensors", "config.json", "assets")


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begun(destination: Path, plan: dict[str, object] | None = None) -> PartialOutput:
    output = PartialOutput(destination)
    output.begin(plan or PLAN, NAMES)
    return output


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything in a directory but the state's lock, with its bytes."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if path.name != "lock"
    }


def identity(path: Path) -> tuple[int, ...]:
    """What and which it is, and when it was changed; not when it was last looked at, which a link notes even when it is
    followed.
    """
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def test_where_it_is_written() -> None:
    """Beside the destination, under its own name, whatever dots that has."""
    assert partial_of(Path("a/b-1.5.bf16")) == Path("a/b-1.5.bf16.partial")


def test_a_fresh_output(destination: Path) -> None:
    """The directory and its state are created, nothing is recorded, and the destination is not there."""
    output = begun(destination)
    assert output.partial == partial_of(destination)
    assert output.directory.parent == output.partial
    assert output.directory.is_dir()
    assert output.records() == {}
    assert not destination.exists()
    output.release()


def test_parents_are_created(tmp_path: Path) -> None:
    """A destination deep in directories that are not there yet."""
    output = begun(tmp_path / "a" / "b" / "out")
    output.publish()
    output.release()
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_publish_shows_the_output_and_removes_the_state(destination: Path) -> None:
    """At the destination stands what was written and nothing else; the partial directory is gone."""
    output = begun(destination)
    (output.directory / "model.safetensors").write_bytes(b"weights")
    (output.directory / "assets").mkdir()
    (output.directory / "assets" / "a.txt").write_text("a")
    output.record(0, 0, {"n": 1})
    output.record(3, 1, {})
    output.publish()
    output.release()
    assert tree(destination) == {"model.safetensors": b"weights", "assets": None, "assets/a.txt": b"a"}
    assert not output.directory.exists()
    assert list(destination.parent.iterdir()) == [destination]


def test_records_survive_and_are_joined(destination: Path) -> None:
    """A later run reads what all writers recorded; of two records of an extent, a whole one remains."""
    first = begun(destination)
    first.record(0, 0, {"nan": 3})
    first.record(1, 7, {"nan": 0})
    first.record(0, 2, {})
    first.release()
    second = begun(destination)
    assert second.records() == {0: {"nan": 3}, 2: {}, 7: {"nan": 0}}
    second.record(0, 4, {"x": 2})
    assert set(second.records()) == {0, 2, 4, 7}
    second.release()


def test_a_resumed_output_keeps_its_files(destination: Path) -> None:
    """What is on disk already is left alone by the run that goes on."""
    first = begun(destination)
    (first.directory / "model.safetensors").write_bytes(b"half")
    first.record(0, 0, {})
    first.release()
    second = begun(destination)
    assert (second.directory / "model.safetensors").read_bytes() == b"half"
    assert set(second.records()) == {0}
    second.publish()
    second.release()
    assert tree(destination) == {"model.safetensors": b"half"}


def test_the_fingerprint_is_compared_by_value(destination: Path) -> None:
    """The order of its keys does not matter."""
    begun(destination).release()
    begun(destination, dict(reversed(PLAN.items()))).release()


@pytest.mark.parametrize(
    "plan", [{**PLAN, "dtype": "F16"}, {**PLAN, "more": 1}, {"source": "abc"}, {**PLAN, "sizes": [1, 3]}]
)
def test_another_fingerprint_is_refused(destination: Path, plan: dict[str, object]) -> None:
    """An output of something else is not touched, and the message says how to begin anew."""
    first = begun(destination)
    (first.directory / "model.safetensors").write_bytes(b"half")
    first.record(0, 0, {})
    first.release()
    before = tree(first.directory)
    second = PartialOutput(destination)
    with pytest.raises(ResumeMismatchError, match="to start again without the work of that run") as caught:
        second.begin(plan, NAMES)
    second.release()
    assert caught.value.file == str(partial_of(destination))
    assert tree(first.directory) == before
    begun(destination).release()


def test_a_strange_file_is_refused(destination: Path) -> None:
    """A partial directory that holds what this output does not have is somebody else's, and stays as it is."""
    begun(destination).release()
    (partial_of(destination) / "thesis.tex").write_text("keep me")
    before = tree(partial_of(destination))
    with pytest.raises(ResumeMismatchError, match=r"thesis\.tex"):
        begun(destination)
    assert tree(partial_of(destination)) == before


@pytest.mark.parametrize(
    "kind", ["folder", "folder of folders", "file", "link to a folder", "dangling link", "state is a file"]
)
def test_what_we_did_not_make_is_refused(destination: Path, kind: str) -> None:
    """Whatever stands at DST.partial without our state gets none, is not changed, and is not to be deleted."""
    partial, elsewhere = partial_of(destination), destination.parent / "elsewhere"
    if kind.startswith("folder") or kind == "state is a file":
        partial.mkdir()
    if kind == "folder":
        (partial / "notes.txt").write_text("mine")
    elif kind == "folder of folders":
        (partial / "output").mkdir()
    elif kind == "state is a file":
        (partial / ".fp8ckpt").write_text("mine")
    elif kind == "file":
        partial.write_text("mine")
    else:
        partial.symlink_to(elsewhere)
        if kind == "link to a folder":
            begun(elsewhere).release()
            partial_of(elsewhere).rename(elsewhere)
    before = (identity(partial), tree(destination.parent))
    with pytest.raises(OutputExistsError, match="move it away") as caught:
        begun(destination)
    assert caught.value.file == str(partial)
    assert "delete" not in str(caught.value)
    assert (identity(partial), tree(destination.parent)) == before


@pytest.mark.parametrize("left", ["", ".fp8ckpt", ".fp8ckpt/lock"])
def test_what_a_run_leaves_that_ended_before_its_first_file(destination: Path, left: str) -> None:
    """An empty folder, and one that holds nothing but the beginning of our state, are taken up: nothing can be lost."""
    partial_of(destination).mkdir()
    if left:
        (partial_of(destination) / ".fp8ckpt").mkdir()
    if left.endswith("lock"):
        (partial_of(destination) / left).touch()
    output = begun(destination)
    output.publish()
    output.release()
    assert tree(destination) == {}


def test_state_that_outlived_the_rename(destination: Path) -> None:
    """A run that died between the rename and the end leaves state and nothing else: no record is believed."""
    first = begun(destination)
    first.record(0, 0, {})
    first.directory.rename(destination.parent / "elsewhere")
    first.release()
    second = begun(destination, {"source": "other"})
    assert second.records() == {}
    second.release()


def died_after_the_rename(destination: Path) -> Path:
    """A destination that is whole, and the state that a run left which died before its end."""
    first = begun(destination)
    first.record(0, 0, {})
    first.directory.rename(destination)
    first.release()
    return partial_of(destination) / ".fp8ckpt"


def test_state_beside_what_is_whole_is_tidied_up(destination: Path) -> None:
    """The next run for that destination is refused, whatever it wants, and the state is gone."""
    died_after_the_rename(destination)
    with pytest.raises(OutputExistsError):
        begun(destination, {"source": "other"})
    assert os.listdir(destination.parent) == ["out"]


def test_ranks_outlive_the_process_that_began(destination: Path) -> None:
    """None begins anew while one of them writes, or tells anybody to delete what is there; then none of them writes."""
    first = begun(destination)
    first.release()
    with first.taking_part(first.turn), first.taking_part(first.turn):
        for fingerprint in ({"source": "x"}, {"source": "other"}):
            with pytest.raises(OutputBusyError, match="another process is writing it"):
                begun(destination, fingerprint)
    second = begun(destination)
    with pytest.raises(OutputBusyError), first.taking_part(first.turn):
        pytest.fail("another run has begun")
    with second.taking_part(second.turn):
        second.release()


@pytest.mark.parametrize("what", ["held", "a file beside", "a file in it", "a folder in it", "a link in it"])
def test_what_is_not_tidied_up(destination: Path, what: str) -> None:
    """State that another process holds, and whatever is not all ours, stays as it is."""
    state = died_after_the_rename(destination)
    holder = PartialOutput(destination)
    if what == "held":
        holder._lock = holder.state.locked("lock")
    elif what == "a file beside":
        (state.parent / "thesis.tex").write_text("mine")
    elif what == "a file in it":
        (state / "thesis.tex").write_text("mine")
    elif what == "a folder in it":
        (state / "done-folder").mkdir()
    else:
        (state / "done-9").symlink_to(destination)
    before = tree(state.parent)
    with pytest.raises(OutputExistsError):
        begun(destination)
    assert tree(state.parent) == before
    holder.release()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_two_names_is_refused(destination: Path, name: str) -> None:
    """A file of the output that is linked to another one would be written by both names."""
    first = begun(destination)
    first.release()
    other = destination.parent / "precious"
    other.write_text("precious")
    os.link(other, first.directory / name)
    with pytest.raises(ResumeMismatchError, match=name):
        begun(destination)
    assert other.read_text() == "precious"


@pytest.mark.parametrize("torn", [b"{", b"", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_a_plan_that_cannot_be_read(destination: Path, torn: bytes) -> None:
    """A damaged state is refused by name, never taken for a match."""
    begun(destination).release()
    (partial_of(destination) / ".fp8ckpt" / "plan.json").write_bytes(torn)
    with pytest.raises(ResumeMismatchError, match="to start again without the work of that run"):
        begun(destination)


def test_an_output_without_a_plan_is_refused(destination: Path) -> None:
    """Files whose state is gone are of nobody knows what."""
    first = begun(destination)
    first.record(0, 0, {})
    first.release()
    (partial_of(destination) / ".fp8ckpt" / "plan.json").unlink()
    with pytest.raises(ResumeMismatchError, match="the record of what the run did is missing"):
        begun(destination)


def _hold(destination: Path, ready: multiprocessing.synchronize.Event, end: multiprocessing.synchronize.Event) -> None:
    output = PartialOutput(destination)
    output.begin(PLAN, NAMES)
    ready.set()
    end.wait(60)
    os._exit(1)  # a crash: the lock is never released by name


def test_another_process_holds_the_lock(destination: Path) -> None:
    """A second process is refused while the first lives, and goes on once that is dead."""
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(destination, ready, end))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(OutputBusyError, match="another process") as caught:
            begun(destination)
        assert caught.value.file == str(partial_of(destination))
        with pytest.raises(OutputBusyError, match="another process"):  # and is not told to delete it
            begun(destination, {**PLAN, "dtype": "F16"})
    finally:
        end.set()
        holder.join(60)
    begun(destination).release()


def test_the_lock_within_one_process(destination: Path) -> None:
    """Two outputs of one process do not share a destination either; release gives it up, and may be called twice."""
    first = begun(destination)
    with pytest.raises(OutputBusyError):
        begun(destination)
    first.release()
    first.release()
    begun(destination).release()


def test_a_refused_begin_gives_up_the_lock(destination: Path) -> None:
    """A begin that raises holds nothing, so that its caller has nothing to release."""
    begun(destination).release()
    with pytest.raises(ResumeMismatchError):
        begun(destination, {"x": 1})
    begun(destination).release()


@pytest.mark.parametrize("kind", ["directory", "full directory", "file", "link", "dangling link"])
def test_an_existing_destination_is_refused_untouched(destination: Path, kind: str) -> None:
    """Whatever stands at the destination, broken links included, is never replaced; no partial output is begun."""
    elsewhere = destination.parent / "elsewhere"
    if kind.endswith("directory"):
        destination.mkdir()
    if kind == "full directory":
        (destination / "a").write_text("a")
    if kind == "file":
        destination.write_text("f")
    if kind == "link":
        elsewhere.mkdir()
    if kind.endswith("link"):
        destination.symlink_to(elsewhere)
    before = (identity(destination), tree(destination.parent))
    with pytest.raises(OutputExistsError, match="the destination exists") as caught:
        begun(destination)
    assert isinstance(caught.value, FileExistsError)
    assert caught.value.file == str(destination)
    assert (identity(destination), tree(destination.parent)) == before


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_a_destination_that_appears_while_it_is_written(destination: Path, kind: str) -> None:
    """Publishing replaces nothing, not even an empty directory; the output stays resumable."""
    output = begun(destination)
    (output.directory / "model.safetensors").write_bytes(b"weights")
    if kind == "directory":
        destination.mkdir()
    elif kind == "file":
        destination.write_text("f")
    else:
        destination.symlink_to("nowhere")
    before = identity(destination)
    with pytest.raises(OutputExistsError):
        output.publish()
    output.release()
    assert identity(destination) == before
    assert (output.directory / "model.safetensors").read_bytes() == b"weights"
    destination.rmdir() if kind == "directory" else destination.unlink()
    again = begun(destination)
    again.publish()
    again.release()
    assert tree(destination) == {"model.safetensors": b"weights"}


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_record_that_was_cut_off(destination: Path, cut: int) -> None:
    """However much of the last record reached the disk: earlier ones hold, it does not, the next is not spoiled."""
    first = begun(destination)
    first.record(0, 5, {"nan": 1})
    records = partial_of(destination) / ".fp8ckpt" / "done-0"
    whole = records.read_bytes()
    first.record(0, 12, {"nan": 2})
    first.release()
    last = records.read_bytes()[len(whole) :]
    records.write_bytes(whole + last[: min(cut, len(last) - 3)])  # the brace and the newline are lost at least
    second = begun(destination)
    assert second.records() == {5: {"nan": 1}}
    second.record(0, 13, {"nan": 3})
    assert second.records() == {5: {"nan": 1}, 13: {"nan": 3}}
    second.release()


@pytest.mark.parametrize("junk", [
    b"\xff\xfe\n", b"[1]\n", b"7\n", b"{}\n", b'{"extent": [1], "facts": {}}\n', b'{"extent": 9}\n', b"\0\0\0\0",
    b"null\n", b"[" * 100_000 + b"\n",
])  # fmt: skip
def test_junk_among_the_records(destination: Path, junk: bytes) -> None:
    """What is no record is passed over: the extent is written again."""
    first = begun(destination)
    first.record(0, 1, {})
    with (partial_of(destination) / ".fp8ckpt" / "done-0").open("ab") as stream:
        stream.write(junk)
    first.record(0, 2, {})
    assert first.records() == {1: {}, 2: {}}
    first.release()


def test_records_of_many_threads(destination: Path) -> None:
    """Threads of one writer may record at once."""
    from concurrent.futures import ThreadPoolExecutor

    output = begun(destination)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: output.record(i % 2, i, {"square": i * i}), range(300)))
    assert output.records() == {i: {"square": i * i} for i in range(300)}
    output.release()


def test_all_is_flushed_before_the_rename(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directory of the output is flushed before it is renamed, and the parent after."""
    output = begun(destination)
    (output.directory / "assets" / "deep").mkdir(parents=True)
    flushed: list[tuple[Path, bool]] = []
    monkeypatch.setattr(module, "flush_directory", lambda directory: flushed.append((directory, destination.exists())))
    output.publish()
    output.release()
    before = {directory for directory, published in flushed if not published}
    assert before == {output.directory, output.directory / "assets", output.directory / "assets" / "deep"}
    assert (destination.parent, True) in flushed


def test_the_plan_is_never_half_written(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while the plan is written leaves no plan, and the next run begins anew."""
    write_whole = state.write_whole

    def torn(file: Path, data: bytes) -> None:
        write_whole(file, data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "write_whole", torn)
    output = PartialOutput(destination)
    with pytest.raises(KeyboardInterrupt):
        output.begin(PLAN, NAMES)
    output.release()
    monkeypatch.undo()
    again = begun(destination)
    assert json.loads((partial_of(destination) / ".fp8ckpt" / "plan.json").read_text()) == PLAN
    again.publish()
    again.release()
    assert tree(destination) == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    """A directory without permission is a StorageError."""
    tmp_path.chmod(0o555)
    with pytest.raises(StorageError, match="Permission denied"):
        begun(tmp_path / "out")
    tmp_path.chmod(0o755)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    """A destination below a file is a named error."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        begun(tmp_path / "file" / "out")


def test_a_parent_that_cannot_be_flushed(destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may be written and not read is refused before the first byte, not after the last."""

    def refuse(directory: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module, "flush_directory", refuse)
    with pytest.raises(StorageError, match="Permission denied; get the permission"):
        begun(destination)
    assert os.listdir(destination.parent) == []


def test_a_parent_that_is_a_link(tmp_path: Path) -> None:
    """What the user names is followed: the output is whole where it leads, and no error is raised after the rename."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    output = begun(tmp_path / "link" / "out")
    output.publish()
    output.release()
    assert os.listdir(tmp_path / "real") == ["out"]


def test_a_path_that_leaves_a_folder_that_is_none(tmp_path: Path) -> None:
    """No folder is made for being left again; where there is one, or a link to one, that is left."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    for given, place in (("none/../out", "out"), ("a/../out", "out"), ("link/../out", "a/out")):
        output = PartialOutput(tmp_path / given)
        assert (output.destination, output.partial) == (tmp_path / place, tmp_path / f"{place}.partial")
