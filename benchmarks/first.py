"""The first run on a new machine, which compiles its kernels, against the second, which finds them compiled."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measuring import keep
from fp8ckpt import convert, sample


def processor_seconds(cache: Path, *arguments: object) -> float:
    """Of one command in a process of its own; waiting for a busy machine is not counted."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-m", "fp8ckpt", *map(str, arguments), "--quiet"], env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    result = {}
    with tempfile.TemporaryDirectory(prefix="fp8ckpt-first-") as folder:
        work = Path(folder)
        base = sample(work / "fp8")
        convert(base, work / "bf16")
        jobs = {
            "convert": (base,),
            "convert --like": (work / "bf16", "--like", base),
        }
        for name, (source, *how) in jobs.items():
            cache = work / f"cache of {name}"
            runs = [
                processor_seconds(cache, "convert", source, work / f"{name} {which}", *how)
                for which in ("first", "second")
            ]
            result[name] = {"first": runs[0], "second": runs[1]}
            print(f"  {name}: {runs[0]:.2f} s of processors where nothing is compiled yet, then {runs[1]:.2f} s")
    keep("first", result)


if __name__ == "__main__":
    main()
