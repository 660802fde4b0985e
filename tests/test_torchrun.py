"""Under torchrun, and inside a process group, the ranks share one conversion, with the bytes of one process."""

from __future__ import annotations

import json
import logging.handlers
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fp8ckpt import convert, merge, open_checkpoint, ranks
from fp8ckpt.errors import RankLostError
from tests.adapters import PREFIX, factors, write_adapter
from tests.distributed import Launched
from tests.oracle import tree

# The command line with small extents, so that a miniature has work for every rank, and with the faults a test asks for.
SCRIPT = """
import errno, os, sys, time
from pathlib import Path

import fp8ckpt.output.extents as writing

writing.CHUNK, writing.EXTENT = 8192, 3 * 8192

rank, writes, pwrite = os.environ["RANK"], 0, os.pwrite

def counted(fd, data, offset):
    global writes
    writes += 1
    if os.environ.get("HANG_AFTER") and writes > int(os.environ["HANG_AFTER"]):
        time.sleep(600)
    if os.environ.get("FULL_ON") == rank and writes > 4:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pwrite(fd, data, offset)

os.pwrite = counted

from fp8ckpt.output.partial import PartialOutput
publish = PartialOutput.publish

def noted(self):
    records = (self.partial / ".fp8ckpt").glob("done-*")
    Path(os.environ["NOTES"]).write_text(" ".join(sorted(file.name for file in records)))
    publish(self)

PartialOutput.publish = noted

from fp8ckpt.cli import main
main()
"""

LIBRARY = """
import os, sys
import torch
import torch.distributed as dist
import fp8ckpt

source, out = sys.argv[1:]
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
result = fp8ckpt.convert(source, out)
assert os.path.isdir(out)
results = [None] * size
dist.all_gather_object(results, (result.bytes_read, result.bytes_written, result.tensors, result.nan_codes))
assert all(one == results[0] for one in results), results
try:
    fp8ckpt.convert(source, out)
except fp8ckpt.Fp8CheckpointError as error:
    assert type(error).__name__ == "OutputExistsError", error
else:
    raise AssertionError("an existing destination must be refused on every rank")
total = torch.ones(())
dist.all_reduce(total)  # the caller's group is as it was
assert total == size
dist.destroy_process_group()
if rank == 0:
    print("bytes read:", results[0][0])
"""


def torchrun(ranks: int, *command: object, **environment: str) -> subprocess.Popen[str]:
    """Start torchrun in a session of its own, so that it can be killed with all its children."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status and output; whatever hangs is killed, and fails the test."""
    try:
        stdout, stderr = child.communicate(timeout=120)
    finally:
        kill(child)
    return child.returncode, stdout, stderr


