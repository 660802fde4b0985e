"""`convert --to fp8` against reading its source and copying its output; and quantizing one weight of real width against
peers.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.convert import BLOCKS, LAYER, PEAK, tree_bytes
from benchmarks.kernel import in_threads
from benchmarks.measuring import child, interleaved, keep, read_all, show, write_durably
from fp8ckpt import convert, sample
from fp8ckpt.encodings.results import Fp8Result
from fp8ckpt.numerics import quantize, scaling
from fp8ckpt.numerics.codes import F32, scale_values
from fp8ckpt.numerics.geometry import BlockGrid
from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes

QUANTIZE_IN_CHILD = (
    PEAK
    + """
import json, sys, time
import fp8ckpt
import torch
begun = time.perf_counter()
fp8ckpt.convert(sys.argv[1], sys.argv[2], to="fp8", like=sys.argv[3], scales=sys.argv[4])
print(json.dumps({"seconds": time.perf_counter() - begun, "peak": peak()}))
"""
)


def against_copies(work: Path, name: str, sizes: Mistral3Sizes | DeepseekSizes) -> None:
    """The whole job, its report included or not, against the floor: reading as many bytes and writing as many durably;
    and against ``cat SRC > /dev/null`` and ``cp`` and ``sync`` of what it writes.
    """
    base = sample(work / "fp8", sizes, files=2)
    convert(base, work / "bf16")
    subprocess.run(["cp", "-r", str(base), str(work / "to-copy")], check=True)
    done = convert(work / "bf16", work / "back", to="fp8", like=base)
    assert isinstance(done, Fp8Result)
    assert done.report is not None
    assert done.report.total.moved == 0
    subprocess.run(["diff", "-r", str(base), str(work / "back")], check=True)
    fresh = convert(work / "bf16", work / "fresh", to="fp8", like=base, scales="fresh")
    assert isinstance(fresh, Fp8Result)
    sizes_of = {"source": tree_bytes(work / "bf16"), "output": tree_bytes(base)}
    shutil.rmtree(work / "back")
    shutil.rmtree(work / "fresh")

    def ours(**how: object) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(work / "out", ignore_errors=True)
            convert(work / "bf16", work / "out", to="fp8", like=base, **how)  # type: ignore[arg-type]

        return run

    def copies(*, sync: bool) -> None:
        subprocess.run(["rm", "-rf", str(work / "copy")], check=True)
        subprocess.run(f"cat '{work}'/bf16/*.safetensors > /dev/null", shell=True, check=True)
        subprocess.run(["cp", "-r", str(work / "to-copy"), str(work / "copy")], check=True)
        if sync:
            subprocess.run(["sync", *map(str, (work / "copy").iterdir())], check=True)

    def floor() -> None:
        (work / "raw").unlink(missing_ok=True)
        read_all((work / "bf16").glob("*.safetensors"))
        write_durably(work / "raw", sizes_of["output"])

    rows = interleaved(
        {
            "the floor: reading SRC, raw durable write": floor,
            "ours, scales kept, no report": ours(report=False),
            "ours, scales kept, report": ours(),
            "ours, fresh scales, no report": ours(scales="fresh", report=False),
            "ours, fresh scales, report": ours(scales="fresh"),
            "cat SRC, cp DST (in the page cache)": lambda: copies(sync=False),
            "cat SRC, cp DST, sync": lambda: copies(sync=True),
        }
    )
    title = (
        f"{name}: {sizes_of['source'] / 1e9:.2f} GB of bf16 to {sizes_of['output'] / 1e9:.2f} GB of FP8; "
        "ours is on disk when it returns"
    )
    show(title, rows, "ours, scales kept, no report")
    counts = {
        "kept": {
            "source_read": done.bytes_read,
            "base_codes_read": done.base_bytes_read,
            "rewritten": done.bytes_rewritten,
        },
        "fresh": {
            "source_read": fresh.bytes_read,
            "base_codes_read": fresh.base_bytes_read,
            "rewritten": fresh.bytes_rewritten,
        },
    }
    print(f"  bytes read: {counts}")
    keep(f"quantize-{name.replace(' ', '-')}", {**sizes_of, "counts": counts, "seconds": rows})


def memory(work: Path) -> None:
    peaks = {}
    alone = child(PEAK + "import json, torch\nprint(json.dumps({'peak': peak()}))")["peak"]
    for factor in (1, 6):
        sizes = Mistral3Sizes(layers=factor, hidden=4096, intermediate=8192, heads=32, kv_heads=8, head_dim=128)
        base = sample(work / f"base{factor}", sizes, files=1)
        convert(base, work / f"plain{factor}")
        for scales in ("reuse", "fresh"):
            out = work / f"out{factor}{scales}"
            peak = child(QUANTIZE_IN_CHILD, work / f"plain{factor}", out, base, scales)["peak"]
            peaks[f"{scales} {factor}"] = {
                "source_bytes": tree_bytes(work / f"plain{factor}"),
                "above_torch": peak - alone,
            }
            shutil.rmtree(out)
    print("\npeak memory above a process that imports torch")
    for name, row in peaks.items():
        print(f"  {name:<10} source {row['source_bytes'] / 1e9:5.2f} GB   {row['above_torch'] / 2**20:6.1f} MiB")
    keep("quantize-memory", peaks)


def one_weight() -> None:
    """Fresh scales and codes of one weight of Mistral Medium 3.5, in memory, against what peers do with it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    rows, cols, threads = 28672, 12288, torch.get_num_threads()
    weight = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    values = quantize.values_of(weight.view(torch.uint8).numpy().reshape(-1), "BF16")
    codes = np.empty(rows * cols, np.uint8)
    results = {}
    for name, block in (("per tensor", (rows, cols)), ("128 x 128", (128, 128))):
        grid = BlockGrid((rows, cols), block)
        found: dict[str, torch.Tensor] = {}

        def ours(grid: BlockGrid = grid, found: dict[str, torch.Tensor] = found) -> None:
            maxima: list[F32] = []

            def bands(part: slice) -> Iterator[tuple[list[quantize.Part], quantize.Values, slice]]:
                for row in range(part.start, part.stop, 128):  # one band at a time, as in the converter
                    run = slice(row * cols, (row + 128) * cols)
                    yield (
                        quantize.parts_of_run(grid, run.start, 128 * cols),
                        values._replace(bits=values.bits[run]),
                        run,
                    )

            def look(part: slice) -> None:
                own = quantize.block_array(grid, np.float32)
                for parts, band, _ in bands(part):
                    quantize.raise_maxima(parts, band, own)
                maxima.append(own)

            def code(part: slice) -> None:
                for parts, band, run in bands(part):
                    quantize.encode(parts, band, scales, codes[run])

            in_threads(look, threads, rows)()
            scales = scale_values(scaling.fresh_scales(np.maximum.reduce(maxima), "F32"), "F32")
            in_threads(code, threads, rows)()
            found["ours"] = torch.from_numpy(codes).reshape(rows, cols)

        def formula(block: tuple[int, int] = block, found: dict[str, torch.Tensor] = found) -> None:
            tiles = weight.float().reshape(rows // block[0], block[0], cols // block[1], block[1])
            scales = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448
            found["torch"] = (
                (tiles / scales).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).reshape(rows, cols)
            )

        def theirs(block: tuple[int, int] = block, found: dict[str, torch.Tensor] = found) -> None:
            config = SimpleNamespace(weight_block_size=None if block[0] == rows else block, scale_fmt=None)
            quantizer: Any = Fp8Quantize(SimpleNamespace(quantization_config=config))
            found["transformers"] = quantizer.convert({"w.weight": weight})["w.weight"].view(torch.uint8)

        def compressed(block: tuple[int, int] = block, found: dict[str, torch.Tensor] = found) -> None:
            strategy = (
                {"strategy": "tensor"} if block[0] == rows else {"strategy": "block", "block_structure": list(block)}
            )
            arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, **strategy)
            tiles = weight.reshape(rows // block[0], block[0], cols // block[1], block[1])
            low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
            scale, zero = calculate_qparams(low, high, arguments)
            found["compressed-tensors"] = ct_quantize(weight, scale, zero, arguments, torch.float8_e4m3fn).view(
                torch.uint8
            )

        runs = {
            "ours": ours,
            "torch, by the contract": formula,
            "transformers": theirs,
            "compressed-tensors": compressed,
        }
        for run in runs.values():
            run()
        assert torch.equal(found["ours"], found["torch"]), name
        same = {
            peer: float((found[peer] == found["ours"]).float().mean())
            for peer in ("transformers", "compressed-tensors")
        }
        found.clear()
        seconds = interleaved(runs, 3, pause=0.3)
        show(f"one weight {rows} x {cols}, {name}, fresh scales, in memory", seconds, "ours")
        print(f"  codes that are the contract's: {same}")
        results[name] = {"seconds": seconds, "codes_of_the_contract": same}
    keep("quantize-one-weight", results)


def main() -> None:
    for name, sizes in (("per tensor", LAYER), ("blocks", BLOCKS)):
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
            against_copies(Path(work), name, sizes)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as work:
        memory(Path(work))
    one_weight()


if __name__ == "__main__":
    main()
