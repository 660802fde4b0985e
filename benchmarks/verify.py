"""`verify A B` against reading both once, with as many threads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.convert import tree_bytes
from benchmarks.measuring import interleaved, keep, read_all, show
from fp8ckpt import convert, sample, verify
from fp8ckpt.sample import Mistral3Sizes

HALF = Mistral3Sizes(
    layers=1, hidden=6144, intermediate=14336, heads=48, kv_heads=8, head_dim=128, vocabulary=320, vision_layers=1
)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        source = sample(work / "fp8", HALF, files=2)
        convert(source, work / "bf16")
        files = [file for side in (source, work / "bf16") for file in side.glob("*.safetensors")]
        rows = {}
        for threads in (1, 2):
            runs = {
                "ours": lambda threads=threads: verify(source, work / "bf16", workers=threads),
                "reading both": lambda threads=threads: read_all(files, threads),
            }
            for run in runs.values():
                run()
            rows[str(threads)] = interleaved(runs, 7)
            size = tree_bytes(source) + tree_bytes(work / "bf16")
            show(f"verify of {size / 1e9:.2f} GB, {threads} threads", rows[str(threads)], "ours")
        keep("verify", {"bytes": size, "seconds": rows})


if __name__ == "__main__":
    main()
