"""What all benchmarks share: interleaved timing, the memory of child processes, and facts about the machine."""

from __future__ import annotations

import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fp8ckpt.system import HUGE_PAGE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOUCH = "zeros into the model's memory"  # the floor of loading: what the pages cost

# Python of the environment that `make test-hosts` makes; its peers are measured if it is there.
HOSTS_PYTHON = ROOT / ".venv-hosts" / "bin" / "python"


def facts() -> dict[str, Any]:
    """The facts without which a figure means nothing."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    family = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "cpu family" in line),
        "?",
    )
    memory = int(
        next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{model} (family {family}), {len(os.sched_getaffinity(0))} cores",
        "memory_gib": round(memory / 2**20, 1),
        "load": round(os.getloadavg()[0], 1),  # of the last minute, others' work here included
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "safetensors": version("safetensors"),
    }


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int = 5, pause: float = 0.0
) -> dict[str, dict[str, float]]:
    """Time each run once a round, in turn, so that other work on the machine affects all alike.

    ``pause``: seconds before each run, for the threads of torch's own pool to stop spinning.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(pause)
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {
        name: {"median": statistics.median(times), "least": min(times), "most": max(times)}
        for name, times in seconds.items()
    }


def pages(size: int, *, huge: bool) -> memoryview:
    """Fresh memory that begins at a huge page, in huge or in small pages."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    return memoryview(memory)[start : start + size]


def write_durably(file: Path, size: int, threads: int = 2, piece: int = 4 << 20, *, huge: bool = True) -> None:
    """The floor of a durable write: direct writes of ``size`` bytes, in pieces of 4 MiB, from huge or small pages."""
    fd = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o644)
    try:
        os.ftruncate(fd, -(-size // piece) * piece)

        def write(first: int) -> None:
            buffer = pages(piece, huge=huge)
            buffer[:] = os.urandom(piece)
            for start in range(first * piece, size, threads * piece):
                os.pwrite(fd, buffer, start)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, range(threads)))
        os.fdatasync(fd)
    finally:
        os.close(fd)


def read_all(files: Iterable[Path], threads: int = 2, piece: int = 4 << 20) -> None:
    """The floor of reading files once: into buffers that are reused, in pieces of 4 MiB."""

    def read(fd: int, first: int, size: int) -> None:
        buffer = bytearray(piece)
        for start in range(first * piece, size, threads * piece):
            os.preadv(fd, [buffer], start)

    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            try:
                size = os.fstat(fd).st_size
                list(pool.map(read, [fd] * threads, range(threads), [size] * threads))
            finally:
                os.close(fd)


def show(title: str, rows: dict[str, dict[str, float]], ours: str) -> None:
    """Print times and ratios to ours."""
    print(f"\n{title}")
    for name, row in rows.items():
        ratio = row["median"] / rows[ours]["median"]
        print(
            f"  {name:<44} {row['median']:8.3f} s  (least {row['least']:.3f}, most {row['most']:.3f})  "
            f"{ratio:6.2f} x ours"
        )


@contextmanager
def anonymous_peak() -> Iterator[Callable[[], int]]:
    """Sample this process's anonymous (private) memory; the callable returns the peak so far, in bytes."""
    peak = 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            stop.wait(0.002)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stop.set()
        thread.join()


def child(code: str, *arguments: object, python: str = sys.executable) -> dict[str, Any]:
    """Run Python code in a process of its own; its last line of output is JSON."""
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def in_ranks(ranks: int, script: Path, *arguments: object, python: str = sys.executable) -> dict[str, Any]:
    """Run a script in fresh processes, under torchrun if there are several; what rank 0 prints in JSON."""
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(torchrun if ranks > 1 else [python]), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(
        next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    )
    return result


def keep(name: str, result: dict[str, Any]) -> None:
    """Write a dated result, with the machine's facts."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}.json"
    file.write_text(json.dumps({"facts": facts(), **result}, indent=2) + "\n")
    print(f"  -> {file.relative_to(ROOT)}")
