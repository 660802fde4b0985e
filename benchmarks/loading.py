"""`load_model` against the adapter with torch's own reader, transformers, and NeMo AutoModel where it is installed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import HOSTS_PYTHON, ROOT, TOUCH, in_ranks, keep
from fp8ckpt import sample
from fp8ckpt.sample import Mistral3Sizes

# A layer of Mistral Medium 3.5: 1.9 GB on disk, 3.3 GB as BF16.
SIZES = Mistral3Sizes(
    layers=1, hidden=12288, intermediate=28672, heads=96, kv_heads=8, head_dim=128, vocabulary=4096, vision_layers=1
)
ROUNDS = 3


def load_once(kind: str, source: Path, ranks: int) -> dict[str, Any]:
    """One load in fresh processes; rank 0's figures."""
    python = str(HOSTS_PYTHON) if kind.startswith("nemo") else sys.executable
    way = "touch" if kind == TOUCH else kind
    return in_ranks(ranks, ROOT / "benchmarks" / "load_once.py", way, source, python=python)


def main() -> None:
    peers = {1: ["ours", TOUCH, "adapter", "transformers"], 2: ["ours", TOUCH, "adapter"]}
    if HOSTS_PYTHON.exists():
        peers[1] += ["nemo-streaming"]
        peers[2] += ["nemo-streaming", "nemo-dcp"]
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        source = sample(Path(work) / "fp8", SIZES, files=2)
        size = sum(file.stat().st_size for file in source.iterdir())
        for ranks, kinds in peers.items():
            for _ in range(ROUNDS):
                for kind in kinds:
                    figures.setdefault(f"{kind}, {ranks} rank{'s' if ranks > 1 else ''}", []).append(
                        load_once(kind, source, ranks)
                    )
            checksums = {
                kind: figures[f"{kind}, {ranks} rank{'s' if ranks > 1 else ''}"][0]["checksum"]
                for kind in kinds
                if kind != TOUCH
            }
            assert len(set(checksums.values())) == 1, (
                checksums
            )  # the same bits in every parameter, or the figures mean nothing
    print(f"\nloading {size / 1e9:.2f} GB, source in the page cache (best of {ROUNDS}, each in processes of its own)")
    print(
        "  into fresh memory, and again into the same memory; "
        "the times of fresh memory are mostly the machine's own page faults"
    )
    for name, runs in figures.items():
        ours = figures["ours" + name[name.index(",") :]]
        line = f"  {name:<26}"
        for what in ("seconds", "again"):
            if what in runs[0]:
                best, ours_best = (min(float(run[what]) for run in group) for group in (runs, ours))
                line += f" {best:6.2f} s {best / ours_best:5.2f} x ours"
            else:
                line += " " * 22
        beyond = min(run["peak"] - run["model"] for run in runs) / 2**20
        print(f"{line}   {beyond:+6.0f} MiB beyond the model's {runs[0]['model'] / 1e9:.2f} GB a rank")
    keep("loading", {"source_bytes": size, "runs": figures})


if __name__ == "__main__":
    main()
