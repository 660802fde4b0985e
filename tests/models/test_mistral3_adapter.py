"""The adapter of per-tensor FP8 releases: every name and behaviour of its reference documentation, and its numbers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import Mistral3Config

from fp8ckpt import FP8StorageReader, StateDictAdapter, open_checkpoint, sample
from fp8ckpt.checkpoint.quantized_dtensors import quantize
from fp8ckpt.encodings.rule import Rule
from fp8ckpt.errors import RangeError, ScaleShapeError, ScaleValueError, UnsupportedFormatError, WeightValueError
from fp8ckpt.models.mistral3_vlm import state_dict_adapter as module
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from tests.distributed import assert_same, bits, mesh, rescaled, rewrite, run, single
from tests.oracle import Stored, dequantize, read_directory
from tests.support import examples

TEXT = "model.language_model.layers.0."
ALL_CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
FINITE_CODES = [code for code in range(256) if code & 0x7F != 0x7F]


def _stored(tensor: torch.Tensor) -> Stored:
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
    return Stored(names[tensor.dtype], tuple(tensor.shape), bits(tensor))


def _parameters(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in found.items() if name != "self"}


# ---------------------------------------------------------------- the documented surface


def test_names_of_the_module_are_the_documented_ones() -> None:
    """Every name of the reference is there, the underscore names too, and the logger is the module's own."""
    assert module.logger is logging.getLogger("fp8ckpt.models.mistral3_vlm.state_dict_adapter")
    assert module._NON_QUANTIZED_SUFFIXES[:4] == (
        "embed_tokens.weight", "lm_head.weight", "input_layernorm.weight", "post_attention_layernorm.weight"
    )  # fmt: skip
    assert module._identity("any.name") == "any.name"
    assert issubclass(Mistral3FP8StateDictAdapter, StateDictAdapter)


