"""The dequantizing kernel against what a peer would write in torch, and against a plain copy of the result."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measuring import keep
from fp8ckpt.numerics.dequantize import Dequantizer
from fp8ckpt.numerics.grid import BlockGrid

ROWS, COLS = 4096, 12288  # 50 M elements; 150 MB of codes and values: far beyond the caches


def rate(run: Callable[[], None], rounds: int = 15) -> float:
    """Elements a second, the median of warm rounds."""
    run()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return ROWS * COLS / statistics.median(seconds)


def in_threads(work: Callable[[slice], None], count: int) -> Callable[[], None]:
    """Do the rows in ``count`` threads."""
    parts = [slice(i * ROWS // count, (i + 1) * ROWS // count) for i in range(count)]

    def run() -> None:
        threads = [threading.Thread(target=work, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def main() -> None:
    cores = torch.get_num_threads()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (ROWS, COLS), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    out = torch.empty(ROWS, COLS, dtype=torch.bfloat16)
    bits = out.view(torch.uint16).numpy()
    result: dict[str, dict[str, float]] = {}
    for name, block in {"per tensor": (ROWS, COLS), "128 x 128": (128, 128), "per channel": (1, COLS), "1 x 32 (e8m0)": (1, 32)}.items():
        grid = BlockGrid((ROWS, COLS), block)
        if "e8m0" in name:
            stored = rng.integers(110, 125, grid.shape, np.uint8)
            dequantizer = Dequantizer(grid, stored, "U8", "F8_E4M3", "BF16")
        else:
            stored = np.exp2(rng.uniform(-12, -6, grid.shape)).astype(np.float32).view(np.uint32)
            dequantizer = Dequantizer(grid, stored, "F32", "F8_E4M3", "BF16")
        scales = torch.from_numpy(dequantizer.scales.copy())
        expanded = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) if name != "per tensor" else scales.reshape(())
        reference = (weight.float() * expanded).to(torch.bfloat16)

        def ours(part: slice, dequantizer: Dequantizer = dequantizer) -> None:
            for row in range(part.start, part.stop, 128):  # as the reader and the converter call it: a buffer at a time
                dequantizer.flat(codes[row : row + 128].reshape(-1), row * COLS, bits[row : row + 128].reshape(-1))

        in_threads(ours, cores)()
        assert torch.equal(out.view(torch.int16), reference.view(torch.int16)), name
        result[name] = {"ours": rate(in_threads(ours, cores))}
        result[name]["torch"] = rate(lambda expanded=expanded: (weight.float() * expanded).to(torch.bfloat16))  # type: ignore[misc]
        result[name]["copy"] = rate(lambda reference=reference: out.copy_(reference))  # type: ignore[misc]
    print(f"\ndequantize to bf16, {cores} threads, warm memory (billion elements a second)")
    for name, rates in result.items():
        ours_rate, torch_rate, copy_rate = (rates[peer] / 1e9 for peer in ("ours", "torch", "copy"))
        print(
            f"  {name:<16} ours {ours_rate:5.2f}   (w.float() * s).to(bf16) {torch_rate:5.2f} ({ours_rate / torch_rate:4.1f} x)"
            f"   bf16 copy_ {copy_rate:5.2f} ({ours_rate / copy_rate:4.2f} x)"
        )
    keep("kernel", {"unit": "elements a second", "threads": cores, "shape": [ROWS, COLS], "rates": result})


if __name__ == "__main__":
    main()
