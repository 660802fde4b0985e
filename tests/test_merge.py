"""Merging adapters by hand-made files: the bytes of the way back from merged float32 values, whatever the pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8ckpt import convert, merge, open_checkpoint, plan_merge
from tests.adapters import F32, PREFIX, factors, merged, write_adapter
from tests.miniatures import Family, families
from tests.oracle import Stored, dequantize, read_directory, write_safetensors

E4M3 = {
    name: family
    for name, family in families().items()
    if family.blocks and {family.tensors[w].dtype for w in family.blocks} == {"F8_E4M3"}
}
SCALING = 2.0


def tree(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def floats(family: Family, weight: str) -> F32:
    """What a weight dequantizes to in float32."""
    scale, block = family.blocks[weight]
    data = dequantize(family.tensors[weight], family.tensors[scale], block, "F32")
    return np.frombuffer(data, np.float32).reshape(family.tensors[weight].shape)


def adapter_of(name: str, value: F32, strength: float, seed: int = 5) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Factors of one weight whose product is about ``strength`` times its largest element; and their configuration."""
    experts, config = 1, {}
    module = name.removesuffix(".weight")
    if value.ndim == 3:
        experts, config = value.shape[0], {"target_parameters": [name]}
        module = name.rpartition(".")[0]
    made = factors(PREFIX + module, 4, value.shape[-1], value.shape[-2], experts=experts, seed=seed)
    key = f"{PREFIX}{module}.lora_B.weight"
    factor = strength * float(np.abs(value).max()) / 4
    made[key] = Stored.of(made[key].array * np.float32(factor), "F32")
    return made, config


def expected_of(name: str, value: F32, made: dict[str, Stored], scaling: float = SCALING) -> F32:
    a, b = (next(tensor for key, tensor in made.items() if f"lora_{side}" in key) for side in "AB")
    return merged(value, a, b, scaling)


@pytest.mark.parametrize("strength", [1e-4, 0.5])
@pytest.mark.parametrize("name", E4M3)
def test_the_bytes_of_the_way_back(name: str, strength: float, tmp_path: Path) -> None:
    """To FP8 a merge is what converting the merged values in float32 with the same base is: the same codes and scales,
    kept where they fit and for siblings together, and everything else byte for byte.
    """
    family = E4M3[name]
    base = family.write(tmp_path / "base", files=2)
    weight = next(iter(family.blocks))
    value = floats(family, weight)
    made, config = adapter_of(family.name(weight), value, strength)
    adapter = write_adapter(tmp_path / "adapter", made, **config)
    source = {
        key: Stored.of(floats(family, key), "F32") if key in family.blocks else tensor
        for key, tensor in family.tensors.items()
        if key in family.blocks or family.name(key) in open_checkpoint(base).tensors
    }
    source[weight] = Stored.of(expected_of(weight, value, made), "F32")
    (tmp_path / "source").mkdir()
    write_safetensors(
        tmp_path / "source/model.safetensors", {family.name(key): tensor for key, tensor in source.items()}
    )
    back = convert(tmp_path / "source", tmp_path / "back", to="fp8", like=base)
    planned = plan_merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists()
    result = merge(base, adapter, tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(tmp_path / "back")
    assert planned.bytes_to_write == sum(map(len, tree(tmp_path / "merged").values()))
    assert (planned.files, planned.fits) == (result.files, True)
    assert planned.bytes_to_read >= result.bytes_read or result.bytes_rewritten
    assert (result.to, result.merged) == ("fp8", 1)
    [row] = result.report.weights
    [other] = [row for row in back.report.weights if row.name == family.name(weight)]
    assert (row.clipped, row.fresh, row.scales) == (other.clipped, other.fresh, other.scales)


@pytest.mark.parametrize("name", families())
def test_to_bf16(name: str, tmp_path: Path) -> None:
    """Of every format, the merged weight is rounded once from float32; all else is what a conversion writes."""
    family = families()[name]
    if not family.blocks:
        pytest.fail("a family without FP8 weights")
    base = family.write(tmp_path / "base", files=2)
    weight = next(iter(family.blocks))
    value = floats(family, weight)
    made, config = adapter_of(family.name(weight), value, 0.01)
    adapter = write_adapter(tmp_path / "adapter", made, **config)
    convert(base, tmp_path / "plain")
    result = merge(base, adapter, tmp_path / "merged", to="bf16", workers=2)
    one, two = read_directory(tmp_path / "merged"), read_directory(tmp_path / "plain")
    with np.errstate(all="ignore"):
        two[family.name(weight)] = Stored.of(expected_of(weight, value, made), "BF16")
    assert one == two
    assert tree(tmp_path / "merged").keys() == tree(tmp_path / "plain").keys()
    assert result.merged == 1
