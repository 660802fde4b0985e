"""A conversion that is cut off, at any moment, for any reason, is finished by the same command with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fp8ckpt import convert, sample
from fp8ckpt.cli import main
from fp8ckpt.errors import (
    Fp8CheckpointError,
    NoRoomError,
    OutputExistsError,
    ResumeMismatchError,
    SourceChangedError,
    StorageError,
    TruncatedFileError,
)
from fp8ckpt.output.forecast import Room
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.output.state import Facts
from tests.campaign.trial import digests
from tests.conftest import Run
from tests.stopping import run_until
from tests.support import cut

GOES_ON = "the same command continues from there"


@pytest.fixture(scope="module")
def expected(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of an undisturbed conversion of the miniature."""
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(sample_fp8, out)
    return digests(out)


def test_resumed_run_writes_only_what_is_missing(
    sample_fp8: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a SIGKILL, bytes_resumed is what was on disk, and the rest, no more, is written."""
    out = tmp_path / "out"
    assert run_until("record", 5, signal.SIGKILL, "convert", sample_fp8, out, "--workers", "1").returncode < 0
    written = []
    pwrite = os.pwrite

    def counted(fd: int, data: Any, offset: int) -> int:
        written.append(pwrite(fd, data, offset))
        return written[-1]

    cut(monkeypatch)
    monkeypatch.setattr(os, "pwrite", counted)
    seen: list[tuple[int, int]] = []
    result = convert(sample_fp8, out, progress=lambda done, total, doing: seen.append((done, total)))
    assert 4 * 4 * 4096 < result.bytes_resumed <= 5 * 4 * 4096
    assert sum(written) == result.bytes_written - result.bytes_resumed
    assert seen[-1] == (sum(written), sum(written))
    assert digests(out) == expected


def test_resumed_command_says_so(
    sample_fp8: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C: exit 130, and one line on resuming; the rerun says what was there, and ends with equal bytes."""
    out = tmp_path / "out"
    stopped = run_until("record", 2, signal.SIGINT, "convert", sample_fp8, out, "--workers", "1")
    assert (stopped.returncode, stopped.stdout) == (130, "")
    assert stopped.stderr == f"fp8ckpt: interrupted; what was written is in {out}.partial, and {GOES_ON}\n"
    assert os.listdir(tmp_path) == ["out.partial"]
    cut(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["fp8ckpt", "convert", str(sample_fp8), str(out)])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert "were there from an earlier run" in capsys.readouterr().out
    assert digests(out) == expected


def test_nan_codes_of_an_earlier_run_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The summary of a resumed run counts the NaN codes of all runs."""
    from tests.test_convert import SCALE, WEIGHT, Family, Stored, np, scalar

    cut(monkeypatch, 4096, 1)
    codes = Stored.codes(np.full((100, 200), 0x7F, np.uint8))
    source = Family({WEIGHT: codes, SCALE: scalar(1)}, {}, {WEIGHT: (SCALE, (100, 200))}).write(tmp_path / "fp8")
    fail_after(monkeypatch, "pwrite", 5, errno.EIO)
    with pytest.raises(StorageError):
        convert(source, tmp_path / "out", workers=1)
    monkeypatch.undo()
    cut(monkeypatch, 4096, 1)
    result = convert(source, tmp_path / "out")
    assert result.bytes_resumed > 0
    assert result.nan_codes == {WEIGHT: 20_000}


@pytest.fixture
def begun(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A copy of the miniature, and a DST whose partial output holds some of its conversion."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    (source / "assets").mkdir()
    (source / "assets/a.txt").write_text("a")
    cut(monkeypatch)
    with monkeypatch.context() as patch:
        fail_after(patch, "pwrite", 20, errno.EIO)
        with pytest.raises(StorageError):
            convert(source, tmp_path / "out", workers=1)
    return source, tmp_path / "out"


def fail_after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int, code: int, only: str = "") -> None:
    """Let so many calls of a function of os pass (of those on files whose name holds ``only``), then fail all."""
    real = getattr(os, name)
    left = calls

    def failing(fd: int, *rest: Any) -> Any:
        nonlocal left
        if only in Path(f"/proc/self/fd/{fd}").readlink().name:
            left -= 1
            if left < 0:
                raise OSError(code, os.strerror(code))
        return real(fd, *rest)

    monkeypatch.setattr(os, name, failing)


def assert_refused_untouched(source: Path, out: Path, match: str, **arguments: Any) -> None:
    """A rerun is refused, and not one file is made, changed or removed."""
    left = out.with_name("out.partial")
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in left.rglob("*")}
    content = digests(left)
    with pytest.raises(ResumeMismatchError, match=match) as refused:
        convert(source, out, **arguments)
    assert "delete" in str(refused.value) or "move it away" in str(refused.value)
    assert str(left) in str(refused.value)
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in left.rglob("*")} == before
    assert digests(left) == content
    assert not out.exists()


def test_partial_output_is_resumable(begun: tuple[Path, Path], expected: dict[str, str]) -> None:
    """What the refusals below start from would be taken up if nothing had changed."""
    source, out = begun
    result = convert(source, out)
    assert result.bytes_resumed > 0
    assert {name: digest for name, digest in digests(out).items() if name != "assets/a.txt"} == expected


@pytest.mark.parametrize(
    "kind", ["touched", "a byte of a weight", "a tensor renamed", "config", "scale", "side file gone"]
)
def test_changed_source_is_refused(kind: str, begun: tuple[Path, Path]) -> None:
    """Another source than the one that the partial output is of: refused, nothing touched."""
    source, out = begun
    file = min(source.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    if kind == "touched":
        os.utime(file)
    elif kind in ("a byte of a weight", "scale"):
        at = len(raw) - 1 if kind == "scale" else len(raw) // 2
        raw[at] ^= 1
        file.write_bytes(raw)
    elif kind == "a tensor renamed":
        for changed in (file, source / "model.safetensors.index.json"):
            changed.write_bytes(changed.read_bytes().replace(b"embed_tokens", b"embed_tokenz"))
    elif kind == "side file gone":
        (source / "README.md").unlink()
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    matches = {"side file gone": "README", "a tensor renamed": "another source", "config": "another source"}
    assert_refused_untouched(source, out, matches.get(kind, f"{file.name}, which it is made from, has changed since"))


@pytest.mark.parametrize("name", ["more.txt", "README.md", "assets/a.txt"])
def test_side_files_are_of_the_same_source(name: str, begun: tuple[Path, Path]) -> None:
    """A side file that was added or changed since then makes it another source: tokenizers go with their weights."""
    source, out = begun
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("changed")
    assert_refused_untouched(source, out, f"{name}, which it is made from, has changed since")


@pytest.mark.parametrize("to", ["fp16", "fp32"])
def test_other_target_dtype_is_refused(to: str, begun: tuple[Path, Path]) -> None:
    """A partial bf16 output is not continued as another dtype."""
    assert_refused_untouched(*begun, "another source, target dtype", to=to)


@pytest.mark.parametrize("stray", ["notes.txt", "model-00009-of-00009.safetensors", ".hidden", "folder/file"])
def test_stray_file_in_the_partial_output_is_refused(stray: str, begun: tuple[Path, Path]) -> None:
    """What the finished directory would not have is not published and not deleted."""
    source, out = begun
    for folder in ("out.partial", "out.partial/output", "out.partial/.fp8ckpt"):
        file = out.parent / folder / stray
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
        assert_refused_untouched(source, out, stray.split("/")[0].replace(".", r"\."))
        file.unlink()
        if "/" in stray:
            file.parent.rmdir()


def test_stray_file_in_a_folder_of_the_partial_output_is_not_published(begun: tuple[Path, Path]) -> None:
    """A side file that the source has lost since then is not in the output, in sub-folders neither."""
    source, out = begun
    (source / "assets/a.txt").rename(source / "assets/b.txt")
    with suppress(ResumeMismatchError):  # to refuse is as good
        convert(source, out)
        assert sorted(os.listdir(out / "assets")) == ["b.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "{}"])
def test_damaged_state_is_refused(text: str, begun: tuple[Path, Path]) -> None:
    """A plan that cannot be read, or is no plan, is refused."""
    source, out = begun
    (out.with_name("out.partial") / ".fp8ckpt/plan.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused_untouched(source, out, "the record of what the run did cannot be read|another source")


@pytest.mark.parametrize(
    "torn", [b"\n{", b'\n{"extent": 1', b"\n5\n", b"\n[]\n", b'\n{"extent": 1}\n', b"\n\xff\n", b"\n{}\n", b'\n"x"\n']
)
def test_torn_record_is_written_again(torn: bytes, begun: tuple[Path, Path]) -> None:
    """The last line of the records may be cut off anywhere: its extent is written again."""
    source, out = begun
    record = out.with_name("out.partial") / ".fp8ckpt/done-0"
    whole = record.read_bytes()
    record.write_bytes(whole + torn)
    convert(source, out)
    convert(source, out.with_name("again"))
    assert digests(out) == digests(out.with_name("again"))


@pytest.mark.parametrize("change", ["removed", "shorter", "longer"])
def test_records_of_files_that_are_not_there_are_not_believed(change: str, begun: tuple[Path, Path]) -> None:
    """A file of the output that was removed or cut since then is written again, all of it."""
    source, out = begun
    file = min((out.with_name("out.partial") / "output").glob("*.safetensors"))
    file.unlink() if change == "removed" else os.truncate(
        file, file.stat().st_size + {"shorter": -1, "longer": 1}[change]
    )
    assert convert(source, out).bytes_resumed == 0
    convert(source, out.with_name("again"))
    assert digests(out) == digests(out.with_name("again"))


def test_partial_output_of_a_sample_is_refused(
    sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial output of another job is not taken up."""
    with monkeypatch.context() as patch:
        fail_after(patch, "pwrite", 3, errno.ENOSPC)
        with pytest.raises(StorageError):
            sample(tmp_path / "out")
    assert_refused_untouched(sample_fp8, tmp_path / "out", "another source")


def test_partial_output_that_is_a_file(sample_fp8: Path, tmp_path: Path, cli: Run) -> None:
    """Something else stands where the partial output would be: refused with one line, and left."""
    (tmp_path / "out.partial").write_text("mine")
    done = cli("convert", sample_fp8, tmp_path / "out")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert (tmp_path / "out.partial").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out.partial"]


def test_destination_that_appears_meanwhile_is_left(sample_fp8: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """A DST that someone else makes during the run is not replaced, even if empty; once gone, a rerun ends well."""
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError):
        convert(sample_fp8, out, progress=lambda done, total, doing: out.mkdir(exist_ok=True))
    assert os.listdir(out) == []
    out.rmdir()
    convert(sample_fp8, out)
    assert digests(out) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00003-of-00003.safetensors", "stray"])
def test_output_that_others_change_meanwhile(
    name: str, sample_fp8: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """A file that is removed, cut or added after all was written: nothing is published, and a rerun ends well."""
    file = tmp_path / "out.partial" / "output" / name

    def change(done: int, total: int, doing: str) -> None:
        if done == total:
            file.unlink() if name.startswith("tokenizer") else file.open("ab").truncate(5)

    with pytest.raises(Fp8CheckpointError, match=r"No such file|expected [0-9]+ bytes|it holds stray"):
        convert(sample_fp8, tmp_path / "out", progress=change, workers=1)
    assert os.listdir(tmp_path) == ["out.partial"]
    (tmp_path / "out.partial" / "output" / "stray").unlink(missing_ok=True)
    convert(sample_fp8, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("calls", [0, 1, 7, 20])
def test_full_disk(
    calls: int, sample_fp8: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC after some writes: a named error that says how to go on, no DST, and a rerun ends with the same bytes."""
    cut(monkeypatch, 32 << 10, 2)
    with monkeypatch.context() as patch:
        fail_after(patch, "pwrite", calls, errno.ENOSPC)
        with pytest.raises(StorageError, match=r"out\.partial, and the same command continues") as caught:
            convert(sample_fp8, tmp_path / "out", workers=2)
    assert "writing failed: No space left on device; free some space" in str(caught.value)
    assert os.listdir(tmp_path) == ["out.partial"]
    convert(sample_fp8, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["ftruncate", "fdatasync", "fsync"])
def test_disk_that_refuses_other_calls(
    name: str, sample_fp8: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes or flushes the disk may fail, and is a named error; a rerun ends with the same bytes."""
    calls = 0
    while not (tmp_path / "out").exists():
        with monkeypatch.context() as patch:
            fail_after(patch, name, calls, errno.EDQUOT)
            with suppress(StorageError):
                convert(sample_fp8, tmp_path / "out", workers=1)
        calls += 1
    assert calls > 2
    # The flush after the rename may fail when DST is whole.
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("calls", [0, 1, 30])
def test_read_error(
    calls: int, sample_fp8: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO on the source after some reads: a named error with the file, no DST; a rerun ends with the same bytes."""
    cut(monkeypatch, 32 << 10, 2)
    reads = count_scale_reads(sample_fp8, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        fail_after(patch, "preadv", reads + calls, errno.EIO, only=".safetensors")
        with pytest.raises(
            StorageError, match=r"model-.*safetensors: reading at byte \d+ failed: Input/output error"
        ) as caught:
            convert(sample_fp8, tmp_path / "out", workers=1)
    assert GOES_ON in str(caught.value)
    assert os.listdir(tmp_path) == ["out.partial"]
    convert(sample_fp8, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def count_scale_reads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many reads come before the first byte is written."""
    before = 0
    preadv, pwrite = os.preadv, os.pwrite
    writing = False

    def counted_preadv(fd: int, *rest: Any) -> int:
        nonlocal before
        before += not writing
        return preadv(fd, *rest)

    def noted_pwrite(fd: int, *rest: Any) -> int:
        nonlocal writing
        writing = True
        return pwrite(fd, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counted_preadv)
        patch.setattr(os, "pwrite", noted_pwrite)
        convert(source, tmp_path / "dry", workers=1)
    shutil.rmtree(tmp_path / "dry")
    return before


def test_source_truncated_during_the_run(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that shrinks while it is read is a named error; no DST appears, and nothing is taken up later."""
    cut(monkeypatch)
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    file = max(source.glob("*.safetensors"))
    whole = file.read_bytes()
    with pytest.raises(SourceChangedError, match=f"{file.name}: it changed after it was opened"):
        convert(source, tmp_path / "out", workers=1, progress=lambda *_: os.truncate(file, len(whole) // 2))
    assert os.listdir(tmp_path) == ["fp8"]
    with pytest.raises(TruncatedFileError, match="the file holds"):
        convert(source, tmp_path / "out")
    file.write_bytes(whole)
    assert convert(source, tmp_path / "out").bytes_resumed == 0


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in ("fp8ckpt: ", *parts):
        assert part in done.stderr


def test_file_size_limit(sample_fp8: Path, expected: dict[str, str], tmp_path: Path, cli: Run) -> None:
    """With a limit of the kernel on file sizes: exit 1, one line, no DST; the rerun without it ends well."""
    command = shlex.join([sys.executable, "-m", "fp8ckpt", "convert", str(sample_fp8), str(tmp_path / "out")])
    limited = ["bash", "-c", f"ulimit -f 64; exec {command}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert_one_line(done, "File too large", f"{tmp_path}/out.partial", GOES_ON)
    assert os.listdir(tmp_path) == ["out.partial"]
    assert cli("convert", sample_fp8, tmp_path / "out").returncode == 0
    assert digests(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, less than the output takes."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mounted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"no file system can be mounted here ({done.stderr.strip()}); "
            "test_file_size_limit has the kernel refuse instead"
        )
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_disk_that_is_really_too_small(sample_fp8: Path, expected: dict[str, str], small_disk: Path, cli: Run) -> None:
    """A disk of 1 MiB: exit 1, one line, nothing made; --plan prints figures. Once it is larger, all goes well."""
    out = small_disk / "out"
    planned = cli("convert", sample_fp8, out, "--plan")
    assert (planned.returncode, planned.stderr) == (1, "")
    assert f"on the disk of {small_disk}: 1.2 MB needed, 1.0 MB free: there is no room" in planned.stdout
    assert_one_line(cli("convert", sample_fp8, out), f"{small_disk.name}: the output needs", "free some space")
    assert os.listdir(small_disk) == []
    subprocess.run(["mount", "-o", "remount,size=16m,ro", str(small_disk)], check=True)
    assert_one_line(cli("convert", sample_fp8, out, "--plan"), "Read-only file system", "choose a place")
    page = cli("convert", sample_fp8, small_disk.parent / "other", "--report-html", small_disk / "page.html")
    assert_one_line(page, "Read-only file system", "choose a place")
    assert not (small_disk.parent / "other").exists()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert cli("convert", sample_fp8, out, "--plan").returncode == 0
    assert os.listdir(small_disk) == []
    assert cli("convert", sample_fp8, out).returncode == 0
    assert digests(out) == expected


def test_disk_that_fills_up_meanwhile(sample_fp8: Path, expected: dict[str, str], small_disk: Path) -> None:
    """Somebody else takes the room after it was looked for: a named error, and a rerun says what it lacks, or ends."""
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    out, other = small_disk / "out", small_disk / "other"
    begin = OutputPlan.begin

    def crowded(plan: OutputPlan, output: PartialOutput, *written: object) -> dict[int, Facts]:
        other.write_bytes(bytes(1 << 20))
        return begin(plan, output, *written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputPlan, "_look", lambda *_: Room(small_disk, 0, None))
        patch.setattr(OutputPlan, "begin", crowded)
        with pytest.raises(StorageError, match=rf"No space left on device; free some space.*{GOES_ON}"):
            convert(sample_fp8, out)
    with pytest.raises(NoRoomError, match=rf"needs [\d,]+ bytes more.*{GOES_ON}"):
        convert(sample_fp8, out)
    assert sorted(os.listdir(small_disk)) == ["other", "out.partial"]
    other.unlink()
    convert(sample_fp8, out)
    assert digests(out) == expected
