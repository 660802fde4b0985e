"""What a job will take is known before its first byte: it is what it then takes, and where there is no room, nothing is
made.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fp8ckpt import Forecast, convert, plan_convert, plan_sample, report, sample
from fp8ckpt.convert import Fp8Result
from fp8ckpt.errors import Fp8CheckpointError, NoRoomError, OutputExistsError, ResumeMismatchError, StorageError
from fp8ckpt.output import forecast as module
from fp8ckpt.sample import DeepseekSizes
from tests.output.test_shared import JOBS, PLAIN, contents
from tests.support import cut
from tests.test_resume import fail_after

pytestmark = pytest.mark.filterwarnings("ignore")


def free(monkeypatch: pytest.MonkeyPatch, count: int, *, tells: bool = True) -> None:
    """Have every file system say that so many bytes are free in it; or have it say nothing."""
    real = os.statvfs

    def said(path: Path) -> os.statvfs_result:
        found = list(real(path))
        found[0:5] = [4096, 4096, 1 << 40 if tells else 0, count, count]
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", said)


BOTH_WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"to": "fp32"},
    "like": {"to": "fp8"},
    "like, fresh, without a report": {"to": "fp8", "scales": "fresh", "report": False},
    "scheme": {"to": "fp8", "scheme": "block"},
}


def arguments(kind: str, sample_fp8: Path, sample_bf16: Path) -> tuple[Path, dict[str, Any]]:
    """The source of a conversion, and how it is converted."""
    given = dict(BOTH_WAYS[kind])
    if kind.startswith("like"):
        given["like"] = sample_fp8
    return (sample_bf16 if "to" in given and given["to"] == "fp8" else sample_fp8), given


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_what_was_planned_is_what_is_done(
    kind: str, resumed: bool, sample_fp8: Path, sample_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, bytes read, written and there already; planning changes nothing, of a fresh output and of one cut off."""
    cut(monkeypatch, 16 << 10, 2)
    source, how = arguments(kind, sample_fp8, sample_bf16)
    if resumed:
        with monkeypatch.context() as patch:
            fail_after(patch, "pwrite", 20, errno.EIO)
            with pytest.raises(StorageError):
                convert(source, tmp_path / "out", **how, workers=1)
    before = contents(tmp_path)
    planned = plan_convert(source, tmp_path / "out", **how)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["out.partial"] * resumed
    done = convert(source, tmp_path / "out", **how)
    sizes = {file: file.stat().st_size for file in (tmp_path / "out").rglob("*")}
    weights = sum(size for file, size in sizes.items() if file.suffix == ".safetensors")
    copied = planned.bytes_to_write + planned.bytes_resumed - weights
    assert planned.files == len(sizes) == done.files
    assert planned.bytes_to_write == sum(sizes.values()) - planned.bytes_resumed
    assert planned.bytes_resumed == done.bytes_resumed
    assert bool(planned.bytes_resumed) == resumed
    read = done.bytes_read + (done.base_bytes_read if isinstance(done, Fp8Result) else 0)
    assert 0 <= planned.bytes_to_read - read <= copied
    assert planned.notes == done.notes
    assert planned.fits


@pytest.mark.parametrize("given", [{}, {"sizes": DeepseekSizes(), "files": 1}, {"sparse": True}])
def test_a_planned_sample(given: dict[str, Any], tmp_path: Path) -> None:
    """What a sample takes, holes left out."""
    planned = plan_sample(tmp_path / "out", **given)
    assert os.listdir(tmp_path) == []
    files = list(sample(tmp_path / "out", **given).rglob("*"))
    assert planned.files == len(files)
    size, on_disk = (
        sum(count) for count in zip(*((s.st_size, s.st_blocks * 512) for s in map(os.stat, files)), strict=True)
    )
    assert planned.bytes_to_write == size if "sparse" not in given else planned.bytes_to_write < size / 2
    assert planned.bytes_needed <= on_disk


