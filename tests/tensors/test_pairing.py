"""Which scale belongs to which weight; and every way in which that can fail, by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fp8ckpt.errors import (
    AmbiguousScaleError,
    Fp8CheckpointError,
    HeaderError,
    MissingScaleError,
    OrphanScaleError,
    ScaleDtypeError,
    ScaleShapeError,
    UnsupportedFormatError,
)
from fp8ckpt.numerics.codes import FP8_DTYPES, FP8_SCALES
from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.blocks import BlockSizes
from fp8ckpt.tensors.checkpoint import open_checkpoint
from fp8ckpt.tensors.formats import ACTIVATIONS, SCALES, ScaleRow
from fp8ckpt.tensors.pairing import Pairing, pair
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan, tensor_nbytes
from tests.miniatures import families

Spec = tuple[str, tuple[int, ...]]
FILE = "model-00001-of-00002.safetensors"
FAMILIES = families()


def spans_of(tensors: dict[str, Spec], files: dict[str, str] | None = None) -> dict[str, TensorSpan]:
    """Spans, all in one file but for those named in ``files``."""
    held = {name: File(PLANNED, (files or {}).get(name, FILE)) for name in tensors}
    return {
        name: TensorSpan(name, held[name], dtype, shape, 0, tensor_nbytes(dtype, shape))
        for name, (dtype, shape) in tensors.items()
    }


def paired(tensors: dict[str, Spec], block: tuple[int, ...] | None = None, **options: Any) -> Pairing:
    return pair(spans_of(tensors), BlockSizes(block), **options)


def only_defect(
    tensors: dict[str, Spec], kind: type[Fp8CheckpointError], block: tuple[int, ...] | None = None
) -> Fp8CheckpointError:
    """The one defect, of exactly this kind, with all that a message must say."""
    result = paired(tensors, block)
    assert [type(defect) for defect in result.defects] == [kind]
    defect = result.defects[0]
    assert defect.file == FILE
    assert defect.tensor in tensors
    assert defect.found
    assert defect.expected
    assert defect.remedy
    assert str(defect).startswith(f"{defect.tensor} in {FILE}: {defect.found}; expected {defect.expected}")
    return defect


W: Spec = ("F8_E4M3", (256, 256))
S: Spec = ("BF16", ())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("files", [1, 2, 3])
def test_every_family_pairs(tmp_path: Path, name: str, files: int) -> None:
    """Each FP8 weight has its family's scale and block size; scales are no tensors; all else is there as stored."""
    family = FAMILIES[name]
    checkpoint = open_checkpoint(family.write(tmp_path / "checkpoint", files))
    assert not checkpoint.defects
    assert set(checkpoint.tensors) == set(family.expected())
    assert {tensor.name for tensor in checkpoint.quantized} == {family.name(weight) for weight in family.blocks}
    assert {span.name for span in checkpoint.markers} == set(family.markers)
    for weight, (scale, block) in family.blocks.items():
        tensor = checkpoint[family.name(weight)]
        assert tensor.weight.name == weight
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.scale.name == scale
        assert tensor.scale.dtype == family.tensors[scale].dtype
        assert tensor.grid.block_size == block
        assert tensor.grid.weight_shape == tensor.shape == family.tensors[weight].shape
        assert tensor.numel == tensor.weight.numel
    activations = {span.name for tensor in checkpoint.quantized for span in tensor.activation_scales}
    assert activations | {span.name for span in checkpoint.cache_scales} == set(family.dropped)
    for other, tensor in checkpoint.tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            assert isinstance(tensor, TensorSpan)
            assert (tensor.dtype, tensor.shape) == family.tensors[other][:2]


@pytest.mark.parametrize("code_dtype", FP8_DTYPES)
@pytest.mark.parametrize("scale_dtype", FP8_SCALES)
@pytest.mark.parametrize("row", [row for row in SCALES if not row.bits], ids=str)
def test_every_row_with_every_dtype(row: ScaleRow, scale_dtype: str, code_dtype: str) -> None:
    """The table of scales, with all code and scale dtypes."""
    stem = f"m.{row.leaf}weight" if row.leaf else "m.q" if row.weight else "m.experts.up_proj"
    name = "m.weight" if row.leaf else stem + row.weight
    result = paired({stem + row.weight: (code_dtype, (4, 4)), stem + row.scale: (scale_dtype, ())})
    assert not result.defects
    assert list(result.tensors) == [name]
    tensor = result.tensors[name]
    assert isinstance(tensor, QuantizedTensor)
    assert (tensor.name, tensor.weight.name, tensor.scale.name) == (name, stem + row.weight, stem + row.scale)


