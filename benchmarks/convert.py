"""`convert` of a layer of true width against the disk's floor and `cp` of its output; and of a checkpoint with block
scales against compressed-tensors.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.measuring import child, interleaved, keep, show, write_durably
from fp8ckpt import convert, sample, verify
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes

# One layer of Mistral Medium 3.5 (12288 x 28672 and its siblings, 1.4 GB of codes).
LAYER = Mistral3Sizes(
    layers=1, hidden=12288, intermediate=28672, heads=96, kv_heads=8, head_dim=128, vocabulary=320, vision_layers=1
)
# 0.8 GB of codes in 128 x 128 blocks; no ragged edges, which the peer does not take.
BLOCKS = DeepseekSizes(
    layers=2,
    dense_layers=2,
    hidden=7168,
    intermediate=18432,
    heads=16,
    q_rank=1536,
    kv_rank=512,
    nope_dim=64,
    rope_dim=128,
    v_dim=128,
)

# Not ru_maxrss: a forked child starts with its parent's.
PEAK = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
"""
OURS_IN_CHILD = (
    PEAK
    + """
import json, sys, time
import fp8ckpt
import torch
begun = time.perf_counter()
fp8ckpt.convert(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - begun, "peak": peak()}))
"""
)
PEER_IN_CHILD = (
    PEAK
    + """
import json, sys, time
import torch
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
begun = time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2], FP8BlockDequantizer.from_pretrained(sys.argv[1]))
print(json.dumps({"seconds": time.perf_counter() - begun, "peak": peak()}))
"""
)


def tree_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def against_cp(work: Path) -> None:
    source = sample(work / "fp8", LAYER, files=2)
    convert(source, work / "bf16")
    assert verify(source, work / "bf16").ok
    written = tree_bytes(work / "bf16")

    def ours() -> None:
        shutil.rmtree(work / "ours", ignore_errors=True)
        convert(source, work / "ours")

    def cp() -> None:
        subprocess.run(["rm", "-rf", str(work / "copy")], check=True)
        subprocess.run(["cp", "-r", str(work / "bf16"), str(work / "copy")], check=True)

    def cp_and_sync() -> None:
        cp()
        subprocess.run(["sync", *map(str, (work / "copy").iterdir())], check=True)

    def raw() -> None:
        (work / "raw").unlink(missing_ok=True)
        write_durably(work / "raw", written)

    rows = interleaved(
        {
            "ours (on disk when it returns)": ours,
            "raw durable write of as many bytes": raw,
            "cp of the output (in the page cache)": cp,
            "cp of the output, sync": cp_and_sync,
        }
    )
    show(
        f"convert of {tree_bytes(source) / 1e9:.2f} GB to {written / 1e9:.2f} GB; "
        "removing the last output included in each",
        rows,
        next(iter(rows)),
    )
    keep("convert-vs-cp", {"source_bytes": tree_bytes(source), "written_bytes": written, "seconds": rows})


def against_compressed_tensors(work: Path) -> None:
    source = sample(work / "blocks", BLOCKS, files=2)
    figures: dict[str, list[dict[str, float]]] = {"ours": [], "compressed-tensors": [], "cp of the output": []}
    for _ in range(3):
        for name, code in (("ours", OURS_IN_CHILD), ("compressed-tensors", PEER_IN_CHILD)):
            shutil.rmtree(work / name, ignore_errors=True)
            figures[name].append(child(code, source, work / name))
        result = verify(work / "ours", work / "compressed-tensors")
        assert not result.defects, result.defects[0]
        assert not result.tensor_differences, result.tensor_differences[0]
        shutil.rmtree(work / "copy", ignore_errors=True)
        seconds = interleaved(
            {"cp": lambda: subprocess.run(["cp", "-r", str(work / "ours"), str(work / "copy")], check=True) and None}, 1
        )
        figures["cp of the output"].append({"seconds": seconds["cp"]["median"]})
    print(
        f"\nconvert of {tree_bytes(source) / 1e9:.2f} GB in 128 x 128 blocks, each in a process of its own (best of 3)"
    )
    ours = min(run["seconds"] for run in figures["ours"])
    for name, runs in figures.items():
        best = min(run["seconds"] for run in runs)
        peak = f", peak {max(run['peak'] for run in runs) / 1e9:.2f} GB" if "peak" in runs[0] else ""
        print(f"  {name:<24} {best:6.2f} s  {best / ours:5.1f} x ours{peak}")
    keep("convert-vs-compressed-tensors", {"source_bytes": tree_bytes(source), "runs": figures})


def memory(work: Path) -> None:
    peaks = {}
    for factor in (1, 8):
        source = sample(
            work / f"size{factor}",
            Mistral3Sizes(layers=factor, hidden=4096, intermediate=8192, heads=32, kv_heads=8, head_dim=128),
            files=1,
        )
        peaks[factor] = {"source_bytes": tree_bytes(source), **child(OURS_IN_CHILD, source, work / f"out{factor}")}
        shutil.rmtree(source)
        shutil.rmtree(work / f"out{factor}")
    base = child(PEAK + "import json, torch; print(json.dumps({'peak': peak()}))")["peak"]
    print("\npeak memory of convert, in a process that has imported torch")
    print(f"  torch alone {base / 2**20:.0f} MiB")
    for row in peaks.values():
        print(
            f"  {row['source_bytes'] / 1e9:5.2f} GB source: {row['peak'] / 2**20:.0f} MiB, "
            f"{(row['peak'] - base) / 2**20:.0f} MiB above"
        )
    keep("convert-memory", {"torch_alone": base, "runs": peaks})


def main() -> None:
    for part in (against_cp, against_compressed_tensors, memory):
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
            part(Path(work))


if __name__ == "__main__":
    main()
