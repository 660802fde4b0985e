"""Where a conversion spends its time: seconds of each thread in reading, kernels, writing, flushing and waiting; and
how many of them on a processor, which do not depend on other load.

The steps are timed from outside, around the calls that take them; the sums show how much they overlap.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.convert import LAYER, tree_bytes
from benchmarks.measuring import keep, write_durably
from fp8ckpt import convert, sample
from fp8ckpt.encodings.fp8 import QuantizingFiller
from fp8ckpt.output.files import OutputFile
from fp8ckpt.stores.local import LocalStore

Seconds = dict[str, dict[str, float]]  # by thread, by step

# A step inside another is subtracted from it: the rest of filling is kernels.
STEPS: dict[str, tuple[tuple[type, str], ...]] = {
    "fill": ((QuantizingFiller, "fill"),),
    "read": ((LocalStore, "read"),),
    "write": ((OutputFile, "write"),),
    "flush": ((OutputFile, "flush"),),
}


@contextmanager
def timed() -> Iterator[Seconds]:
    """Yield the seconds that each thread spends in each step, inside the context."""
    seconds: Seconds = defaultdict(lambda: defaultdict(float))

    def around(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            begun, on_processor = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments)
            finally:
                own = seconds[threading.current_thread().name]
                own[step] += time.perf_counter() - begun
                if step != "read":  # reading is inside of filling
                    own["on a processor"] += time.thread_time() - on_processor

        return run

    with ExitStack() as patches:
        for step, places in STEPS.items():
            for owner, name in places:
                patches.enter_context(patch.object(owner, name, around(step, getattr(owner, name))))
        yield seconds


def timeline(run: Callable[[], object]) -> tuple[float, Seconds]:
    """(seconds in all, by thread and step: read, kernel, write, flush, wait)."""
    with timed() as seconds:
        begun = time.perf_counter()
        run()
        wall = time.perf_counter() - begun
    found: Seconds = {}
    for thread, steps in sorted(seconds.items()):
        row = {"read": steps["read"], "write": steps["write"], "flush": steps["flush"]}
        row["kernel"] = max(0.0, steps["fill"] - steps["read"]) if steps["fill"] else 0.0
        row["wait"] = wall - sum(row.values())
        row["on a processor"] = steps["on a processor"]
        found[thread] = {step: row[step] for step in ("read", "kernel", "write", "flush", "wait", "on a processor")}
    return wall, found


def show(title: str, wall: float, floor: float, found: Seconds) -> None:
    print(f"\n{title}: {wall:.2f} s, {wall / floor:.2f} x a raw durable write of as many bytes ({floor:.2f} s)")
    steps = next(iter(found.values()))
    print(f"  {'thread':<24}" + "".join(f"{step:>9}" for step in list(steps)[:-1]) + "   on a processor")
    for thread, row in found.items():
        print(f"  {thread:<24}" + "".join(f"{seconds:9.2f}" for seconds in row.values()))
    print(f"  {'together':<24}" + "".join(f"{sum(row[step] for row in found.values()):9.2f}" for step in steps))


def main() -> None:
    result = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        base = sample(work / "fp8", LAYER, files=2)
        convert(base, work / "bf16")
        jobs: dict[str, Callable[[], object]] = {
            "to bf16": lambda: convert(base, work / "out"),
            "to fp8 --like, no report": lambda: convert(work / "bf16", work / "out", like=base, report=False),
            "to fp8 --like": lambda: convert(work / "bf16", work / "out", like=base),
            "to fp8 --like, fresh scales": lambda: convert(work / "bf16", work / "out", like=base, scales="fresh"),
        }
        for name, job in jobs.items():
            for _ in range(2):  # the first one compiles, or finds what was compiled
                shutil.rmtree(work / "out", ignore_errors=True)
                wall, found = timeline(job)
            begun = time.perf_counter()
            write_durably(work / "raw", tree_bytes(work / "out"))
            floor = time.perf_counter() - begun
            (work / "raw").unlink()
            show(f"convert, {name}", wall, floor, found)
            result[name] = {"seconds": wall, "raw durable write": floor, "threads": found}
    keep("timeline", result)


if __name__ == "__main__":
    main()
