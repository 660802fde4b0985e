"""The same bytes on a system that lacks what Linux has; and a named refusal on one that lacks what POSIX promises."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fp8ckpt.system
from fp8ckpt.convert import convert
from fp8ckpt.output.files import aligned_buffer
from fp8ckpt.system import HUGE_PAGE, hint_huge_pages
from tests.oracle import assert_same_tree

# As macOS is, to the code that runs there; F_FULLFSYNC is there, and the file system has none.
LIKE_MACOS = """
import fcntl, os, sys, tempfile
for name in (
    "sched_getaffinity", "sched_setaffinity", "fdatasync", "preadv", "pwritev", "O_DIRECT", "posix_fallocate",
    "posix_fadvise", "copy_file_range", "splice", "memfd_create", "eventfd", "process_cpu_count",
):
    if hasattr(os, name):
        delattr(os, name)
fcntl.F_FULLFSYNC = 51
def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys")):
        frame = sys._getframe(1)
        assert "fp8ckpt" not in frame.f_code.co_filename, arguments
sys.addaudithook(refuse)
"""
WORK = """
from pathlib import Path
import torch
import fp8ckpt, fp8ckpt.output.files, fp8ckpt.ranks, fp8ckpt.stores.local, fp8ckpt.system
for module in (fp8ckpt.stores.local, fp8ckpt.output.files):
    module.MOST_AT_ONCE = 1000  # in place of 1 GiB
assert fp8ckpt.ranks.threads_of_this_rank() == fp8ckpt.system.cores() == os.cpu_count()
source, out = map(Path, sys.argv[1:])
fp8ckpt.convert(source, out / "bf16")
fp8ckpt.convert(out / "bf16", out / "fp8", to="fp8", like=source)
assert fp8ckpt.verify(source, out / "bf16").ok
model, checkpoint = torch.nn.Module(), fp8ckpt.open_checkpoint(source)
for name in checkpoint.tensors:
    module = model
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, torch.nn.Parameter(checkpoint.read(name)))
fp8ckpt.save_model(model, out / "saved-bf16", like=source)
fp8ckpt.save_model(model, out / "saved-fp8", to="fp8", like=source)
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_same_bytes_without_what_linux_alone_has(sample_fp8: Path, tmp_path: Path) -> None:
    """Reading, converting, verifying and saving need none of it, nor calls of 2 GiB, which macOS refuses."""
    run(LIKE_MACOS + WORK, sample_fp8, tmp_path)
    convert(sample_fp8, tmp_path / "expected-bf16")
    for name in ("bf16", "saved-bf16"):
        assert_same_tree(tmp_path / name, tmp_path / "expected-bf16")
    for name in ("fp8", "saved-fp8"):
        assert_same_tree(tmp_path / name, sample_fp8)


def test_windows_is_refused_by_name() -> None:
    """The package imports and shows its help there; a function or a command says in one line what to do."""
    code = """
import sys, sysconfig, numpy, rich.console
sysconfig.get_config_vars()  # of the true system, while it can be asked
import fp8ckpt
from fp8ckpt.cli import main
sys.modules["fcntl"] = None  # its import is an ImportError
sys.platform = "win32"
for name in ("convert", "inspect", "open_checkpoint", "report", "sample", "verify"):
    try:
        getattr(fp8ckpt, name)
    except fp8ckpt.Fp8CheckpointError as error:
        assert isinstance(error, ImportError)
        assert str(error).startswith("fp8ckpt does not run on win32; expected Linux or macOS; ")
    else:
        raise AssertionError(name)
sys.argv = ["fp8ckpt", "inspect", "x"]
sys.stderr = sys.stdout
try:
    main()
except SystemExit as end:
    assert end.code == 1
"""
    lines = run(code).splitlines()
    assert len(lines) == 1
    assert "WSL" in lines[0]


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="not for the asking")
def test_fresh_memory_takes_few_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the hint a page every 2 MiB, and what is in memory stays. A virtual machine whose host takes free memory
    back is given no hint.
    """
    size, flags = 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    features = tmp_path / "virtio0" / "features"
    features.parent.mkdir()
    monkeypatch.setattr(fp8ckpt.system, "_BALLOONS", tmp_path)
    counts = []
    for bits in ("011000", "011001"):
        features.write_text(bits)
        fresh, full = np.frombuffer(mmap.mmap(-1, size, flags), np.uint8), np.full(4 << 20, 7, np.uint8)
        hint_huge_pages({(fresh.ctypes.data, size), (full.ctypes.data + 5, full.size - 5), (0, 3)})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fresh[:] = 1
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert (full == 7).all()
    assert counts[0] < size // mmap.PAGESIZE // 8
    assert counts[1] >= size // mmap.PAGESIZE


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has none")
def test_what_a_disk_is_given_lies_in_huge_pages() -> None:
    """Or each request holds an eighth of it."""
    size = 4 << 20
    buffer = aligned_buffer(size)
    assert buffer.size == size
    assert buffer.ctypes.data % HUGE_PAGE == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer[:] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < size // mmap.PAGESIZE // 8
