"""PEFT directories made by hand, and what merging them must give, spelled with numpy an operation at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.oracle import Stored, write_safetensors

F32 = npt.NDArray[np.float32]
PREFIX = "base_model.model."


def values(*shape: int, dtype: str = "F32", seed: int = 1) -> Stored:
    """Normal deviates."""
    return Stored.of(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), dtype)


def factors(
    module: str, rank: int = 4, cols: int = 16, rows: int = 8, dtype: str = "F32", experts: int = 1, seed: int = 1
) -> dict[str, Stored]:
    """The two factors of a module; of ``experts``, stacked as PEFT does."""
    return {
        f"{module}.lora_A.weight": values(rank * experts, cols, dtype=dtype, seed=seed),
        f"{module}.lora_B.weight": values(rows, rank * experts, dtype=dtype, seed=seed + 1),
    }


def write_adapter(directory: Path, tensors: dict[str, Stored], **config: Any) -> Path:
    """A PEFT directory."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory


def in_order(left: F32, right: F32, scaling: float, value: F32) -> F32:
    """``value + scaling * (left @ right)`` in float32, products added in the order of the rank, from zero."""
    total = np.zeros_like(value)
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k]
    return value + np.float32(scaling) * total


def merged(value: F32, a: Stored, b: Stored, scaling: float) -> F32:
    """A matrix, or a stack of experts [E, out, in], with a pair of factors added."""
    left, right = b.array.astype(np.float32), a.array.astype(np.float32)
    if value.ndim == 2:
        return in_order(left, right, scaling, value)
    count = value.shape[0]
    rank = right.shape[0] // count
    return np.stack(
        [in_order(left[:, e::count], right[e * rank : (e + 1) * rank], scaling, value[e]) for e in range(count)]
    )