@pytest.mark.parametrize("row", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_every_row_of_activations(row: ScaleRow, shape: tuple[int, ...]) -> None:
    """Activation scales go with their weight, and are no tensors of their own."""
    stem = "m._weight" if row.leaf else "m.q" if row.weight else "m.experts.up_proj"
    weight = stem + row.weight
    result = paired({weight: W, weight + "_scale_inv": S, stem + row.scale: ("BF16", shape)})
    assert not result.defects
    (tensor,) = result.tensors.values()
    assert isinstance(tensor, QuantizedTensor)
    assert [span.name for span in tensor.activation_scales] == [stem + row.scale]


def test_a_scale_in_another_file() -> None:
    """Weight and scale need not share a file."""
    spans = spans_of({"a.weight": W, "a.weight_scale_inv": S}, {"a.weight_scale_inv": "other.safetensors"})
    result = pair(spans, BlockSizes())
    assert not result.defects
    tensor = result.tensors["a.weight"]
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.scale.file.name == "other.safetensors"


def test_the_order_given_is_kept() -> None:
    """Logical tensors come in the order of the stored ones."""
    names = [f"{c}.weight" for c in "zaybx"]
    tensors = {name + end: spec for name in names for end, spec in (("_scale_inv", S), ("", W))}
    assert list(paired(tensors).tensors) == names


@pytest.mark.parametrize("name", [
    "m.hc_attn_scale", "m.hc_ffn_scale", "m.norm.scale", "logit_scale", "m.logit_scale", "m.layer_scale", "m.scale",
    "scale", "m.rotary.inv_scale",
])  # fmt: skip
@pytest.mark.parametrize(
    "beside", [{}, {"m.q.weight": W, "m.q.scale": ("F8_E8M0", (2, 2))}], ids=["alone", "beside FP8"]
)
def test_names_that_only_look_like_scales(name: str, beside: dict[str, Spec]) -> None:
    """``hc_attn_scale``, ``norm.scale``, ``logit_scale``: parameters of the model, kept as they are."""
    result = paired({name: ("BF16", (3,)), "m.norm.weight": ("BF16", (3,)), **beside}, (128, 128))
    assert not result.defects
    assert isinstance(result.tensors[name], TensorSpan)


def test_scales_of_the_cache() -> None:
    """Scales of keys and values belong to no weight, and are listed apart; without FP8 they are tensors."""
    cache: dict[str, Spec] = {
        "l.k_proj.k_scale": ("F32", ()),
        "l.v_proj.v_scale": ("F32", (1,)),
        "l.attention.kv_fake_quantizer.qscale_act": ("F32", ()),
    }
    result = paired({"l.k_proj.weight": W, "l.k_proj.weight_scale": S, **cache})
    assert not result.defects
    assert [span.name for span in result.cache_scales] == list(cache)
    assert list(result.tensors) == ["l.k_proj.weight"]
    assert list(paired(cache).tensors) == list(cache)


Q = "l.0.attn.q_proj"
QUANTIZED: dict[str, Spec] = {f"{Q}.weight": W, f"{Q}.weight_scale": S}


@pytest.mark.parametrize(("name", "shape"), [
    ("l.0.attn.kv_scale", ()),
    ("l.0.attn.kv_scale", (1,)),
    ("l.0.attn.k_scale", (1, 1, 1)),
    ("l.0.attn.v_scale", (8, 1, 1)),
    ("l.0.attn.q_scale", (1, 8, 1, 1)),
    ("l.0.attn.q_scale", ()),
    ("l.0.attn.prob_output_scale", ()),
    (f"{Q}.output_scale", (1,)),
    (f"{Q}.k_scale", ()),
    ("l.0.attention.q_fake_quantizer.qscale_act", ()),
])  # fmt: skip
def test_scales_of_attention(name: str, shape: tuple[int, ...]) -> None:
    """One value, or one a head, under a name of theirs: no tensors where anything is quantized, else tensors."""
    result = paired({**QUANTIZED, name: ("F32", shape)})
    assert not result.defects
    assert [span.name for span in result.cache_scales] == [name]
    assert list(result.tensors) == [f"{Q}.weight"]
    plain: dict[str, Spec] = {f"{Q}.weight": ("BF16", (4, 4)), name: ("F32", shape)}
    assert name in paired(plain).tensors
    assert [span.name for span in paired(plain, quantized=True).cache_scales] == [name]


@pytest.mark.parametrize(("name", "shape"), [
    ("l.0.attn.q_scale", (64,)), ("l.0.attn.k_scale", (8, 1, 64)), ("l.0.attn.v_scale", (8, 8)),
    ("l.0.attn.logit_scale", (8, 1, 1)), ("l.0.attn.output_scale", ()),  # no projection
    ("l.0.attn.mixed_kv_scale", ()), ("l.0.attn.qk_scale", ()), ("l.0.layer_scale", (1,)), ("logit_scale", ()),
    ("l.0.hc_ffn_scale", (3,)), ("l.0.norm.scale", (64,)), ("l.0.norm.act_scale", (64,)),
    ("l.0.norm.scale_weight", (64,)), ("l.0.rel_weight_scale", (1,)), ("l.0.scaled_fp8", (0,)),  # of no FP8 dtype
    ("l.0.comfy_quant_scale", ()),
])  # fmt: skip
def test_parameters_that_end_like_scales(name: str, shape: tuple[int, ...]) -> None:
    """Other shapes, and other names, are parameters of the model: kept, beside FP8 and alone."""
    for beside in (QUANTIZED, {}):
        result = paired({**beside, name: ("F32", shape)}, quantized=True)
        assert not result.defects
        assert isinstance(result.tensors[name], TensorSpan)


def test_both_names_of_torchao() -> None:
    both: dict[str, Spec] = {"m._weight_qdata": W, "m._weight_scale": S, "m.weight": ("BF16", (4, 4))}
    (defect,) = paired(both).defects
    assert isinstance(defect, HeaderError)
    assert defect.tensor == "m.weight"


@pytest.mark.parametrize(("weight", "scale", "dtype", "block"), [
    ((256, 384), (2, 3), "F32", (128, 128)),
    ((256, 384), (256, 3), "BF16", (1, 128)),
    ((3, 256, 384), (3, 2, 3), "F32", (1, 128, 128)),
    ((256, 384), (), "F8_E8M0", (256, 384)),
    ((256, 384), (3, 3), "F32", ScaleShapeError),
    ((256, 384), (6,), "F32", ScaleShapeError),
    ((256, 384), (0, 3), "F32", ScaleShapeError),
    ((256, 384), (256, 12), "U8", UnsupportedFormatError),
    ((256, 384), (256, 12), "F8_E8M0", UnsupportedFormatError),
])  # fmt: skip
def test_blocks_of_torchao(weight: Any, scale: Any, dtype: str, block: Any) -> None:
    """They divide the weight, and the shapes say their size; exponents may be in the order of a kernel."""
    tensors: dict[str, Spec] = {"m._weight_qdata": ("F8_E4M3", weight), "m._weight_scale": (dtype, scale)}
    if isinstance(block, type):
        only_defect(tensors, block)
        only_defect(tensors, block, (1, 32))
        return
    tensor = paired(tensors).tensors["m.weight"]
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.grid.block_size == block
    only_defect({"m.weight": ("F8_E4M3", weight), "m.weight_scale": ("F32", (2, 3))}, ScaleShapeError)


@pytest.mark.parametrize("stated", [None, (1, 32)])
def test_exponents_of_comfyui_may_be_in_another_order(stated: tuple[int, ...] | None) -> None:
    """Refused where its marker stands beside them, even where the shape fits; elsewhere the remedy warns of it."""
    mx: dict[str, Spec] = {"m.weight": ("F8_E4M3", (256, 256)), "m.weight_scale": ("U8", (256, 8))}
    assert "order" in only_defect({**mx, "m.comfy_quant": ("U8", (20,))}, UnsupportedFormatError, stated).found
    if stated is None:
        assert "ComfyUI" in str(only_defect(mx, ScaleShapeError).remedy)
    else:
        assert not paired(mx, stated).defects


@pytest.mark.parametrize("factor", ["m.q.pre_quant_scale", "m.q.weight_scale_2", "m.q.weight_zero_point"])
def test_a_second_factor(factor: str) -> None:
    """What would have to be applied as well is refused."""
    result = paired({"m.q.weight": W, "m.q.weight_scale": S, factor: ("BF16", (256,))})
    assert [type(defect) for defect in result.defects][:1] == [UnsupportedFormatError]


# Defects of one weight.

F32, FLOATS = "F32", ("BF16", "F32", "F16")
GOOD: dict[str, Spec] = {"good.weight": W, "good.weight_scale_inv": S}
BF16 = ("BF16", (4, 4))
FOREIGN = sorted({*DTYPE_BITS} - {*FP8_SCALES} - {*FP8_DTYPES} - {"F4", "F6_E2M3", "F6_E3M2"})
SQUARES = (128, 128)


PACKED: dict[str, tuple[str, dict[str, Spec]]] = {
    "F6 in the header": ("m.q.weight", {"m.q.weight": ("F6_E2M3", (64, 64)), "m.q.weight_scale": ("F8_E8M0", (64, 2))}),
    "compressed-tensors MXFP6": ("m.q.weight_packed",
     {"m.q.weight_packed": ("U8", (64, 120)), "m.q.weight_scale": ("U8", (64, 5))}),
    "compressed-tensors INT4": ("m.q.weight_packed",
     {"m.q.weight_packed": ("I32", (64, 8)), "m.q.weight_scale": ("BF16", (64, 1)), "m.q.weight_shape": ("I64", (2,))}),
    "INT8": ("m.q.weight", {"m.q.weight": ("I8", (64, 64)), "m.q.weight_scale": ("F32", (64, 1))}),
    "bitsandbytes in four bits": ("m.q.weight",
     {"m.q.weight": ("U8", (2048, 1)), "m.q.weight.absmax": ("U8", (64,)), "m.q.weight.quant_map": ("F32", (16,))}),
    "bitsandbytes": ("m.q.weight", {"m.q.weight": ("I8", (64, 64)), "m.q.SCB": ("F32", (64,))}),
    "GPTQ": ("m.q.qweight",
     {"m.q.qweight": ("I32", (8, 64)), "m.q.qzeros": ("I32", (1, 8)), "m.q.scales": ("F16", (1, 64)),
      "m.q.g_idx": ("I32", (64,))}),
}  # fmt: skip


def fp8(module: str, dtype: str, scale: tuple[int, ...], weight: tuple[int, ...] = (256, 256)) -> dict[str, Spec]:
    return {f"{module}.weight": ("F8_E4M3", weight), f"{module}.weight_scale_inv": (dtype, scale)}


def misfit(
    scale: tuple[int, ...], expected: str, block: tuple[int, ...] | None = SQUARES, weight: tuple[int, ...] = (256, 256)
) -> Defect:
    """A scale that does not fit ``a.weight``: shapes, file, and the block size where it is of as many dimensions."""
    words = [f"scale shape {scale} in {FILE} does not fit weight {weight}"]
    words += [f"with block size {block}"] if block is not None and len(block) <= len(weight) else []
    return Defect(ScaleShapeError, "a.weight", fp8("a", F32, scale, weight), *words, expected=expected, block=block)


class Defect:
    """The one defect of what is stored, the tensor that it names, words that it says, and what was expected."""

    def __init__(
        self, kind: type[Fp8CheckpointError], tensor: str, stored: dict[str, Spec], *found: str,
        expected: str | None = None, block: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.tensor, self.stored, self.found = kind, tensor, stored, found
        self.expected, self.block = expected, block


#: The codes of each never become a tensor.
DEFECTS: dict[str, Defect] = {
    **{f"no scale of {dtype}": Defect(MissingScaleError, "a.weight", {"a.weight": (dtype, (4, 4)), **GOOD}, dtype,
            expected="a.weight_scale_inv") for dtype in FP8_DTYPES},
    **{f"no weight of {end}": Defect(OrphanScaleError, f"a.{end}", {f"a.{end}": S, "b.weight": BF16},
            "without a weight", expected=f"an FP8 tensor a.{weight}")
       for end, weight in (("weight_scale_inv", "weight"), ("weight_scale", "weight"), ("qscale_weight", "weight"),
                           ("weight_scale_2", "weight"), ("weight_global_scale", "weight_packed"))},
    **{f"{end} of a weight of {dtype}": Defect(OrphanScaleError, f"a.{end}",
            {"a.weight": (dtype, (4, 4)), f"a.{end}": S}, dtype)
       for end in ("weight_scale_inv", "weight_scale", "qscale_weight") for dtype in FLOATS},
    **{f"{end} of a weight that is not FP8": Defect(OrphanScaleError, f"a.{end}",
            {"a.weight": BF16, f"a.{end}": S, **GOOD})
       for end in ("activation_scale", "input_scale", "qscale_act")},
    # Names that may be a parameter's are a scale's where the weight stands beside them.
    **{f"{scale} of a weight that is not FP8": Defect(OrphanScaleError, scale, {weight: BF16, scale: S})
       for weight, scale in (("m.e.up_proj", "m.e.up_proj_weight_scale"), ("m.q.weight", "m.q.scale_weight"))},
    "no fused experts": Defect(OrphanScaleError, "m.experts.gate_up_proj_scale_inv",
        {"m.experts.gate_up_proj_scale_inv": ("BF16", (4, 1, 1))}, expected="an FP8 tensor m.experts.gate_up_proj"),
    **{f"{one} and {two}": Defect(AmbiguousScaleError, "a.weight", {"a.weight": W, f"a.{one}": S, f"a.{two}": S},
            f"a.{one}", f"a.{two}")
       for one, two in (("weight_scale_inv", "weight_scale"), ("weight_scale", "scale"),
                        ("weight_scale_inv", "qscale_weight"), ("qscale_weight", "scale"))},
    **{f"a scale of {dtype}": Defect(ScaleDtypeError, "a.weight", fp8("a", dtype, ()),
            f"a.weight_scale_inv in {FILE} has dtype {dtype}", expected="one of F32, BF16, F16, U8, F8_E8M0")
       for dtype in FOREIGN},
    "too few columns": misfit((2, 1), "(2, 2)"),
    "too many rows": misfit((3, 2), "(2, 2)"),
    "MiMo V2's k_proj, of more block rows than its weight": misfit((4, 2), "(2, 2)", SQUARES, (192, 256)),
    "too few of ragged blocks": misfit((2, 1), "(3, 2)", SQUARES, (300, 200)),
    "too few groups": misfit((24, 3), "(24, 4)", (1, 32), (24, 100)),
    "too few of a stack": misfit((3, 2, 1), "(3, 2, 2)", SQUARES, (3, 130, 200)),
    "blocks of no size": misfit((2, 2), "one scale, or one per row", None),
    "rows too few": misfit((255,), "one scale, or one per row", None),
    "blocks of a vector": misfit((2,), "one scale, or one per row", SQUARES, (256,)),
    "torchao's names, no scale": Defect(MissingScaleError, "m._weight_qdata", {"m._weight_qdata": W},
        expected="m._weight_scale"),
    **{f"integers of torchao in {dtype}": Defect(UnsupportedFormatError, "m._weight_qdata", {
            "m._weight_qdata": (dtype, (4, 4)), "m._weight_scale": (F32, (4, 1)),
            "m._weight_zero_point": ("I8", (4, 1))})
       for dtype in ("I8", "U8")},
    "blocks of no elements": Defect(ScaleShapeError, "a._weight_qdata",
        {"a._weight_qdata": ("F8_E4M3", (0, 4)), "a._weight_scale": (F32, (2, 1))}),
    **{f"{end} beside the scale": Defect(UnsupportedFormatError, "a.weight",
            {"a.weight": W, "a.weight_scale": S, f"a.{end}": S}, f"a.{end}")
       for end in ("weight_scale_2", "weight_global_scale", "weight_zero_point")},
    "a second factor of fused experts": Defect(UnsupportedFormatError, "m.up_proj", {
        "m.up_proj": ("F8_E4M3", (2, 8, 8)), "m.up_proj_weight_scale": (F32, (2, 1, 1)),
        "m.up_proj_weight_scale_2": (F32, (2, 1, 1))}),
    "a second factor of values": Defect(OrphanScaleError, "m.up_proj_weight_scale_2",
        {"m.up_proj": ("BF16", (2, 8, 8)), "m.up_proj_weight_scale_2": (F32, (2, 1, 1))}),
    # Codes of four bits.
    "groups of 16 under exponents": Defect(ScaleShapeError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("U8", (64, 4))}),
    "one scale a row": Defect(ScaleShapeError, "m.q.weight_packed", {
        "m.q.weight_packed": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 1)),
        "m.q.weight_global_scale": ("F32", (1,))}),
    "groups of 8 bytes": Defect(ScaleShapeError, "m.up_blocks", {
        "m.up_blocks": ("U8", (2, 64, 2, 8)), "m.up_scales": ("U8", (2, 64, 2))}),
    "no scale of gpt-oss": Defect(MissingScaleError, "m.up_blocks", {"m.up_blocks": ("U8", (2, 64, 2, 16))}),
    "no weight of gpt-oss": Defect(OrphanScaleError, "m.up_scales", {
        "m.up_scales": ("U8", (2, 64, 2)), **GOOD}),
    "no scale in the header's": Defect(MissingScaleError, "m.q.weight", {"m.q.weight": ("F4", (64, 64))}),
    "no scale of compressed-tensors": Defect(MissingScaleError, "m.q.weight_packed",
        {"m.q.weight_packed": ("U8", (64, 32))}),
    "no factor": Defect(MissingScaleError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 4))}),
    "a factor of rows": Defect(ScaleShapeError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 4)),
        "m.q.weight_scale_2": ("F32", (64,))}),
    "a factor of another dtype": Defect(ScaleDtypeError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 4)), "m.q.weight_scale_2": ("BF16", ())}),
    "a factor of exponents": Defect(UnsupportedFormatError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("U8", (64, 2)), "m.q.weight_scale_2": ("F32", ())}),
    "scales of another dtype": Defect(ScaleDtypeError, "m.q.weight_packed", {
        "m.q.weight_packed": ("U8", (64, 32)), "m.q.weight_scale": ("BF16", (64, 2))}),
    "a zero point": Defect(UnsupportedFormatError, "m.q.weight_packed", {
        "m.q.weight_packed": ("U8", (64, 32)), "m.q.weight_scale": ("U8", (64, 2)),
        "m.q.weight_zero_point": ("U8", (64, 2))}),
    "a scale of inputs": Defect(UnsupportedFormatError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 4)), "m.q.weight_scale_2": ("F32", ()),
        "m.q.pre_quant_scale": ("F32", (64,))}),
    "rows of an odd number": Defect(HeaderError, "m.q.weight", {
        "m.q.weight": ("F4", (4, 3)), "m.q.weight_scale": ("U8", (4, 1))}),
    "the order of a kernel": Defect(UnsupportedFormatError, "m.q.weight", {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 4)), "m.q.weight_scale_2": ("F32", ()),
        "m.q.comfy_quant": ("U8", (20,))}),
    # Packed formats, which are not read.
    **{f"{name}, {where}": Defect(UnsupportedFormatError, weight, {**stored, **beside}, stored[weight][0])
       for name, (weight, stored) in PACKED.items() for where, beside in (("alone", {}), ("beside FP8", GOOD))},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_one_defect(name: str) -> None:
    row = DEFECTS[name]
    error = only_defect(row.stored, row.kind, row.block)
    assert error.tensor == row.tensor
    assert all(words in error.found for words in row.found)
    assert row.expected in (None, error.expected)
    values = {k for k, (dtype, _) in row.stored.items() if dtype in FLOATS and k.endswith((".weight", "up_proj"))}
    assert set(paired(row.stored, row.block).tensors) == values | ({"good.weight"} & row.stored.keys())


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_a_scale_of_fp8_is_no_scale(dtype: str) -> None:
    """An FP8 tensor named as a scale is a weight without a scale, as is the weight that it stands beside."""
    result = paired({"a.weight": W, "a.weight_scale_inv": (dtype, (1,))})
    assert [type(defect) for defect in result.defects] == [MissingScaleError, MissingScaleError]
    assert not result.tensors


