"""`save_model` of an FSDP2-sharded model, as BF16 and as FP8, against DCP's own Hugging Face writer with consolidation,
on two ranks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, keep
from fp8ckpt import sample, verify
from fp8ckpt.sample import Mistral3Sizes

# 1.9 GB as BF16.
SIZES = Mistral3Sizes(
    layers=1, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=4096, vision_layers=1
)
ROUNDS = 3


def main() -> None:
    figures: dict[str, list[dict[str, Any]]] = {"ours": [], "ours, FP8": [], "dcp": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        source = sample(Path(work) / "fp8", SIZES, files=1)
        for _ in range(ROUNDS):
            for kind, runs in figures.items():
                out = Path(work) / kind
                shutil.rmtree(out, ignore_errors=True)
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    "2",
                    str(ROOT / "benchmarks" / "save_once.py"),
                ]
                done = subprocess.run(
                    [*command, kind, str(source), str(out)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise RuntimeError(done.stdout + done.stderr)
                runs.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
        result = verify(source, Path(work) / "ours")
        assert not result.defects, result.defects[0]
        assert not result.tensor_differences, result.tensor_differences[0]
        theirs = verify(Path(work) / "ours", Path(work) / "dcp")
        assert not theirs.tensor_differences, theirs.tensor_differences[0]
        subprocess.run(["diff", "-r", str(source), str(Path(work) / "ours, FP8")], check=True)  # nothing was trained
        size = sum(file.stat().st_size for file in (Path(work) / "ours").glob("*.safetensors"))
        fp8_size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    sizes = f"{size / 1e9:.2f} GB, {fp8_size / 1e9:.2f} as FP8"
    print(f"\nsaving {sizes}, from two FSDP2 ranks (best of {ROUNDS}; ours is on disk when it returns)")
    ours = min(run["seconds"] for run in figures["ours"])
    for kind, runs in figures.items():
        best = min(runs, key=lambda run: float(run["seconds"]))
        ratio, written = best["seconds"] / ours, best["written"] / (fp8_size if "FP8" in kind else size)
        print(
            f"  {kind:<10} {best['seconds']:6.2f} s  {ratio:5.2f} x ours   "
            f"{written:5.3f} bytes written for each of the output"
        )
    keep("saving", {"bytes": size, "fp8_bytes": fp8_size, "runs": figures})


if __name__ == "__main__":
    main()
