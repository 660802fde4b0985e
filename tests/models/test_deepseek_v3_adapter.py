"""The block-scaled sibling: grids of 128 x 128, ragged, and shards whose edges do not meet those of blocks."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fp8ckpt import FP8StorageReader, StateDictAdapter, open_checkpoint
from fp8ckpt.errors import ScaleShapeError, ScaleValueError, UnsupportedFormatError, WeightValueError
from fp8ckpt.models.deepseek_v3 import state_dict_adapter as module
from fp8ckpt.models.deepseek_v3.state_dict_adapter import DeepseekV3FP8StateDictAdapter
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from fp8ckpt.tensors.reading import torch_dtype
from tests.distributed import assert_same, bits, mesh, rescaled, run, single
from tests.oracle import Stored, dequantize, read_directory, write_safetensors
from tests.support import ALL, examples

BLOCK = (128, 128)
# Rows that 8 ranks cut within blocks, columns that are no multiple of 128, fewer rows than ranks.
SHAPES = {"a.weight": (576, 200), "b.weight": (1536, 300), "c.weight": (5, 130), "d.weight": (260, 7)}


def _grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    return -(-shape[0] // 128), -(-shape[1] // 128)


def _stored() -> dict[str, Stored]:
    rng = np.random.default_rng(5)
    tensors = {}
    for name, shape in SHAPES.items():
        codes = rng.integers(0, 256, shape, np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x3A
        tensors[name] = Stored.codes(codes)
        tensors[name + "_scale_inv"] = Stored.of(np.exp2(rng.uniform(-14, -2, _grid(shape))).astype(np.float32), "F32")
    tensors["model.norm.weight"] = Stored.of(rng.standard_normal(9).astype(np.float32), "BF16")
    return tensors


def _expected() -> dict[str, torch.Tensor]:
    stored = _stored()
    found = {}
    for name, shape in SHAPES.items():
        data = dequantize(stored[name], stored[name + "_scale_inv"], BLOCK, "BF16")
        found[name] = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
    norm = bytearray(stored["model.norm.weight"].data)
    return {**found, "model.norm.weight": torch.frombuffer(norm, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `SHAPES`, its scales in another file than the weights."""
    path = tmp_path_factory.mktemp("blocks")
    stored = _stored()
    for i, scales in enumerate((False, True)):
        held = {name: tensor for name, tensor in stored.items() if (tensor.dtype == "F32") == scales}
        write_safetensors(path / f"model-0000{i + 1}-of-00002.safetensors", held, {"format": "pt"})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (path / "config.json").write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------- one process


def test_interface() -> None:
    """The same interface as its sibling; names and a layout name by default."""
    adapter = DeepseekV3FP8StateDictAdapter()
    assert isinstance(adapter, StateDictAdapter)
    assert (adapter.layout_name, adapter.block_size) == ("deepseek_v3", (128, 128))
    assert adapter.native_to_hf("x") == adapter.hf_to_native("x") == "x"
    assert adapter
    adapter._paramwrapper_layout_hint = "set"
    assert module.logger is logging.getLogger("fp8ckpt.models.deepseek_v3.state_dict_adapter")
    renamed = DeepseekV3FP8StateDictAdapter(
        native_to_hf=lambda k: "disk." + k, hf_to_native=lambda k: k.removeprefix("disk.")
    )
    hf = renamed.to_hf({"a.weight": torch.zeros(2, 2)}, quantization=True)
    assert list(hf) == ["disk.a.weight", "disk.a.weight_scale_inv"]
    assert list(renamed.from_hf(hf)) == ["a.weight"]