@pytest.mark.parametrize(
    "wrong", ["m.q.weight_scales_inv", "m.q.scale_inv", "m.q.weights_scale", "m.q.weightscale", "m.q.wscale"]
)
def test_a_misnamed_scale_is_pointed_at(wrong: str) -> None:
    """The message of a missing scale names what its misnamed scale may be."""
    result = paired({"m.q.weight": W, wrong: S, "m.k.weight": W, "m.k.weight_scale_inv": S})
    missing = [defect for defect in result.defects if isinstance(defect, MissingScaleError)]
    assert [defect.tensor for defect in missing] == ["m.q.weight"]
    assert f"is {wrong} its scale, misnamed?" in missing[0].found
    assert "m.q.weight" not in result.tensors


def test_a_scale_misnamed_by_case_or_module() -> None:
    """Another case or another module is another name: missing, and orphan where it can be nothing but a scale."""
    result = paired({"m.q.weight": W, "m.Q.weight_scale_inv": S})
    assert {type(defect) for defect in result.defects} == {MissingScaleError, OrphanScaleError}


def test_the_message_of_the_design() -> None:
    """The example that DESIGN section 7 gives, with its facts in its order."""
    module = "model.layers.3.mlp.up_proj"
    spans = spans_of(fp8(module, F32, (3, 2)), {f"{module}.weight_scale_inv": "model-00002.safetensors"})
    assert (
        "scale shape (3, 2) in model-00002.safetensors does not fit weight (256, 256) "
        "with block size (128, 128); expected (2, 2)" in str(pair(spans, BlockSizes((128, 128))).defects[0])
    )


