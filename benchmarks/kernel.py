"""The dequantizing kernel against what a peer would write in torch, and against a plain copy of the result."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from benchmarks.measuring import interleaved, keep
from fp8ckpt.numerics import kernels
from fp8ckpt.numerics.dequantize import Dequantizer, scale_table
from fp8ckpt.numerics.geometry import BlockGrid

ROWS, COLS = 4096, 12288  # 50 M elements; 150 MB of codes and values: far beyond the caches


def rates(runs: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Elements a second of each, the median of warm rounds taken in turn: what the machine does meanwhile falls on all
    alike.
    """
    for run in runs.values():
        run()
    return {name: ROWS * COLS / row["median"] for name, row in interleaved(runs, rounds, pause=0.3).items()}


def in_threads(work: Callable[[slice], None], count: int, rows: int = ROWS) -> Callable[[], None]:
    """Do the rows in ``count`` threads, each a whole number of 128."""
    edges = [i * (rows // 128) // count * 128 for i in range(count)] + [rows]
    parts = [slice(first, last) for first, last in pairwise(edges)]

    def run() -> None:
        threads = [threading.Thread(target=work, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def _kernels_in_cache() -> dict[str, float]:
    """The two kernels for one scale on codes that stay in the second-level cache: elements a second."""
    codes = np.random.default_rng(1).integers(0, 256, 1 << 18, np.uint8)
    scale = np.float32(0.00123)
    table = scale_table(np.array([scale]), "F8_E4M3", "BF16")[0]
    arithmetic, looked_up = np.empty((2, codes.size), np.uint16)
    runs = {
        "arithmetic": lambda: kernels.multiply_e4m3_to_bf16(
            codes[np.newaxis], scale.reshape(1, 1), 0, 0, 1, codes.size, arithmetic[np.newaxis]
        ),
        "look-up": lambda: kernels.look_up(codes, table, looked_up),
    }
    for run in runs.values():
        run()
    assert np.array_equal(arithmetic, looked_up)
    return {name: codes.size / seconds_of(run, 200) for name, run in runs.items()}


def seconds_of(run: Callable[[], None], rounds: int) -> float:
    """Seconds of one run, the median of warm rounds."""
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def main() -> None:
    cores = torch.get_num_threads()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (ROWS, COLS), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    out = torch.empty(ROWS, COLS, dtype=torch.bfloat16)
    bits = out.view(torch.uint16).numpy()
    result: dict[str, dict[str, float]] = {}
    for name, block in {
        "per tensor": (ROWS, COLS),
        "128 x 128": (128, 128),
        "per channel": (1, COLS),
        "1 x 32 (e8m0)": (1, 32),
    }.items():
        grid = BlockGrid((ROWS, COLS), block)
        if "e8m0" in name:
            stored = rng.integers(110, 125, grid.shape, np.uint8)
            dequantizer = Dequantizer(grid, stored, "U8", "F8_E4M3", "BF16")
        else:
            stored = np.exp2(rng.uniform(-12, -6, grid.shape)).astype(np.float32).view(np.uint32)
            dequantizer = Dequantizer(grid, stored, "F32", "F8_E4M3", "BF16")
        scales = torch.from_numpy(dequantizer.scales.copy())
        expanded = (
            scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            if name != "per tensor"
            else scales.reshape(())
        )
        reference = (weight.float() * expanded).to(torch.bfloat16)

        def ours(part: slice, dequantizer: Dequantizer = dequantizer) -> None:
            for row in range(part.start, part.stop, 128):  # one buffer at a time, as in the reader and the converter
                dequantizer.flat(codes[row : row + 128].reshape(-1), row * COLS, bits[row : row + 128].reshape(-1))

        in_threads(ours, cores)()
        assert torch.equal(out.view(torch.int16), reference.view(torch.int16)), name
        result[name] = rates(
            {
                "ours": in_threads(ours, cores),
                "torch": lambda expanded=expanded: (weight.float() * expanded).to(torch.bfloat16),  # type: ignore[misc]
                "copy": lambda reference=reference: out.copy_(reference),  # type: ignore[misc]
            }
        )
    print(f"\ndequantize to bf16, {cores} threads, warm memory (billion elements a second)")
    for name, row in result.items():
        ours_rate, torch_rate, copy_rate = (row[peer] / 1e9 for peer in ("ours", "torch", "copy"))
        print(
            f"  {name:<16} ours {ours_rate:5.2f}   (w.float() * s).to(bf16) "
            f"{torch_rate:5.2f} ({ours_rate / torch_rate:4.1f} x)"
            f"   bf16 copy_ {copy_rate:5.2f} ({ours_rate / copy_rate:4.2f} x)"
        )
    in_cache = _kernels_in_cache()
    print(
        f"  in cache, one thread: arithmetic {in_cache['arithmetic'] / 1e9:.2f}, "
        f"look-up {in_cache['look-up'] / 1e9:.2f}"
    )
    keep(
        "kernel",
        {
            "in_cache_one_thread": in_cache,
            "unit": "elements a second",
            "threads": cores,
            "shape": [ROWS, COLS],
            "rates": result,
        },
    )


if __name__ == "__main__":
    main()