@pytest.mark.parametrize(("name", "fp8"), [
    ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", True),
    ("model.layers.3.mlp.gate_proj.weight", True),
    ("model.layers.3.mlp.experts.7.down_proj.weight", True),
    ("model.layers.3.mlp.gate.weight", False),
    ("model.layers.3.mlp.gate.e_score_correction_bias", False),
    ("model.layers.3.self_attn.q_a_layernorm.weight", False),
    ("model.layers.3.input_layernorm.weight", False),
    ("model.layers.61.eh_proj.weight", False),
    ("model.layers.61.enorm.weight", False),
    ("model.layers.61.shared_head.head.weight", False),
    ("model.layers.61.shared_head.norm.weight", False),
    ("model.embed_tokens.weight", False),
    ("model.norm.weight", False),
    ("lm_head.weight", False),
])  # fmt: skip
def test_rule_of_names_is_the_releases(name: str, fp8: bool) -> None:
    """Without a file, a name decides: Linears are FP8, and not routers, norms, embeddings, heads."""
    assert DeepseekV3FP8StateDictAdapter().is_fp8_weight(name) is fp8


def test_rule_of_names_agrees_with_the_sample(sample_block: Path) -> None:
    """By name or by file, the same weights are FP8 in a DeepSeek-shaped checkpoint."""
    checkpoint = open_checkpoint(sample_block)
    quantized = {tensor.name for tensor in checkpoint.quantized}
    for adapter in (DeepseekV3FP8StateDictAdapter(), DeepseekV3FP8StateDictAdapter.from_checkpoint(sample_block)):
        assert {name for name in checkpoint.tensors if adapter.is_fp8_weight(name)} == quantized


def test_placeholders(blocks: Path) -> None:
    """Codes of the weight's shape, and a whole grid of scales, rounded up: F32, or of the file's dtype."""
    native = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    native["model.norm.weight"] = torch.ones(9)
    for adapter in (DeepseekV3FP8StateDictAdapter(), DeepseekV3FP8StateDictAdapter.from_checkpoint(blocks)):
        hf = adapter.to_hf(native, quantization=True, for_checkpoint_load=True)
        assert list(hf) == [key for name in SHAPES for key in (name, name + "_scale_inv")] + ["model.norm.weight"]
        for name, shape in SHAPES.items():
            assert (hf[name].dtype, hf[name].shape) == (torch.float8_e4m3fn, shape)
            scale = hf[name + "_scale_inv"]
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, _grid(shape))
        assert hf["model.norm.weight"] is native["model.norm.weight"]
        assert all(adapter.to_hf(native)[name] is native[name] for name in native)
    with pytest.raises(UnsupportedFormatError, match=r"x\.weight"):
        DeepseekV3FP8StateDictAdapter().to_hf({"x.weight": torch.zeros(3)}, quantization=True)


def test_placeholders_of_bf16_scales(sample_block: Path, tmp_path: Path) -> None:
    """Scales on disk may be BF16: so are the placeholders."""
    path = rescaled(sample_block, tmp_path / "bf16", lambda scales: Stored.of(scales, "BF16"))
    adapter = DeepseekV3FP8StateDictAdapter.from_checkpoint(path)
    tensor = open_checkpoint(path).quantized[0]
    hf = adapter.to_hf({tensor.name: torch.zeros(tensor.shape)}, quantization=True)
    assert hf[tensor.name + "_scale_inv"].dtype == torch.bfloat16


def test_other_scales_are_refused(sample_fp8: Path) -> None:
    """A per-tensor checkpoint is its sibling's."""
    with pytest.raises(UnsupportedFormatError, match="use load_model or FP8StorageReader"):
        DeepseekV3FP8StateDictAdapter.from_checkpoint(sample_fp8)