def test_all_defects_are_listed() -> None:
    """One of each kind in one checkpoint, and the sound tensors beside them."""
    tensors: dict[str, Spec] = {
        "good.weight": W, "good.weight_scale_inv": S, "missing.weight": W, "orphan.weight_scale_inv": S,
        "two.weight": W, "two.weight_scale_inv": S, "two.weight_scale": S, "shape.weight": W,
        "shape.weight_scale_inv": ("F32", (7, 7)), "dtype.weight": W, "dtype.weight_scale_inv": ("I64", ()),
        "packed.weight": ("F6_E2M3", (4, 4)), "packed.weight_scale": ("F8_E8M0", (4, 1)), "norm.weight": ("BF16", (8,)),
    }  # fmt: skip
    result = paired(tensors)
    kinds = {AmbiguousScaleError, MissingScaleError, OrphanScaleError, ScaleDtypeError, ScaleShapeError,
             UnsupportedFormatError}  # fmt: skip
    assert {type(defect) for defect in result.defects} == kinds
    assert len(result.defects) == len(kinds)
    assert set(result.tensors) == {"good.weight", "norm.weight"}


def test_an_incomplete_checkpoint_is_not_blamed_for_what_was_not_read() -> None:
    """Where a file could not be read, missing and orphan scales are no defects; wrong shapes still are."""
    tensors: dict[str, Spec] = {"a.weight": W, "b.weight_scale_inv": S, **fp8("c", F32, (9, 9))}
    assert [type(defect) for defect in paired(tensors, complete=False).defects] == [ScaleShapeError]
    assert not paired(tensors, complete=False).tensors