def to_write(plan: Forecast) -> int:
    """Blocks of 4096 bytes that are needed."""
    return -(-plan.bytes_needed // 4096)


REFUSED: dict[str, Callable[[Path, Path, Path], object]] = {
    **JOBS,
    "sample": lambda read, other, out: sample(out),
    "report": lambda read, other, out: report(read, output=out),
}


@pytest.mark.parametrize("job", REFUSED)
def test_no_room(
    job: str, sample_fp8: Path, sample_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job that writes: a named error with what is needed, what is free and where; nothing is made."""
    read, other = (sample_bf16, sample_fp8) if job in PLAIN else (sample_fp8, sample_bf16)
    free(monkeypatch, 3)
    with pytest.raises(NoRoomError, match=r"needs [\d,]+ bytes more, and 12,288 are free") as caught:
        REFUSED[job](read, other, tmp_path / "not" / "there" / "out")
    assert caught.value.file == str(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_is_there_counts(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut off needs the rest, no more: it ends on a disk of just that, and on no smaller one."""
    cut(monkeypatch, 16 << 10, 2)
    whole = to_write(plan_convert(sample_fp8, tmp_path / "out"))
    with monkeypatch.context() as patch:
        fail_after(patch, "pwrite", 40, errno.EIO)
        with pytest.raises(StorageError):
            convert(sample_fp8, tmp_path / "out", workers=1)
    rest = to_write(plan_convert(sample_fp8, tmp_path / "out"))
    assert rest < whole
    free(monkeypatch, rest - 1)
    assert not plan_convert(sample_fp8, tmp_path / "out").fits
    with pytest.raises(NoRoomError, match="the same command continues from there"):
        convert(sample_fp8, tmp_path / "out")
    free(monkeypatch, rest)
    assert convert(sample_fp8, tmp_path / "out").bytes_resumed


@pytest.mark.parametrize("silence", ["no blocks", "an error"])
def test_a_file_system_that_cannot_tell(
    silence: str, sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to refuse."""
    free(monkeypatch, 0, tells=False)
    if silence == "an error":
        fail_after(monkeypatch, "statvfs", 0, errno.ENOSYS)
        monkeypatch.setattr(os, "statvfs", lambda path: os.open(path / "nowhere", os.O_RDONLY))
    planned = plan_convert(sample_fp8, tmp_path / "out")
    assert (planned.bytes_free, planned.fits) == (None, True)
    assert convert(sample_fp8, tmp_path / "out").files == planned.files


def test_how_fast_the_disk_is(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured with a file that has no name; where that cannot be, no time is told."""
    monkeypatch.setattr(module, "_PIECE", 4096)
    planned = plan_convert(sample_fp8, tmp_path / "out")
    if planned.bytes_per_second is not None:
        assert planned.seconds == planned.bytes_to_write / planned.bytes_per_second > 0
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_EXCL, raising=False)
    assert plan_convert(sample_fp8, tmp_path / "other").seconds is None


def test_what_would_be_refused(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of what cannot be done is refused by the same names."""

    def refused(kind: type[Fp8CheckpointError], **how: Any) -> None:
        with pytest.raises(kind):
            plan_convert(sample_fp8, tmp_path / "out", **how)

    cut(monkeypatch)
    with monkeypatch.context() as patch:
        fail_after(patch, "pwrite", 20, errno.EIO)
        with pytest.raises(StorageError):
            convert(sample_fp8, tmp_path / "out", workers=1)
    refused(ResumeMismatchError, to="fp32")
    (tmp_path / "out").mkdir()
    refused(OutputExistsError)
    with pytest.raises(ValueError, match="expected one of"):
        plan_convert(sample_fp8, tmp_path / "other", to="fp9")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An empty file system at ``out.partial``."""
    place = tmp_path / "out.partial"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_another_file_system_at_the_partial_output(sample_fp8: Path, mounted: Path) -> None:
    """What is written there could never be renamed: refused before the first byte, not after the last."""
    with pytest.raises(OutputExistsError, match="another file system is mounted there"):
        convert(sample_fp8, mounted.with_name("out"))
    assert os.listdir(mounted) == []
