"""What ranks of one machine share lies where others have files, too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fp8ckpt.stores import shared
from fp8ckpt.stores.ahead import Request
from fp8ckpt.stores.shared import Shared


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the machine's."""
    monkeypatch.setattr(shared, "_MEMORY", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return tmp_path


def test_only_what_dead_jobs_left_goes(memory: Path) -> None:
    """Not what merely begins with our name."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    prefix = f"fp8ckpt-{os.getuid()}-"
    for name in ("notes", "12x", str(ended.pid), str(os.getpid())):
        (memory / f"{prefix}{name}").mkdir()
    assert Shared.of_this_job() is not None
    left = {path.name.removeprefix(prefix) for path in memory.iterdir()}
    assert left == {"notes", "12x", str(os.getpid()), str(os.getppid())}


def test_a_link_is_not_followed(memory: Path) -> None:
    """It leads where whoever made it wants: each rank fetches for itself."""
    (memory / "elsewhere").mkdir()
    (memory / f"fp8ckpt-{os.getuid()}-{os.getppid()}").symlink_to("elsewhere")
    assert Shared.of_this_job() is None


@pytest.mark.parametrize("lost", [False, True])
def test_columns_of_many_small_tensors(memory: Path, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """Far more ranges in a block than tensors in a layer: each byte is fetched once over all ranks, and nothing stays.
    Where what is known of a block was lost (a rank was killed as it wrote it), each fetches for itself.
    """
    monkeypatch.setattr(shared, "BLOCK", 1 << 17)
    monkeypatch.setattr(shared, "_EDGE", 1)
    tensors, rows, columns, ranks = 900, 4, 64, 4
    data = np.random.default_rng(0).integers(0, 256, tensors * rows * columns, np.uint8)
    fetched = np.zeros(data.size, np.int64)

    def fetch(request: Request) -> None:
        fetched[request.start : request.stop] += 1
        for start, buffer in request.parts:
            buffer[:] = data[start:][: buffer.size]

    width = columns // ranks
    for rank in range(ranks):
        one = Shared.of_this_job()
        assert one is not None
        out = np.zeros((tensors, rows, width), np.uint8)
        for i, of_tensor in enumerate(out):
            starts = [(i * rows + row) * columns + rank * width for row in range(rows)]
            parts = list(zip(starts, of_tensor, strict=True))
            one.fetch(Request("x", starts[0], starts[-1] + width, parts), "1", data.size, fetch)
        assert np.array_equal(out, data.reshape(tensors, rows, columns)[..., rank * width :][..., :width])
        for block in memory.glob("*/*") if lost else ():
            with block.open("ab") as file:
                file.write(b"[[0")
    assert np.all(fetched == 1) or lost
    assert lost or not list(memory.glob("*/*"))
