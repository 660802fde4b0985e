"""`merge` of one layer of the 128B Mistral against PEFT's own way (the model in BF16, `merge_and_unload`, and back by
`--like`), and its floors: the matrix products alone, and reading the base and writing the output durably.

``python -m benchmarks.merge SMALL`` tries it on a small layer, and writes no result.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.adapters import PREFIX, factors, write_adapter

from benchmarks.convert import LAYER, PEAK, tree_bytes
from benchmarks.measuring import child, interleaved, keep, show
from fp8ckpt import merge, open_checkpoint, sample
from fp8ckpt.sample import Mistral3Sizes

SMALL = Mistral3Sizes(layers=1, hidden=512, intermediate=1024, heads=8, kv_heads=2, head_dim=64)
RANKS = (16, 64)

OURS = (
    PEAK
    + """
import json, sys
import fp8ckpt, torch
fp8ckpt.merge(*sys.argv[1:])
print(json.dumps({"peak": peak()}))
"""
)
PEFTS = (
    PEAK
    + """
import json, sys, time
import fp8ckpt, peft, torch
base, adapter, work = sys.argv[1:]
begun = time.perf_counter()
model = peft.PeftModel.from_pretrained(fp8ckpt.load_pretrained(base), adapter)  # faster than from_pretrained
model.merge_and_unload().save_pretrained(work + "/bf16")
fp8ckpt.convert(work + "/bf16", work + "/fp8", to="fp8", like=base)
print(json.dumps({"seconds": time.perf_counter() - begun, "peak": peak()}))
"""
)


def linears(base: Path) -> dict[str, tuple[int, ...]]:
    """The modules that adapters are of: all that is FP8."""
    return {tensor.name.removesuffix(".weight"): tensor.shape for tensor in open_checkpoint(base).quantized}


def adapter_of(base: Path, directory: Path, rank: int) -> Path:
    """Random factors for each of them, whose products are a hundredth of the weights."""
    tensors: dict[str, Any] = {}
    for module, (rows, cols) in linears(base).items():
        made = factors(PREFIX + module, rank, cols, rows, dtype="BF16")
        tensors |= made
    return write_adapter(directory, tensors, r=rank, lora_alpha=0.01, target_modules=r".*language_model.*_proj")


def products(base: Path, rank: int) -> Callable[[], None]:
    """The matrix products alone, by torch, on all cores, a band of rows at a time."""
    rng = np.random.default_rng(0)
    pairs = [
        [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((rows, rank), (rank, cols))]
        for rows, cols in linears(base).values()
    ]

    def run() -> None:
        for left, right in pairs:
            for band in left.split(64):
                torch.mm(band, right)

    return run


def main(sizes: Mistral3Sizes = LAYER, *, kept: bool = True) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        base = sample(work / "base", sizes, files=2)
        for rank in RANKS:
            against_peft(work, base, rank, kept=kept)


def against_peft(work: Path, base: Path, rank: int, *, kept: bool) -> None:
    """Seconds and peak memory of both roads, and the floors."""
    adapter = adapter_of(base, work / f"adapter{rank}", rank)
    result = merge(base, adapter, work / "first")
    shutil.copytree(work / "first", work / "to-copy")

    def ours() -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        merge(base, adapter, work / "out")

    def copies() -> None:
        subprocess.run(["rm", "-rf", str(work / "copy")], check=True)
        subprocess.run(f"cat '{base}'/*.safetensors > /dev/null", shell=True, check=True)
        subprocess.run(["cp", "-r", str(work / "to-copy"), str(work / "copy")], check=True)
        subprocess.run(["sync", *map(str, (work / "copy").iterdir())], check=True)

    rows = interleaved({"ours": ours, "the products alone": products(base, rank), "cat BASE, cp DST, sync": copies})
    show(f"rank {rank}: {tree_bytes(base) / 1e9:.2f} GB of FP8, {result.merged} weights merged", rows, "ours")
    shutil.rmtree(work / "out")
    peaks = {"ours": child(OURS, base, adapter, work / "out")}
    (work / "peft").mkdir()
    peaks["PEFT, and --like"] = child(PEFTS, base, adapter, work / "peft")
    for name, row in peaks.items():
        print(f"  {name:<20} {json.dumps(row)}")
    if kept:
        keep(f"merge-rank-{rank}", {"output": tree_bytes(work / "first"), "seconds": rows, "whole processes": peaks})
    for name in ("first", "to-copy", "out", "copy", "peft"):
        shutil.rmtree(work / name)


if __name__ == "__main__":
    main(SMALL, kept=False) if sys.argv[1:] == ["SMALL"] else main()