def kill(child: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun and to every rank; torchrun gives each a session of its own."""
    children = [
        int(pid)
        for task in Path(f"/proc/{child.pid}/task").glob("*")
        for pid in (task / "children").read_text().split()
    ]
    for pid in (child.pid, *children):
        if child.poll() is None or pid != child.pid:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(sample_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(sample_fp8, out)
    return tree(out)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_ranks_write_what_one_process_writes(sample_fp8: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The plain command under torchrun: the same directory, one summary, every byte read once over all ranks."""
    out = tmp_path / "out"
    code, stdout, stderr = ended(torchrun(2, "-m", "fp8ckpt", "convert", sample_fp8, out, "--json"))
    assert code == 0, stderr
    assert tree(out) == expected
    assert os.listdir(tmp_path) == ["out"]
    result = json.loads(stdout)  # one summary, not one a rank
    alone = convert(sample_fp8, tmp_path / "alone")
    same = (
        "files", "tensors", "dequantized", "dropped_scales", "bytes_read", "bytes_written", "bytes_resumed",
        "nan_codes",
    )  # fmt: skip
    assert {key: result[key] for key in same} == {key: getattr(alone, key) for key in same}


def test_ranks_merge_what_one_process_merges(sample_fp8: Path, script: Path, tmp_path: Path) -> None:
    """An adapter, with the same bytes and the same report."""
    module = "model.language_model.layers.0.mlp.down_proj"
    rows, cols = open_checkpoint(sample_fp8)[f"{module}.weight"].shape
    adapter = write_adapter(tmp_path / "adapter", factors(PREFIX + module, cols=cols, rows=rows))
    alone = merge(sample_fp8, adapter, tmp_path / "alone")
    notes = tmp_path / "notes"
    command = (script, "merge", sample_fp8, adapter, tmp_path / "out", "--json")
    code, stdout, stderr = Launched(tmp_path / "ranks", 2, *command, NOTES=str(notes)).ended()
    assert code == 0, stderr
    assert notes.read_text() == "done-0 done-1"
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    [row] = json.loads(stdout)["report"]["weights"]
    assert (row["name"], row["changed"]) == (f"{module}.weight", alone.report.total.changed)


def test_every_rank_takes_part(sample_fp8: Path, expected: dict[str, bytes], script: Path, tmp_path: Path) -> None:
    """Each of three ranks recorded extents of its own."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    command = (script, "convert", sample_fp8, out)
    code, _, stderr = Launched(tmp_path / "ranks", 3, *command, NOTES=str(notes)).ended()
    assert code == 0, stderr
    assert notes.read_text() == "done-0 done-1 done-2"
    assert tree(out) == expected


def test_error_of_every_rank_is_printed_once(sample_fp8: Path, tmp_path: Path) -> None:
    """A refusal at the door: one line, a failing exit status, no traceback of ours, nothing written."""
    source = Path(shutil.copytree(sample_fp8, tmp_path / "fp8"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [0]
    (source / "config.json").write_text(json.dumps(config))
    code, stdout, stderr = Launched(tmp_path / "ranks", 2, "-m", "fp8ckpt", "convert", source, tmp_path / "out").ended()
    assert code != 0
    assert stdout == ""
    assert [line for line in stderr.splitlines() if "block size" in line] == [
        "fp8ckpt: config.json: the block size is [0]; expected positive whole numbers, such as [128, 128]; "
        "state the block size that the scales were made with"
    ]
    assert "fp8ckpt/convert.py" not in stderr
    assert sorted(os.listdir(tmp_path)) == ["fp8", "ranks"]


def test_error_of_one_rank_ends_all_and_is_printed_once(
    sample_fp8: Path, expected: dict[str, bytes], script: Path, tmp_path: Path
) -> None:
    """A disk full for the second rank only: all ranks end, the first prints it, and one process finishes the job."""
    out, environment = tmp_path / "out", {"NOTES": str(tmp_path / "notes")}
    command = (script, "convert", sample_fp8, out, "--json")
    code, stdout, stderr = Launched(tmp_path / "full", 2, *command, FULL_ON="1", **environment).ended()
    assert code != 0
    assert json.loads(stdout)["error"]["found"] == "writing failed: No space left on device"
    assert stderr.count("No space left on device") == 1
    assert "the same command continues from there" in stderr
    assert not out.exists()
    code, stdout, stderr = Launched(tmp_path / "alone", 1, *command, **environment).ended()
    assert code == 0, stderr
    assert json.loads(stdout)["bytes_resumed"] > 0
    assert tree(out) == expected


@pytest.mark.parametrize("ranks", [(2, 3), (3, 1)])
def test_resumes_with_another_number_of_ranks(
    ranks: tuple[int, int], sample_fp8: Path, expected: dict[str, bytes], script: Path, tmp_path: Path
) -> None:
    """SIGKILL to the whole group; other ranks take up what each had written, and end with the same bytes."""
    out, environment = tmp_path / "out", {"NOTES": str(tmp_path / "notes")}
    command = (script, "convert", sample_fp8, out, "--json")
    child = Launched(tmp_path / "killed", ranks[0], *command, "--workers", "1", HANG_AFTER="8", **environment)
    records = [tmp_path / f"out.partial/.fp8ckpt/done-{rank}" for rank in range(ranks[0])]
    deadline = time.monotonic() + 120
    try:
        while not all(record.exists() and record.stat().st_size for record in records):
            assert not child.poll()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
    assert not out.exists()
    code, stdout, stderr = Launched(tmp_path / "again", ranks[1], *command, **environment).ended()
    assert code == 0, stderr
    result: dict[str, Any] = json.loads(stdout)
    assert 0 < result["bytes_resumed"] < result["bytes_written"]
    assert tree(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_library_call_inside_a_process_group(sample_fp8: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """convert() on all ranks of the caller's gloo group: shared, equal results everywhere, the group left as it was."""
    (tmp_path / "library.py").write_text(LIBRARY)
    command = (tmp_path / "library.py", sample_fp8, tmp_path / "out")
    code, stdout, stderr = Launched(tmp_path / "ranks", 2, *command).ended()
    assert code == 0, stderr
    assert stdout == f"bytes read: {convert(sample_fp8, tmp_path / 'alone').bytes_read}\n"
    assert tree(tmp_path / "out") == expected


def test_process_group_of_one(sample_fp8: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """An initialized group of a single process is no different from none."""
    (tmp_path / "library.py").write_text(LIBRARY)
    command = (tmp_path / "library.py", sample_fp8, tmp_path / "out")
    code, _, stderr = Launched(tmp_path / "ranks", 1, *command).ended()
    assert code == 0, stderr
    assert tree(tmp_path / "out") == expected


def test_ranks_wait_for_slower_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than the half hour after which torch takes a rank for lost."""
    waits: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_join", lambda size: dist.init_process_group("fake", rank=0, world_size=size))
    monkeypatch.setattr(dist, "new_group", lambda timeout: waits.append(timeout) or dist.group.WORLD)
    with ranks.ranks_of_this_job() as joined:
        assert joined.size == 2
    assert waits == [timedelta(days=1)]


def test_a_rank_that_is_started_alone(sample_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job whose variables say that there are others: it says that it waits for them, and how not to."""
    said: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = logging.handlers.QueueHandler(said)
    logging.getLogger("fp8ckpt.ranks").addHandler(handler)

    def wait_for_them(backend: str) -> None:
        record = said.get(timeout=60)
        assert "waiting for other ranks" in record.getMessage()
        raise dist.DistStoreError("Timed out")

    monkeypatch.setattr("fp8ckpt.ranks._PATIENCE", 0.0)
    monkeypatch.setattr(dist, "init_process_group", wait_for_them)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(RankLostError, match=r"Timed out.*2 ranks run this together.*unset WORLD_SIZE"):
            convert(sample_fp8, tmp_path / "out")
    finally:
        logging.getLogger("fp8ckpt.ranks").removeHandler(handler)
    assert [*tmp_path.iterdir()] == []
