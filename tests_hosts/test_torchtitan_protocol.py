"""torchtitan's way of loading, which is three calls: ``to_hf``, ``dcp.load`` with a reader, ``from_hf``.

The calls are made here as its checkpoint manager makes them; torchtitan itself is not needed. With our reader the state
dict is a plain bfloat16 one. Placeholders of ``to_hf(quantization=True)`` are for readers that know nothing of FP8, as
torch's own; our reader fills them, too. All ways give the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

import fp8ckpt
from fp8ckpt.models.deepseek_v3.state_dict_adapter import DeepseekV3FP8StateDictAdapter
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from tests_hosts.models import build, modules_of, shard, sharded, spoil, wrong
from tests_hosts.ranks import Ranks

VARIANTS = ["identity", "nested", "uneven", "f32_scales", "shaped_scales", "bf16_linear", "blocks"]
WAYS = ["plain, our reader", "placeholders, our reader", "placeholders, torch's reader"]


def load(variant: str, source: Path, way: str, sharding: str) -> tuple[list[str], int, int, int]:
    """(wrong parameters, sharded ones, FP8 placeholders, bytes that our reader read) of one load by the protocol."""
    adapter: Any
    if variant == "blocks":
        model, adapter = modules_of(source), DeepseekV3FP8StateDictAdapter.from_checkpoint(source)
    else:
        model, adapter = build(source), Mistral3FP8StateDictAdapter.from_checkpoint(source)
    shard(model, sharding)
    spoil(model)
    reader = (
        HuggingFaceStorageReader(str(source)) if way.endswith("torch's reader") else fp8ckpt.FP8StorageReader(source)
    )

    state_dict = model.state_dict()
    hf = adapter.to_hf(state_dict, quantization=True) if way.startswith("placeholders") else adapter.to_hf(state_dict)
    placeholders = sum(tensor.dtype == torch.float8_e4m3fn for tensor in hf.values())
    dcp.load(hf, storage_reader=reader)
    model.load_state_dict(adapter.from_hf(hf))  # strict

    return wrong(model, source, variant == "nested"), sharded(model), placeholders, getattr(reader, "bytes_read", 0)


def assert_right(results: list[tuple[list[str], int, int, int]], source: Path, way: str) -> None:
    """No parameter is wrong, and there were placeholders only where they were asked for."""
    quantized = len(fp8ckpt.open_checkpoint(source).quantized)
    assert quantized
    for differing, _, placeholders, _ in results:
        assert differing == []
        assert placeholders == (quantized if way.startswith("placeholders") else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank(variant: str, way: str, sources: dict[str, Path]) -> None:
    """An unsharded model in one process."""
    assert_right([load(variant, sources[variant], way, "none")], sources[variant], way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks(variant: str, way: str, sources: dict[str, Path], two_ranks: Ranks) -> None:
    """FSDP2 over two ranks: shards whose edges meet no block, uneven ones among them."""
    results = two_ranks.run(load, variant, sources[variant], way, "fsdp")
    assert_right(results, sources[variant], way)
    assert all(count == len(fp8ckpt.open_checkpoint(sources[variant]).tensors) for _, count, _, _ in results)


@pytest.mark.parametrize("variant", ["identity", "blocks"])
def test_each_byte_is_read_once(variant: str, sources: dict[str, Path], two_ranks: Ranks) -> None:
    """Two ranks with FSDP2 shards read together what the tensors take on disk, no more."""
    checkpoint = fp8ckpt.open_checkpoint(sources[variant])
    stored = sum(
        (tensor.weight if hasattr(tensor, "weight") else tensor).nbytes for tensor in checkpoint.tensors.values()
    )
    assert sum(read for *_, read in two_ranks.run(load, variant, sources[variant], WAYS[0], "fsdp")) == stored


def test_parameters_are_filled_in_place(sources: dict[str, Path]) -> None:
    """With our reader the state dict's tensors are the parameters: there is no second copy of any."""
    model, adapter = build(sources["identity"]), Mistral3FP8StateDictAdapter.from_checkpoint(sources["identity"])
    spoil(model)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    hf = adapter.to_hf(model.state_dict())
    dcp.load(hf, storage_reader=fp8ckpt.FP8StorageReader(sources["identity"]))
    assert wrong(model, sources["identity"]) == []  # before from_hf
    assert {name: tensor.data_ptr() for name, tensor in adapter.from_hf(hf).items() if name in addresses} == addresses


def kinds_after_each_call(source: Path) -> list[set[tuple[bool, torch.dtype]]]:
    """(DTensor or not, dtype) of the FP8 weights after each of the three calls."""
    model, adapter = build(source), Mistral3FP8StateDictAdapter.from_checkpoint(source)
    shard(model, "fsdp")
    names = [tensor.name for tensor in fp8ckpt.open_checkpoint(source).quantized]
    hf = adapter.to_hf(model.state_dict(), quantization=True)
    seen = [hf]
    dcp.load(hf, storage_reader=HuggingFaceStorageReader(str(source)))
    seen += [hf, adapter.from_hf(hf)]
    return [{(isinstance(state[name], DTensor), state[name].dtype) for name in names} for state in seen]


def test_dtensors_stay_dtensors(sources: dict[str, Path], two_ranks: Ranks) -> None:
    """FP8 placeholders are DTensors, and so are the values made of them."""
    codes, values = {(True, torch.float8_e4m3fn)}, {(True, torch.bfloat16)}
    assert two_ranks.run(kinds_after_each_call, sources["identity"]) == [[codes, codes, values]] * 2