def test_from_hf_refuses_what_cannot_be_a_grid() -> None:
    """A grid of the wrong shape and a zero scale are refused by the tensor's name; a weight without a scale passes."""
    weight = torch.zeros(200, 200).to(torch.float8_e4m3fn)
    adapter = DeepseekV3FP8StateDictAdapter()
    with pytest.raises(ScaleShapeError, match=r"a\.weight"):
        adapter.from_hf({"a.weight": weight, "a.weight_scale_inv": torch.ones(2, 3)})
    with pytest.raises(ScaleValueError, match=r"a\.weight"):
        adapter.from_hf({"a.weight": weight, "a.weight_scale_inv": torch.zeros(2, 2)})
    assert adapter.from_hf({"a.weight": weight})["a.weight"] is weight


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 1 << 30), size=st.integers(-40, 20))
@examples(40)
def test_convert_single_within_rounding(rows: int, columns: int, seed: int, size: int) -> None:
    """Each block has the scale ``amax / 448``, and 1 if zero; each element is within half a step of e4m3."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    weight[:128, :128] = 0
    pairs = DeepseekV3FP8StateDictAdapter().convert_single_tensor_to_hf("a.weight", weight, quantization=True)
    assert [key for key, _ in pairs] == ["a.weight", "a.weight_scale_inv"]
    (_, codes), (_, scales) = pairs
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, _grid((rows, columns)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            amax, scale = weight[part].abs().max(), scales[i, j]
            assert float(scale) == (float(amax / 448) if float(amax) else 1.0)
            error = (codes[part].double() * scale.double() - weight[part].double()).abs()
            most = torch.maximum(weight[part].double().abs() / 16, scale.double() / 1024) * 1.0001
            assert bool((error <= most).all())


def test_what_was_fp8_is_reproduced_exactly(sample_block: Path, blocks: Path) -> None:
    """Weights that were FP8, loaded as BF16: their own codes and scales again, whatever the largest code of a block."""
    differing = []
    for path in (sample_block, blocks):
        checkpoint, adapter = open_checkpoint(path), DeepseekV3FP8StateDictAdapter.from_checkpoint(path)
        stored = read_directory(path)
        for name in (tensor.name for tensor in checkpoint.quantized):
            weight = checkpoint.read(name)
            hf = dict(adapter.convert_single_tensor_to_hf(name, weight, quantization=True))
            if [bits(tensor) for tensor in hf.values()] != [stored[key].data for key in hf]:
                differing.append(name)
    assert differing == []


def test_new_scales_are_powers_of_two_where_the_file_says_so(sample_block: Path, tmp_path: Path) -> None:
    """``scale_fmt`` "ue8m0": the least power of two not below ``amax / 448`` where a block outgrew its scale, and the
    file's own scale elsewhere; scales of F32 and of exponents alike.
    """

    def say(config: dict[str, Any]) -> None:
        config["quantization_config"]["scale_fmt"] = "ue8m0"

    for dtype in ("F32", "F8_E8M0"):
        change = lambda scales, dtype=dtype: Stored.of(np.full_like(scales, 2.0**-10), dtype)  # noqa: E731
        path = rescaled(sample_block, tmp_path / dtype, change, config=say)
        checkpoint, adapter = open_checkpoint(path), DeepseekV3FP8StateDictAdapter.from_checkpoint(path)
        tensor = next(tensor for tensor in checkpoint.quantized if math.prod(tensor.scale.shape) > 1)
        weight = checkpoint.read(tensor.name)
        weight[:128, :128] *= 3.3
        _, scales = single(adapter, weight, tensor.name)
        expected = torch.full(tensor.scale.shape, 2.0**-10)
        expected[0, 0] = 2.0 ** math.ceil(math.log2(float(weight[:128, :128].abs().max()) / 448))
        assert_same(scales, expected.to(scales.dtype))
        assert scales.dtype == torch_dtype(dtype)


def test_fresh_scales_have_the_files_dtype(sample_block: Path, tmp_path: Path) -> None:
    """Where the file's scales are BF16, those that go out are too, rounded up so that nothing clips."""
    path = rescaled(sample_block, tmp_path / "bf16", lambda scales: Stored.of(scales, "BF16"))
    adapter, name = DeepseekV3FP8StateDictAdapter.from_checkpoint(path), open_checkpoint(path).quantized[0].name
    weight = torch.randn(130, 140)
    codes, scales = single(adapter, weight, name)
    assert (scales.dtype, tuple(scales.shape)) == (torch.bfloat16, (2, 2))
    assert float((adapter.from_hf({"a": codes, "a_scale_inv": scales})["a"].float() - weight).abs().max()) < 0.3


