"""Looking up packed codes of four bits, against a plain copy of the result and what transformers and compressed-tensors
do with the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from benchmarks.kernel import in_threads
from benchmarks.measuring import interleaved, keep
from fp8ckpt.numerics.codes import F4, Factor
from fp8ckpt.numerics.dequantize import Dequantizer
from fp8ckpt.numerics.geometry import BlockGrid

SHAPE = (4096, 11520)  # rows, columns: two of gpt-oss's experts


def main(shape: tuple[int, int] = SHAPE, rounds: int = 15) -> None:
    rows, cols = shape
    cores, rng = torch.get_num_threads(), np.random.default_rng(0)
    packed = rng.integers(0, 256, (rows, cols // 2), np.uint8)
    out = torch.empty(rows, cols, dtype=torch.bfloat16)
    bits = out.view(torch.uint16).numpy()
    result: dict[str, dict[str, float]] = {}
    for name, dtype, group in (("MXFP4", "U8", 32), ("NVFP4", "F8_E4M3", 16)):
        grid = BlockGrid(shape, (1, group))
        scales = (
            rng.integers(40, 120, grid.shape, np.uint8) if group == 16 else rng.integers(115, 130, grid.shape, np.uint8)
        )
        factor = Factor(np.float32(2688 / 0.37), divides=True) if group == 16 else None
        dequantizer = Dequantizer(grid, scales, dtype, F4, "BF16", factor)

        def ours(part: slice, dequantizer: Dequantizer = dequantizer) -> None:
            for row in range(part.start, part.stop, 128):
                dequantizer.flat(packed[row : row + 128].reshape(-1), row * cols, bits[row : row + 128].reshape(-1))

        def transformers(scales: np.ndarray = scales) -> torch.Tensor:
            blocks = torch.from_numpy(packed).reshape(1, rows, -1, 16)
            return convert_moe_packed_tensors(blocks, torch.from_numpy(scales)[None])

        def compressed_tensors(
            scales: np.ndarray = scales, factor: Factor | None = factor, group: int = group
        ) -> torch.Tensor:
            codes = unpack_fp4_from_uint8(torch.from_numpy(packed), rows, cols).reshape(rows, -1, group)
            if factor is None:
                multipliers = 2.0 ** (torch.from_numpy(scales).to(torch.int32) - 127).to(torch.bfloat16)
            else:
                wide = torch.from_numpy(scales).view(torch.float8_e4m3fn).to(torch.bfloat16)
                multipliers = wide / torch.tensor([float(factor.value)])
            found: torch.Tensor = (codes * multipliers[..., None]).to(torch.bfloat16).reshape(rows, cols)
            return found

        run = in_threads(ours, cores, rows)
        run()
        reference = compressed_tensors()
        assert torch.equal(out.view(torch.int16), reference.view(torch.int16)), name
        runs: dict[str, Callable[[], object]] = {
            "ours": run,
            "compressed-tensors": compressed_tensors,
            "copy": partial(out.copy_, reference),
        }
        if factor is None:
            assert torch.equal(out.view(torch.int16), transformers()[0].T.contiguous().view(torch.int16))
            runs["transformers"] = transformers
        for once in runs.values():
            once()
        rates = {peer: rows * cols / row["median"] for peer, row in interleaved(runs, rounds, pause=0.3).items()}
        result[name] = rates
        peers = ", ".join(
            f"{peer} {rate / 1e9:.2f} ({rates['ours'] / rate:.2f} x)" for peer, rate in rates.items() if peer != "ours"
        )
        print(f"{name} to bf16, {cores} threads (billion elements a second): ours {rates['ours'] / 1e9:.2f}; {peers}")
    if rounds > 1:
        keep("four_bits", {"unit": "elements a second", "threads": cores, "shape": list(shape), "rates": result})


if __name__ == "__main__":
    main((256, 1024), 1) if sys.argv[1:] == ["--smoke"] else main()