def test_signatures_are_the_documented_ones() -> None:
    """Names, order and defaults of every argument; the constructor takes keywords only."""
    none = inspect.Parameter.empty
    adapter = Mistral3FP8StateDictAdapter
    options = {"exclude_key_regex": None, "quantization": False}
    assert _parameters(adapter.to_hf) == {"state_dict": none, **options, "kwargs": none}
    for either in (adapter, StateDictAdapter):
        assert _parameters(either.from_hf) == {"hf_state_dict": none, "device_mesh": None, "kwargs": none}
        assert _parameters(either.convert_single_tensor_to_hf) == {"fqn": none, "tensor": none, "kwargs": none}
    assert _parameters(adapter.__init__) == {
        "native_to_hf": module._identity, "hf_to_native": module._identity, "layout_name": "vlm_full",
        "not_fp8_prefixes": ()
    }  # fmt: skip
    kinds = {p.kind for name, p in inspect.signature(adapter.__init__).parameters.items() if name != "self"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    assert _parameters(adapter.for_vlm_full) == _parameters(adapter.for_causal_lm) == {"config": None}
    given = {"weight_fp8": none, "scale_inv": none, "target_dtype": torch.bfloat16}
    assert _parameters(module._dequantize_from_fp8) == given
    assert _parameters(module._is_fp8_weight_key) == {"model_key": none, "not_fp8_prefixes": ()}
    with pytest.raises(TypeError):
        adapter(module._identity)  # type: ignore[misc]
    assert StateDictAdapter.__abstractmethods__ == {"to_hf", "from_hf", "convert_single_tensor_to_hf"}
    assert _parameters(StateDictAdapter.to_hf) == {"state_dict": none, "kwargs": none}


def test_for_vlm_full() -> None:
    """Identity names, the layout name vlm_full, and the two BF16 modules; hosts may test truth and set attributes."""
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full()
    assert adapter.layout_name == "vlm_full"
    assert adapter.not_fp8_prefixes == ("model.vision_tower", "model.multi_modal_projector")
    assert adapter.native_to_hf("a.b") == adapter.hf_to_native("a.b") == "a.b"
    assert adapter
    adapter._paramwrapper_layout_hint = "set"
    assert adapter._paramwrapper_layout_hint == "set"
    plain = Mistral3FP8StateDictAdapter()
    assert (plain.layout_name, plain.not_fp8_prefixes) == ("vlm_full", ())


MEDIUM = {"text_config": {"model_type": "ministral3", "num_hidden_layers": 88}, "tie_word_embeddings": False}
TEXT_OF_SMALL = {"model_type": "ministral3", "num_hidden_layers": 40}
SMALL = {"text_config": TEXT_OF_SMALL, "tie_word_embeddings": False}


@pytest.mark.parametrize(("config", "layout", "may_lack_head"), [
    (MEDIUM, "vlm_full", False),
    (SMALL, "vlm_nested", False),
    ({**SMALL, "tie_word_embeddings": True}, "vlm_nested", True),
    ({"text_config": {**TEXT_OF_SMALL, "tie_word_embeddings": True}}, "vlm_nested", True),
    ({"text_config": TEXT_OF_SMALL}, "vlm_nested", True),  # not said
    ({"text_config": {"model_type": "mistral", "num_hidden_layers": 88}}, "vlm_nested", True),
    ({}, "vlm_nested", True),
])  # fmt: skip
@pytest.mark.parametrize("kind", [dict, lambda config: Mistral3Config(**config)], ids=["mapping", "object"])
def test_for_vlm_full_of_a_configuration(
    kind: Callable[[dict[str, Any]], Any], config: dict[str, Any], layout: str, may_lack_head: bool
) -> None:
    """Without a file, the configuration says under which names the model is released; the two BF16 modules stay."""
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full(kind(config))
    assert adapter.layout_name == layout
    assert adapter.not_fp8_prefixes == ("model.vision_tower", "model.multi_modal_projector")
    on_disk = {"vlm_full": TEXT + "x", "vlm_nested": "language_model.model.layers.0.x"}[layout]
    assert adapter.native_to_hf(TEXT + "x") == on_disk
    assert adapter.hf_to_native(on_disk) == TEXT + "x"
    if kind is dict or "tie_word_embeddings" in config:  # an object always says something
        assert adapter.may_lack_head == may_lack_head


@pytest.mark.parametrize(
    ("config", "may_lack_head"),
    [(None, False), ({"model_type": "ministral3"}, False), ({"tie_word_embeddings": True}, True)],
)
def test_for_causal_lm(config: dict[str, Any] | None, may_lack_head: bool) -> None:
    """Names are the same on disk, and no module is BF16 as a whole."""
    adapter = Mistral3FP8StateDictAdapter.for_causal_lm(config)
    assert (adapter.layout_name, adapter.not_fp8_prefixes) == ("causal_lm", ())
    assert adapter.native_to_hf("a.b") == adapter.hf_to_native("a.b") == "a.b"
    assert adapter.may_lack_head == may_lack_head
    assert adapter.is_fp8_weight("model.layers.0.mlp.up_proj.weight")
    assert not adapter.is_fp8_weight("lm_head.weight")


IN_FP8 = [
    TEXT + "mlp.up_proj.weight", TEXT + "self_attn.q_proj.weight", "model.vision_tower_extra.x.weight",
    "model.multi_modal_projector2.linear.weight", "a.model.vision_tower.x.weight",
]  # fmt: skip
NOT_FP8 = [
    TEXT + "mlp.up_proj.bias", TEXT + "mlp.up_proj.weight_scale_inv", TEXT + "mlp.up_proj",
    "model.language_model.embed_tokens.weight", "lm_head.weight", "language_model.lm_head.weight",
    TEXT + "input_layernorm.weight", TEXT + "post_attention_layernorm.weight", "model.language_model.norm.weight",
    "model.norm.weight", "model.vision_tower.transformer.layers.0.attention.q_proj.weight",
    "model.multi_modal_projector.linear_1.weight",
]  # fmt: skip


@pytest.mark.parametrize("key", [*IN_FP8, *NOT_FP8])
def test_is_fp8_weight_key(key: str) -> None:
    """A text Linear's weight, and nothing else; a prefix is a module's name, never the beginning of another's."""
    assert module._is_fp8_weight_key(key, ("model.vision_tower", "model.multi_modal_projector")) is (key in IN_FP8)


def test_is_fp8_weight_key_without_prefixes() -> None:
    """By default no module is excluded; an excluded name itself is."""
    vision = "model.vision_tower.transformer.layers.0.attention.q_proj.weight"
    assert module._is_fp8_weight_key(vision)
    assert not module._is_fp8_weight_key(vision, (vision,))
    assert not module._is_fp8_weight_key("model.vision_tower.weight", ("model.vision_tower.weight",))


# ---------------------------------------------------------------- dequantization


@given(
    exponent=st.floats(-120, 100),
    fraction=st.floats(1, 2),
    scale_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@examples(150)
def test_dequantize_is_the_contract_for_every_code(exponent: float, fraction: float, scale_dtype: torch.dtype) -> None:
    """All 256 codes times a scale: the oracle's bits; and for a BF16 scale those of the documented formula."""
    scale = torch.tensor(2.0 ** int(exponent) * fraction).to(scale_dtype)
    values = module._dequantize_from_fp8(ALL_CODES, scale)
    assert (values.dtype, values.shape) == (torch.bfloat16, (16, 16))
    assert bits(values) == dequantize(_stored(ALL_CODES), _stored(scale), (16, 16), "BF16")
    if scale_dtype is torch.bfloat16:
        assert torch.equal(values.nan_to_num(7.0), (ALL_CODES.to(torch.bfloat16) * scale).nan_to_num(7.0))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_dequantize_to_other_dtypes(dtype: torch.dtype, name: str) -> None:
    """One rounding to the dtype asked for, from F32 scales that BF16 cannot hold; one-element scales in any shape."""
    scale = torch.tensor(0.0123456)
    expected = dequantize(_stored(ALL_CODES), _stored(scale), (16, 16), name)
    for shaped in (scale, scale.reshape(1), scale.reshape(1, 1)):
        values = module._dequantize_from_fp8(ALL_CODES, shaped, dtype)
        assert values.dtype == dtype
        assert bits(values) == expected


def test_dequantize_of_strided_and_empty_weights() -> None:
    """A transposed or sliced weight gives the values at their places; an empty one is empty."""
    scale = torch.tensor(0.5, dtype=torch.bfloat16)
    straight = module._dequantize_from_fp8(ALL_CODES, scale)
    assert_same(module._dequantize_from_fp8(ALL_CODES.T, scale), straight.T)
    assert_same(module._dequantize_from_fp8(ALL_CODES[2:9:3, 1::2], scale), straight[2:9:3, 1::2])
    assert module._dequantize_from_fp8(ALL_CODES[:0], scale).shape == (0, 16)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_dequantize_refuses_scales_that_are_none(bad: float) -> None:
    """A scale that is not finite and positive, or of more than one element, is refused: no value can be made of it."""
    with pytest.raises(ScaleValueError):
        module._dequantize_from_fp8(ALL_CODES, torch.tensor(bad, dtype=torch.bfloat16))
    with pytest.raises(ScaleShapeError):
        module._dequantize_from_fp8(ALL_CODES, torch.ones(2, 3))


def test_dequantize_refuses_values_beyond_bfloat16() -> None:
    """A scale that takes finite codes to infinity is refused; codes that are infinite themselves stay so."""
    largest = torch.tensor(2.0**120, dtype=torch.bfloat16)
    beyond = int((ALL_CODES.float().abs() * 2.0**120).isinf().sum())
    with pytest.raises(RangeError, match=f"{beyond} elements with finite codes exceed the largest BF16"):
        module._dequantize_from_fp8(ALL_CODES, largest)
    codes = torch.tensor([float("inf"), float("-inf"), 1.0]).to(torch.float8_e5m2)
    values = module._dequantize_from_fp8(codes, largest)
    assert_same(values, (codes.float() * largest.float()).to(torch.bfloat16))


# ---------------------------------------------------------------- to_hf


def _native() -> dict[str, Any]:
    return {
        "model.language_model.embed_tokens.weight": torch.randn(5, 4).to(torch.bfloat16),
        TEXT + "mlp.up_proj.weight": torch.randn(6, 4).to(torch.bfloat16).requires_grad_(),
        TEXT + "input_layernorm.weight": torch.ones(4, dtype=torch.bfloat16),
        "model.vision_tower.x.weight": torch.randn(3, 3),
        TEXT + "self_attn.q_proj.weight": torch.randn(3, 4),
        "step": 3,
    }


def test_to_hf_without_quantization_passes_the_same_objects() -> None:
    """Identity of names, order and objects; the keywords that hosts add change nothing."""
    native = _native()
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full()
    more = {"device_mesh": None, "for_checkpoint_load": True, "v4_compatible": False}
    for extra in ({}, {**more, "legacy_paramwrapper_layout": True}):
        hf = adapter.to_hf(native, **extra)
        assert list(hf) == list(native)
        assert all(hf[name] is native[name] for name in native)


def test_to_hf_with_quantization_makes_placeholders() -> None:
    """An FP8 weight becomes FP8 of its shape, followed by a 0-d BF16 scale; all else is the same object, in order."""
    native = _native()
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full()
    hf = adapter.to_hf(native, quantization=True, device_mesh=None, for_checkpoint_load=True, v4_compatible=True)
    up, q = TEXT + "mlp.up_proj.weight", TEXT + "self_attn.q_proj.weight"
    names = list(native)
    names.insert(names.index(up) + 1, up + "_scale_inv")
    names.insert(names.index(q) + 1, q + "_scale_inv")
    assert list(hf) == names
    for name in (up, q):
        weight, scale, of = hf[name], hf[name + "_scale_inv"], native[name]
        assert (weight.dtype, weight.shape, weight.device) == (torch.float8_e4m3fn, of.shape, of.device)
        assert not weight.requires_grad
        assert weight.data_ptr() != native[name].data_ptr()
        assert (scale.dtype, scale.shape, scale.device) == (torch.bfloat16, (), native[name].device)
    assert all(hf[name] is native[name] for name in native if name not in (up, q))
    assert native[up].dtype == torch.bfloat16


def test_to_hf_stays_on_the_meta_device() -> None:
    """Placeholders take the weight's device."""
    name = TEXT + "mlp.up_proj.weight"
    hf = Mistral3FP8StateDictAdapter().to_hf({name: torch.empty(4, 4, device="meta")}, quantization=True)
    assert {tensor.device.type for tensor in hf.values()} == {"meta"}
    assert len(hf) == 2


def test_to_hf_leaves_out_what_a_pattern_matches() -> None:
    """``exclude_key_regex`` drops matching native names, with their scales."""
    native = _native()
    adapter = Mistral3FP8StateDictAdapter.for_vlm_full()
    hf = adapter.to_hf(native, exclude_key_regex=r".*(mlp|vision)", quantization=True)
    q = TEXT + "self_attn.q_proj.weight"
    assert set(hf) == {name for name in native if "mlp" not in name and "vision" not in name} | {q + "_scale_inv"}


def test_to_hf_renames() -> None:
    """Placeholders and the rest go under the names that ``native_to_hf`` gives; FP8 goes by the native ones."""
    adapter = Mistral3FP8StateDictAdapter(
        native_to_hf=lambda k: "disk." + k, hf_to_native=lambda k: k.removeprefix("disk.")
    )
    name = TEXT + "mlp.up_proj.weight"
    hf = adapter.to_hf({name: torch.zeros(2, 2), "lm_head.weight": torch.ones(1)}, quantization=True)
    assert list(hf) == ["disk." + name, f"disk.{name}_scale_inv", "disk.lm_head.weight"]
    assert list(adapter.from_hf(hf)) == [name, "lm_head.weight"]


# ---------------------------------------------------------------- from_hf


def test_from_hf_pairs_drops_and_passes_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    """Pairs become BF16 wherever the scale stands, scales are dropped, the rest is the same object; counts logged."""
    scale = torch.tensor(0.25, dtype=torch.bfloat16)
    up = TEXT + "mlp.up_proj."
    alone = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    plain = torch.randn(3)
    hf = {
        up + "activation_scale": scale, up + "weight_scale_inv": scale, up + "weight": ALL_CODES,
        TEXT + "alone.weight": alone, TEXT + "orphan.weight_scale_inv": scale, TEXT + "plain.weight": plain, "step": 3,
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        native = Mistral3FP8StateDictAdapter.for_vlm_full().from_hf(hf, device_mesh=None, v4_compatible=True)
    assert list(native) == [up + "weight", TEXT + "alone.weight", TEXT + "plain.weight", "step"]
    assert_same(native[up + "weight"], module._dequantize_from_fp8(ALL_CODES, scale))
    assert native[TEXT + "alone.weight"] is alone
    assert native[TEXT + "plain.weight"] is plain
    assert hf[up + "weight"] is ALL_CODES
    [record] = [r for r in caplog.records if r.name == module.logger.name]
    assert "[vlm_full]" in record.getMessage()
    assert [int(word) for word in record.getMessage().split() if word.isdigit()] == [1, 2, 1]


def test_from_hf_of_a_bf16_checkpoint_is_identity() -> None:
    """Where nothing is FP8, every object is handed through; a BF16 weight beside a scale is not multiplied."""
    hf = {"a.weight": torch.ones(2, dtype=torch.bfloat16), "b.weight": torch.ones(2)}
    native = Mistral3FP8StateDictAdapter().from_hf(hf)
    assert list(native) == list(hf)
    assert all(native[name] is hf[name] for name in hf)


# ---------------------------------------------------------------- convert_single_tensor_to_hf


@given(
    codes=st.lists(st.sampled_from(FINITE_CODES), min_size=1, max_size=24),
    exponent=st.integers(-30, 10),
    fraction=st.integers(0, 127),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@examples(500)
def test_what_was_fp8_is_reproduced_exactly(codes: list[int], exponent: int, fraction: int, dtype: torch.dtype) -> None:
    """Whatever its largest code: with the scale of before, the codes of before come back, from BF16 and from FP32."""
    scale = torch.tensor(2.0**exponent * (1 + fraction / 128), dtype=torch.bfloat16)
    given = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = module._dequantize_from_fp8(given, scale, dtype)
    found, kept = quantize(Rule("a.weight", "BF16"), weight, None, np.frombuffer(bits(scale), np.uint16))
    assert (found.dtype, found.shape) == (torch.float8_e4m3fn, weight.shape)
    assert_same(kept, scale)
    assert bits(found) == bytes(codes)


@given(seed=st.integers(0, 1 << 30), size=st.floats(-30, 20))
@examples(100)
def test_other_weights_are_within_rounding(seed: int, size: float) -> None:
    """Each element of a weight that was never FP8 is within half a step of e4m3, and the largest is not clipped."""
    weight = (torch.randn(9, 7, generator=torch.Generator().manual_seed(seed)) * 2.0**size).to(torch.bfloat16)
    codes, scale = single(Mistral3FP8StateDictAdapter(), weight)
    values = codes.to(torch.float64) * scale.to(torch.float64)
    error = (values - weight.to(torch.float64)).abs()
    half_step = torch.maximum(weight.to(torch.float64).abs() * 2.0**-4, scale.to(torch.float64) * 2.0**-10)
    assert bool((error <= half_step * 1.0001).all())
    assert float(weight.abs().max().double() / scale.double()) <= 448


def test_zeros_get_a_scale_of_one() -> None:
    """A weight of zeros, signed ones too, and an empty one: zero codes of their signs, a scale that means nothing."""
    weight = torch.tensor([[0.0, -0.0]], dtype=torch.bfloat16)
    codes, scale = single(Mistral3FP8StateDictAdapter(), weight)
    assert bits(codes) == b"\x00\x80"
    assert float(scale) == 1.0
    codes, scale = single(Mistral3FP8StateDictAdapter(), weight[:0])
    assert codes.shape == (0, 2)
    assert float(scale) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    """NaN and infinity have no code: `WeightValueError` names the tensor."""
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    weight[1, 2] = bad
    with pytest.raises(WeightValueError, match=r"a\.weight: 1 elements .*not finite"):
        single(Mistral3FP8StateDictAdapter(), weight)


def test_a_scale_that_its_dtype_cannot_hold_is_refused_by_name() -> None:
    """An F16 scale ends at 65504: a larger one is `RangeError`, and no weight of zeros."""
    with pytest.raises(RangeError, match=r"a\.weight: .*beyond the range of F16"):
        quantize(Rule("a.weight", "F16"), torch.full((2, 2), 1e9), None, None)


def test_without_quantization_there_is_one_pair() -> None:
    """The same object under its name on disk; excluded names give none; a weight that is not FP8 is never quantized."""
    adapter = Mistral3FP8StateDictAdapter(native_to_hf=lambda k: "disk." + k)
    weight = torch.ones(2, 2)
    for keywords in ({}, {"quantization": False}, {"v4_compatible": True}):
        [(key, value)] = adapter.convert_single_tensor_to_hf("a.weight", weight, **keywords)
        assert key == "disk.a.weight"
        assert value is weight
    [(key, value)] = adapter.convert_single_tensor_to_hf("lm_head.weight", weight, quantization=True)
    assert key == "disk.lm_head.weight"
    assert value is weight
    assert adapter.convert_single_tensor_to_hf("a.weight", weight, quantization=True, exclude_key_regex="a.*") == []


# ---------------------------------------------------------------- from_checkpoint


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("nested") / "fp8", layout="nested")


def test_from_checkpoint_identity(sample_fp8: Path) -> None:
    """The names of the model's own state dict: vlm_full, and exactly the file's FP8 weights."""
    for path in (sample_fp8, str(sample_fp8), open_checkpoint(sample_fp8)):
        adapter = Mistral3FP8StateDictAdapter.from_checkpoint(path)
        assert adapter.layout_name == "vlm_full"
        assert adapter.not_fp8_prefixes == ("model.vision_tower", "model.multi_modal_projector")
        quantized = {tensor.name for tensor in open_checkpoint(sample_fp8).quantized}
        assert {name for name in open_checkpoint(sample_fp8).tensors if adapter.is_fp8_weight(name)} == quantized
        assert all(adapter.native_to_hf(name) == name == adapter.hf_to_native(name) for name in quantized)


def test_from_checkpoint_nested(nested: Path) -> None:
    """Ministral's nesting: every name on disk has a native one that leads back, the nested lm_head included."""
    adapter = Mistral3FP8StateDictAdapter.from_checkpoint(nested)
    checkpoint = open_checkpoint(nested)
    assert adapter.layout_name == "vlm_nested"
    native = {adapter.hf_to_native(name): name for name in checkpoint.tensors}
    assert len(native) == len(checkpoint.tensors)
    assert all(adapter.native_to_hf(name) == hf for name, hf in native.items())
    assert native["lm_head.weight"] == "language_model.lm_head.weight"
    quantized = {tensor.name for tensor in checkpoint.quantized}
    assert {native[name] for name in native if adapter.is_fp8_weight(name)} == quantized
    parts = {name.split(".")[1] for name in native if name != "lm_head.weight"}
    assert parts == {"language_model", "vision_tower", "multi_modal_projector"}


def test_from_checkpoint_text_only(sample_fp8: Path, tmp_path: Path) -> None:
    """A text model alone: names as they are, and no vision modules to except."""

    def text(tensors: dict[str, Stored]) -> dict[str, Stored]:
        kept = {name: tensor for name, tensor in tensors.items() if "vision" not in name and "multi_modal" not in name}
        return {name.replace("model.language_model.", "model."): tensor for name, tensor in kept.items()}

    path = rewrite(sample_fp8, tmp_path / "text", text)
    adapter = Mistral3FP8StateDictAdapter.from_checkpoint(path)
    assert (adapter.layout_name, adapter.not_fp8_prefixes) == ("text_only", ())
    assert adapter.native_to_hf("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert adapter.is_fp8_weight("model.layers.0.mlp.up_proj.weight")
    assert not adapter.is_fp8_weight("lm_head.weight")


@pytest.mark.parametrize(("dtype", "shape"), [("F32", ()), ("F32", (1,)), ("BF16", (1,)), ("F16", (1, 1))])
def test_from_checkpoint_takes_scales_as_the_file_has_them(
    sample_fp8: Path, tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    """Placeholders and fresh scales have the dtype and shape that the scales on disk have."""

    path = rescaled(sample_fp8, tmp_path / "scales", lambda scale: Stored.of(scale.reshape(shape), dtype))
    adapter = Mistral3FP8StateDictAdapter.from_checkpoint(path)
    name = TEXT + "mlp.up_proj.weight"
    weight = torch.randn(4, 3)
    placeholder = adapter.to_hf({name: weight}, quantization=True)[name + "_scale_inv"]
    codes, scale = single(adapter, weight, name)
    expected = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    assert (placeholder.dtype, placeholder.shape) == (scale.dtype, scale.shape) == (expected, shape)
    assert float((module._dequantize_from_fp8(codes, scale, torch.float32) - weight).abs().max()) < 0.3


def test_f32_scales_come_back_as_exactly(sample_fp8: Path, tmp_path: Path) -> None:
    """A file with F32 scales, loaded as BF16 or FP32: its own codes and scales again, for every weight."""

    factor = np.float32(1.000977)  # so that BF16 does not hold the scales
    path = rescaled(sample_fp8, tmp_path / "f32", lambda scale: Stored.of(scale * factor, "F32"))
    checkpoint, adapter = open_checkpoint(path), Mistral3FP8StateDictAdapter.from_checkpoint(path)
    stored, differing = read_directory(path), []
    for name, dtype in product([tensor.name for tensor in checkpoint.quantized], (torch.bfloat16, torch.float32)):
        weight = torch.empty(checkpoint[name].shape, dtype=dtype)
        dcp.load({name: weight}, storage_reader=FP8StorageReader(checkpoint), no_dist=True)
        codes, scale = single(adapter, weight, name)
        assert scale.dtype == torch.float32
        if (bits(codes), bits(scale)) != (stored[name].data, stored[name + "_scale_inv"].data):
            differing.append((name, dtype))
    assert differing == []


def test_from_checkpoint_goes_by_the_file_and_not_by_names(sample_fp8: Path, tmp_path: Path) -> None:
    """One Linear that is BF16 on disk among FP8 ones gets no FP8 placeholder and no scale."""
    name = TEXT + "mlp.up_proj.weight"

    def change(tensors: dict[str, Stored]) -> dict[str, Stored]:
        plain = {key: tensor for key, tensor in tensors.items() if not key.startswith(TEXT + "mlp.up_proj.")}
        shape = tensors[name].shape
        return {**plain, name: Stored.of(np.ones(shape, np.float32), "BF16")}

    adapter = Mistral3FP8StateDictAdapter.from_checkpoint(rewrite(sample_fp8, tmp_path / "mixed", change))
    native = {name: torch.ones(2, 2), TEXT + "mlp.down_proj.weight": torch.ones(2, 2)}
    hf = adapter.to_hf(native, quantization=True)
    assert list(hf) == [name, TEXT + "mlp.down_proj.weight", TEXT + "mlp.down_proj.weight_scale_inv"]
    assert hf[name] is native[name]
    assert len(adapter.convert_single_tensor_to_hf(name, native[name], quantization=True)) == 1


def test_from_checkpoint_refuses_other_scales(sample_block: Path, sample_fp8: Path, tmp_path: Path) -> None:
    """Block scales, and per-tensor scales of another name, are not this adapter's: refused by name."""
    with pytest.raises(UnsupportedFormatError, match="one scale a tensor"):
        Mistral3FP8StateDictAdapter.from_checkpoint(sample_block)
    other = lambda tensors: {k.replace("_scale_inv", "_scale"): t for k, t in tensors.items()}  # noqa: E731
    renamed = rewrite(sample_fp8, tmp_path / "named", other)
    with pytest.raises(UnsupportedFormatError, match="_scale_inv"):
        Mistral3FP8StateDictAdapter.from_checkpoint(renamed)


# ---------------------------------------------------------------- DTensors


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 0x7E, (7, 10), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return {
        "was fp8": module._dequantize_from_fp8(codes, torch.tensor(0.0371, dtype=torch.bfloat16)),
        "never": torch.randn(7, 10, generator=generator).to(torch.bfloat16),
        "largest on the last rank": torch.arange(70.0).reshape(7, 10).to(torch.bfloat16),
        "fewer rows than ranks": torch.randn(1, 10, generator=generator).to(torch.bfloat16),
        "zeros": torch.zeros(7, 10, dtype=torch.bfloat16),
        "float32": torch.randn(7, 10, generator=generator),
    }


def _on_ranks() -> None:
    over = mesh()
    adapter = Mistral3FP8StateDictAdapter()
    for case, weight in _weights().items():
        for placement in (Shard(0), Shard(1), Replicate()):
            sharded = distribute_tensor(weight, over, [placement])
            codes, scale = single(adapter, sharded)
            expected, expected_scale = single(adapter, weight)
            assert isinstance(codes, DTensor)
            assert codes.placements == sharded.placements
            assert bits(codes.view(torch.uint8).full_tensor()) == bits(expected), (case, placement)
            assert not isinstance(scale, DTensor)
            assert_same(scale, expected_scale, (case, placement))

            hf = adapter.to_hf({"a.weight": sharded}, quantization=True)
            placeholder = hf["a.weight"]
            assert isinstance(placeholder, DTensor)
            assert (placeholder.placements, placeholder.device_mesh) == (sharded.placements, over)
            assert (placeholder.shape, placeholder.dtype) == (weight.shape, torch.float8_e4m3fn)

            for given_scale in (scale, distribute_tensor(scale, over, [Replicate()])):
                native = adapter.from_hf({"a.weight": codes, "a.weight_scale_inv": given_scale})["a.weight"]
                assert isinstance(native, DTensor)
                assert (native.placements, native.device_mesh) == (sharded.placements, over)
                values = module._dequantize_from_fp8(expected, expected_scale)
                assert_same(native.full_tensor(), values, (case, placement))


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_give_what_the_whole_gives(ranks: int) -> None:
    """Rows, columns or copies over the ranks: the same codes and the same scale, and DTensors keep their placements."""
    run(ranks, _on_ranks)