# Codes of four bits.

# A weight's own name; its shape, its group, whether a second level divides; what is stored.
FOUR_BITS: dict[str, tuple[str, tuple[int, ...], int, bool | None, dict[str, Spec]]] = {
    "MXFP4 in the header": ("m.q.weight", (64, 66), 32, None, {
        "m.q.weight": ("F4", (64, 66)), "m.q.weight_scale": ("F8_E8M0", (64, 3))}),
    "gpt-oss": ("m.experts.gate_up_proj", (2, 96, 64), 32, None, {
        "m.experts.gate_up_proj_blocks": ("U8", (2, 64, 3, 16)), "m.experts.gate_up_proj_scales": ("U8", (2, 64, 3)),
        "m.experts.gate_up_proj_bias": ("BF16", (2, 64))}),
    "DeepSeek V4 experts": ("m.experts.0.w1.weight", (64, 96), 32, None, {
        "m.experts.0.w1.weight": ("I8", (64, 48)), "m.experts.0.w1.scale": ("F8_E8M0", (64, 3))}),
    "Quark MXFP4": ("m.q.weight", (64, 64), 32, None, {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("U8", (64, 2))}),
    "compressed-tensors MXFP4": ("m.q.weight", (64, 64), 32, None, {
        "m.q.weight_packed": ("U8", (64, 32)), "m.q.weight_scale": ("U8", (64, 2))}),
    "compressed-tensors NVFP4": ("m.q.weight", (64, 72), 16, True, {
        "m.q.weight_packed": ("U8", (64, 36)), "m.q.weight_scale": ("F8_E4M3", (64, 5)),
        "m.q.weight_global_scale": ("F32", (1,)), "m.q.input_global_scale": ("F32", (1,))}),
    "ModelOpt NVFP4": ("m.q.weight", (64, 64), 16, False, {
        "m.q.weight": ("U8", (64, 32)), "m.q.weight_scale": ("F8_E4M3", (64, 4)), "m.q.weight_scale_2": ("F32", ()),
        "m.q.input_scale": ("F32", ())}),
    "ModelOpt NVFP4 experts": ("m.experts.up_proj", (3, 64, 64), 16, False, {
        "m.experts.up_proj": ("U8", (3, 64, 32)), "m.experts.up_proj_weight_scale": ("F8_E4M3", (3, 64, 4)),
        "m.experts.up_proj_weight_scale_2": ("F32", ())}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUR_BITS)
@pytest.mark.parametrize("other", [{}, {"good.weight": W, "good.weight_scale_inv": S}], ids=["alone", "beside FP8"])
def test_codes_of_four_bits(name: str, other: dict[str, Spec]) -> None:
    """The weight's own name, and its own shape: twice as many columns as bytes; nothing beside it becomes a tensor."""
    weight, shape, group, divides, stored = FOUR_BITS[name]
    result = paired({**stored, **other})
    assert not result.defects
    plain = {key for key in stored if key.endswith("_bias")}
    assert set(result.tensors) == {weight, *plain, *({"good.weight"} if other else set())}
    tensor = result.tensors[weight].scaled
    assert tensor is not None
    assert (tensor.shape, tensor.grid.block_size[-1], tensor.code_dtype) == (shape, group, "F4")
    assert set(tensor.grid.block_size[:-1]) == {1}
    assert (None if tensor.second is None else tensor.second.divides) == divides
    assert {span.name for span in tensor.spans} == stored.keys() - plain
    assert tensor.packed.nbytes == tensor.weight.nbytes


def test_names_that_only_end_like_those_of_packed_weights() -> None:
    """A parameter called blocks, or a plain matrix of bytes, is what it is, under its own name."""
    stored: dict[str, Spec] = {
        "m.conv_blocks": ("BF16", (4, 4)), "m.mask_blocks": ("U8", (4, 4)), "m.norm_scales": ("BF16", (4,)),
        "m.ids_packed": ("U8", (4, 4)), "m.q.weight": W, "m.q.weight_scale": S,
    }  # fmt: skip
    result = paired(stored)
    assert not result.defects
    assert set(result.tensors) == set(stored) - {"m.q.weight_scale"}


def test_integers_that_are_no_weights() -> None:
    """Buffers of integers, and e8m0 scales in bytes, are not taken for packed weights."""
    stored: dict[str, Spec] = {
        "position_ids": ("I64", (1, 8)), "m.gate.tid2eid": ("I32", (16, 4)),
        "m.q.weight": ("F8_E4M3", (24, 64)), "m.q.weight_scale": ("U8", (24, 2)),
        "m.experts.up_proj": ("F8_E4M3", (2, 24, 64)), "m.experts.up_proj_scale": ("U8", (2, 24, 2)),
    }  # fmt: skip
    result = paired(stored, (1, 32))
    assert not result.defects
    assert set(result.tensors) == {name for name in stored if "scale" not in name}


# Bounded work: calls are counted at two sizes, and grow no faster than these.


def _calls(tensors: Mapping[str, TensorSpan], blocks: BlockSizes) -> tuple[int, Pairing]:
    """How many calls, of Python and of C, a pairing makes; and what it finds."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        result = pair(tensors, blocks)
    finally:
        sys.setprofile(None)
    return count, result


def _lone(count: int) -> dict[str, Spec]:
    return {f"model.layers.{i}.q.weight": W for i in range(count)}


def _misnamed(count: int, module: str) -> dict[str, Spec]:
    tensors: dict[str, Spec] = {}
    for i in range(count):
        tensors[module.format(i=i) + f".w{i}"] = W
        tensors[module.format(i=i) + f".scale_of_w{i}"] = S
    return tensors


def _sound(count: int) -> dict[str, Spec]:
    """Pairs of many shapes."""
    tensors: dict[str, Spec] = {}
    for i in range(count):
        tensors[f"m.{i}.weight"] = ("F8_E4M3", (i + 1, 256))
        tensors[f"m.{i}.weight_scale_inv"] = ("F32", (-(-(i + 1) // 128), 2))
    return tensors


@pytest.mark.parametrize(("made", "defects"), [
    pytest.param(_lone, True, id="weights without scales"),
    pytest.param(partial(_misnamed, module="m"), True, id="misnamed scales in one module"),
    pytest.param(partial(_misnamed, module="m.{i}"), True, id="misnamed scales in many"),
    pytest.param(_sound, False, id="sound weights"),
])  # fmt: skip
def test_many_weights(made: Callable[[int], dict[str, Spec]], defects: bool) -> None:
    """Twice as many take about twice the calls, sound or not; each is found."""
    blocks = BlockSizes((128, 128))
    (once, _), (twice, result) = (_calls(spans_of(made(count)), blocks) for count in (5_000, 10_000))
    assert twice < 2.2 * once
    assert len(result.defects) == (10_000 if defects else 0)
    assert defects or len(result.tensors) == 10_000