def test_what_is_not_finite_is_refused() -> None:
    """NaN and infinity have no code."""
    for bad in (float("nan"), float("-inf")):
        weight = torch.ones(130, 3)
        weight[129, 2] = bad
        with pytest.raises(WeightValueError, match=r"a\.weight: 1 elements .*not finite"):
            single(DeepseekV3FP8StateDictAdapter(), weight)


# ---------------------------------------------------------------- shards


def _load_by_placeholders(path: Path, placements: list[Placement] | None) -> None:
    """torch's own reader fetches codes and scales into the placeholders; from_hf makes of them the oracle's values."""
    expected = _expected()
    native = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
    if placements is not None:
        over = mesh()
        for name in SHAPES:
            native[name] = distribute_tensor(native[name], over, placements)
    adapter = DeepseekV3FP8StateDictAdapter.from_checkpoint(path)
    hf = adapter.to_hf(native, quantization=True)
    dcp.load(hf, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=placements is None)
    for name, value in adapter.from_hf(hf).items():
        if placements is not None and name in SHAPES:
            assert isinstance(value, DTensor)
            assert value.placements == tuple(placements)
            value = value.full_tensor()
        assert_same(value, expected[name], (name, placements))

    placeholders = adapter.to_hf(native, quantization=True)
    dcp.load(placeholders, storage_reader=FP8StorageReader(path), no_dist=placements is None)
    for name in hf:
        one, two = (t.to_local() if isinstance(t, DTensor) else t for t in (hf[name], placeholders[name]))
        assert bits(one) == bits(two), name


def _quantize(placements: list[Placement]) -> None:
    adapter = DeepseekV3FP8StateDictAdapter()
    for name, weight in _expected().items():
        if name not in SHAPES:
            continue
        expected, expected_scales = single(adapter, weight, name)
        codes, scales = single(adapter, distribute_tensor(weight, mesh(), placements), name)
        assert isinstance(codes, DTensor)
        assert codes.placements == tuple(placements)
        assert bits(codes.view(torch.uint8).full_tensor()) == bits(expected), (name, placements)
        assert not isinstance(scales, DTensor)
        assert_same(scales, expected_scales, (name, placements))


def _on_ranks(path: Path) -> None:
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        _load_by_placeholders(path, placements)
        _quantize(placements)


def test_placeholders_filled_by_torchs_reader(blocks: Path) -> None:
    """to_hf, torch's `HuggingFaceStorageReader`, from_hf: the oracle's values; our reader gives the same codes."""
    _load_by_placeholders(blocks, None)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8] if ALL else [3, 6])
def test_edges_of_shards_need_not_be_edges_of_blocks(blocks: Path, ranks: int) -> None:
    """Uneven and empty shards of rows or columns take the oracle's values, and give the unsharded codes."""
    run(ranks, _on_ranks, blocks)


def _nan_on_the_last_rank() -> list[str]:
    told = []
    of_mistral = (Mistral3FP8StateDictAdapter, torch.bfloat16)
    for adapter, dtype in ((DeepseekV3FP8StateDictAdapter, torch.float32), of_mistral):
        weight = torch.ones(200, 4, dtype=dtype)
        weight[199, 1] = float("nan")
        sharded = distribute_tensor(weight, mesh(), [Shard(0)])
        try:
            single(adapter(), sharded)
        except WeightValueError as error:
            dist.barrier()
            told.append(str(error))
    return told


def test_what_is_not_finite_on_one_rank_is_refused_on_all() -> None:
    """One rank's NaN raises `WeightValueError` on every rank, of either adapter; none waits for ever."""
    for told in run(2, _nan_on_the_last_rank):
        assert len(told) == 2
        for message in told:
            assert message.startswith("a.weight: ")
            assert "not finite" in message
