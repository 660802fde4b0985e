"""Growth, measured: converting and loading more bytes, opening and planning more tensors, on more ranks."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.convert import PEAK, tree_bytes
from benchmarks.measuring import child, keep
from benchmarks.planning import rehearse
from fp8ckpt import open_checkpoint, plan, sample
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes

LAYER = Mistral3Sizes(layers=1, hidden=4096, intermediate=8192, heads=32, kv_heads=8, head_dim=128)  # 0.14 GB each
CONVERTED = {0.5: 3, 2: 14, 8: 56}  # gigabytes of FP8: layers
LOADED = {0.5: 3, 1: 7, 2: 14}  # a model takes twice as many bytes of memory
TENSORS = {1_000: 4, 10_000: 9, 92_000: 61}  # about: layers of DeepSeek V3

IN_CHILD = (
    PEAK
    + """
import gc, json, sys, time
import fp8ckpt, torch, transformers
job, source, out = sys.argv[1:]
if job == "load":
    fp8ckpt.load_pretrained(source.replace("size", "warm"))  # imports, and kernels
    gc.collect()
resident = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
begun, processor = time.perf_counter(), time.process_time()
held = 0
if job == "load":
    model = fp8ckpt.load_pretrained(source)
    held = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
elif job == "convert":
    fp8ckpt.convert(source, out)
found = {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - processor}
print(json.dumps({**found, "beyond": peak() - resident - held}))
"""
)


def of_bytes(work: Path) -> dict[str, Any]:
    """Converting and loading, each in a process of its own that has imported what it needs."""
    found: dict[str, Any] = {"convert": {}, "load": {}}
    sample(work / "warm", replace(LAYER, layers=1), files=1)
    for gigabytes, layers in sorted({**CONVERTED, **LOADED}.items()):
        source = sample(work / "size", replace(LAYER, layers=layers), files=2)
        for job, sizes in (("convert", CONVERTED), ("load", LOADED)):
            if gigabytes in sizes:
                row = {"source_bytes": tree_bytes(source), **child(IN_CHILD, job, source, work / "out")}
                found[job][str(gigabytes)] = row
                print(
                    f"  {job:<8} {row['source_bytes'] / 1e9:5.2f} GB: {row['seconds']:6.2f} s, "
                    f"{row['processor_seconds']:6.2f} s of processors, {row['beyond'] / 2**20:5.0f} MiB beyond"
                )
                shutil.rmtree(work / "out", ignore_errors=True)
        shutil.rmtree(source)
    return found


def of_tensors(work: Path) -> dict[str, Any]:
    """Opening, and planning 64 and 1,024 ranks: seconds of a processor."""
    found: dict[str, Any] = {}
    for about, layers in TENSORS.items():
        sizes = replace(DeepseekSizes.true_shape(), layers=layers)
        path = sample(work / f"tensors{about}", sizes, files=max(2, 163 * layers // 61), sparse=True)
        steps = [time.process_time()]
        checkpoint = open_checkpoint(path)
        steps.append(time.process_time())
        plans = {}
        for ranks in (64, 1024):
            plans[ranks] = plan(checkpoint, ranks=ranks, ep=64)
            steps.append(time.process_time())
        seconds = [after - before for before, after in pairwise(steps)]
        row = dict(zip(("open", "plan, 64 ranks", "plan, 1,024 ranks"), seconds, strict=True))
        stored = sum(len(header.spans) for header in checkpoint.files)
        print(f"  {stored:>7,} tensors: " + ", ".join(f"{what} {took:.2f} s" for what, took in row.items()))
        found[str(about)] = {"tensors": stored, "processor_seconds": row}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        result = {"bytes": of_bytes(work), "tensors": of_tensors(work)}
        few = work / f"tensors{sorted(TENSORS)[1]}"
        result["ranks"] = {str(ranks): rehearse(few, ["ep8_fsdp8"], ranks)["ep8_fsdp8"] for ranks in (64, 1024)}
    keep("scaling", result)


if __name__ == "__main__":
    main()
