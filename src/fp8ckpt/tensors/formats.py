"""The one table of formats: the tensors that stand beside a weight's codes, and their names.

Weights are found by dtype, in the headers; everything else by name, beside the weight. A new family is a row of one of
these tables. An empty ending matches any key: "X.weight" with "X.weight_scale_inv", and fused experts' "X.gate_up_proj"
with "X.gate_up_proj_scale_inv".

Codes of four bits are stored as bytes, two codes in each, and have no dtype of their own. The row identifies them, or
their scales do: exponents for groups of 32 (MXFP4) or e4m3 for groups of 16 (NVFP4), which integers never have.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ckpt.numerics.codes import CODE_FORMATS, E8M0_DTYPES, F4, FP8_DTYPES

if TYPE_CHECKING:
    from fp8ckpt.tensors.stored import TensorSpan

# When a key with a scale's ending counts as a scale although no FP8 weight stands beside it, and so is a defect.
ALWAYS = "always"
BESIDE = "beside"  # if a weight of its name exists, of any dtype
CODES = "codes"  # never: names of parameters end so too, such as layer scales and the scales of norms
BYTES = "bytes"  # if it holds bytes


class ScaleRow(NamedTuple):
    """A rule that turns the key of a weight's codes into the key of its scale.

    ``weight``: the ending of the codes' key; ``scale``: the ending that replaces it for the scale, and ``factor`` for
    the second level of scales, which ``divides`` or multiplies. ``leaf``: a prefix of the last part of the codes' key
    that the weight's own name lacks. ``even``: blocks divide the weight evenly, so the two shapes give the block size.
    ``bits``: of a code that is stored in bytes; 0 if only the scales tell. ``groups``: whether the codes of a group are
    a dimension of their own. ``across``: whether the weight's last two dimensions are the codes' in the other order.
    """

    weight: str
    scale: str
    meant: str = CODES
    leaf: str = ""
    even: bool = False
    factor: str = ""
    divides: bool = False
    bits: int = 0
    groups: bool = False
    across: bool = False

    @property
    def renames(self) -> bool:
        """Whether the weight's own name differs from the key of its codes."""
        return self.weight not in ("", ".weight")


_TORCHAO = "_qdata"

SCALES = (
    ScaleRow("", "_scale_inv", ALWAYS),  # DeepSeek V3, Qwen3, Mistral3, MiniMax; fused experts of Mistral 4
    # compressed-tensors, ModelOpt (NVFP4 too), Quark (MXFP4 too), fbgemm_fp8 and its fused experts
    ScaleRow("", "_scale", factor="_scale_2"),
    ScaleRow("", "_weight_scale", BESIDE, factor="_weight_scale_2"),  # fused experts of ModelOpt (Llama 4)
    ScaleRow(".weight", ".qscale_weight", ALWAYS),  # Mistral native
    ScaleRow(".weight", ".scale"),  # DeepSeek V4, its packed experts too
    ScaleRow(".weight", ".scale_weight", BESIDE),  # ComfyUI, and other single files of diffusion models
    ScaleRow(_TORCHAO, "_scale", leaf="_", even=True),  # torchao: "X._weight_qdata", "X._weight_scale" are "X.weight"
    # compressed-tensors in four bits: "X.weight_packed" and "X.weight_scale" are "X.weight"
    ScaleRow("_packed", "_scale", factor="_global_scale", divides=True, bits=4),
    # gpt-oss: "X_blocks" and "X_scales" are "X", [experts, in, out], as in its BF16 releases and in engines
    ScaleRow("_blocks", "_scales", BYTES, bits=4, groups=True, across=True),
)
# A key with one of these endings is a scale or a mistake. "_scale" is not among them, ".weight_scale" is.
ONLY_SCALES = (
    ".weight_scale", ".weight_scale_2", ".weight_global_scale", *(row.scale for row in SCALES if row.meant == ALWAYS),
)  # fmt: skip

# How many codes of four bits share one scale, by the dtype of the scale.
GROUPS = {**dict.fromkeys(E8M0_DTYPES, 32), "F8_E4M3": 16}
TWO_LEVELS = "F8_E4M3"
_BYTES = ("U8", "I8")
MAY_BE_CODES = frozenset((*CODE_FORMATS, *_BYTES))

# The same for activation scales: a conversion to BF16 drops them, one to FP8 carries them over from the base.
ACTIVATIONS = (
    ScaleRow(".weight", ".activation_scale", ALWAYS),  # Mistral3 (static)
    ScaleRow(".weight", ".input_scale", ALWAYS),  # compressed-tensors, ModelOpt
    ScaleRow(".weight", ".qscale_act", ALWAYS),  # Mistral native
    ScaleRow("", "_activation_scale", ALWAYS),  # fused experts
    ScaleRow("", "_input_scale", ALWAYS),
    ScaleRow(".weight", ".act_scale"),  # the older name of ".input_scale"
    ScaleRow(".weight", ".scale_input"),  # ComfyUI
    ScaleRow("_qdata", "_act_quant_scale", leaf="_"),  # torchao
    ScaleRow(".weight_packed", ".input_global_scale", ALWAYS),  # compressed-tensors in four bits
)
ONLY_ACTIVATION_SCALES = tuple(row.scale for row in ACTIVATIONS if row.meant == ALWAYS)

# Scales of attention and of its cache, which belong to no weight: one value, or one a head.
ATTENTION_SCALES = (
    ".q_scale", ".k_scale", ".v_scale",  # ModelOpt, compressed-tensors, Quark; of a projection or of the attention
    ".kv_scale", ".prob_output_scale", ".prob_scale",  # one cache for both; the attention's weights
    "_fake_quantizer.qscale_act",  # Mistral native
)  # fmt: skip
# The scale of a projection's output, as the cache holds it. It is one only beside a matrix: other parameters end so.
OUTPUT_SCALE = ".output_scale"

# Tensors that only say what the file is. ComfyUI: one of no values, or of two; lately, a text for each layer.
MARKERS = FILE_MARKER, LAYER_MARKER = "scaled_fp8", ".comfy_quant"
# Parts of tensor names in checkpoints whose scales may be stored in the order in which a kernel reads them.
ORDERED = (_TORCHAO, LAYER_MARKER)

# Packed and integer weights, which are not read: dtypes, endings of weights, then endings of tensors beside them.
PACKED_DTYPES = ("F6_E2M3", "F6_E3M2")
PACKED_WEIGHTS = (".weight_packed", ".qweight")  # compressed-tensors; GPTQ and AWQ
INTEGERS = ("I8", "U8", "I32", "U32")
MAY_BE_PACKED = frozenset((*PACKED_DTYPES, *INTEGERS))
INTEGER_SCALES = (*(row.scale for row in SCALES), ".SCB", ".absmax")  # the last two: bitsandbytes
COMPANIONS = (
    ".weight_scale", ".weight_scale_inv", ".scale", ".weight_scale_2", ".weight_global_scale", ".weight_zero_point",
    ".weight_shape", ".input_scale", ".input_global_scale", ".SCB", ".scales", ".qzeros", ".g_idx", "_scale",
    "_scale_inv", "_scale_2", "_scales", ".scale_weight", ".scale_input", ".comfy_quant", "_weight_scale",
    "_input_scale", "_zero_point", ".absmax", ".weight.absmax", ".weight.quant_map",
)  # fmt: skip
# A second factor (other than the row's own) or a zero point, which we do not apply: by the weight's ending.
FACTORS = (
    (".weight", ".weight_scale_2"),
    (".weight", ".weight_global_scale"),
    (".weight", ".weight_zero_point"),
    ("", "_weight_scale_2"),  # fused experts of ModelOpt
    ("_packed", "_zero_point"),
    (".weight_packed", ".pre_quant_scale"),
    (".weight", ".pre_quant_scale"),
    ("_qdata", "_zero_point"),
    ("_qdata", "_act_pre_scale"),
)


def factor_key(codes: str, row: ScaleRow) -> str | None:
    """Return the key of the second level of scales beside the codes ``codes``, or None if the row has none."""
    return codes.removesuffix(row.weight) + row.factor if row.factor else None


def code_dtype(span: TensorSpan, spans: Mapping[str, Any]) -> str | None:
    """Return the dtype of the codes that a tensor holds, or None. ``spans``: all tensors by name."""
    if span.dtype in CODE_FORMATS:
        return span.dtype
    if span.dtype not in _BYTES or len(span.shape) < 2:
        return None
    for row in SCALES:
        if span.name.endswith(row.weight):
            scale = spans.get(span.name.removesuffix(row.weight) + row.scale)
            alone = span.name.endswith(PACKED_WEIGHTS) or (row.groups and len(span.shape) > 2)
            if (row.bits == 4 and alone) or (scale is not None and (row.bits == 4 or scale.dtype in GROUPS)):
                return F4
    return None


def weight_shape(row: ScaleRow, span: TensorSpan, codes: str) -> tuple[int, ...]:
    """Return the shape of the weight whose codes a tensor holds."""
    if span.dtype == codes:
        return span.shape
    *lead, last = span.shape
    if row.groups:
        last *= lead.pop()
    return (*lead, 2 * last)


_RENAMING = tuple(row for row in SCALES if row.renames)
RENAMING_ENDINGS = tuple(row.weight for row in _RENAMING)


def logical_name(codes: str) -> str:
    """Return the name of the weight whose codes are stored under ``codes``: torchao's "X._weight_qdata" is "X.weight".

    Call it with keys of codes only: another tensor may have such a key as its own name.
    """
    if not codes.endswith(RENAMING_ENDINGS):
        return codes
    for row in _RENAMING:
        if codes.endswith(row.weight):
            module, dot, leaf = codes.removesuffix(row.weight).rpartition(".")
            if leaf.startswith(row.leaf):
                return module + dot + leaf.removeprefix(row.leaf)
    return codes


_EVEN = tuple(row.weight for row in SCALES if row.even)


def even_block(codes: str, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the block size that the shapes of codes and scales give, for formats whose blocks are always even."""
    if not codes.endswith(_EVEN) or len(scale_shape) != len(shape) or not all((*shape, *scale_shape)):
        return None
    if any(dim % count for dim, count in zip(shape, scale_shape, strict=True)):
        return None
    return tuple(dim // count for dim, count in zip(shape, scale_shape, strict=True))


def in_kernel_order(codes: str, scale_dtype: str, scale_shape: tuple[int, ...], stored: Container[str]) -> bool:
    """Whether block scales may be stored in the order in which a kernel reads them, and not row by row, as torchao and
    ComfyUI store the scales of groups. ``stored``: the names of all tensors.
    """
    if scale_dtype not in GROUPS or prod(scale_shape) == 1:
        return False
    return codes.endswith(_TORCHAO) or codes.removesuffix(".weight") + LAYER_MARKER in stored


def names_of(stored: str) -> tuple[str, ...]:
    """Return the names that a stored tensor may have: its key, and the name of the weight whose codes it holds."""
    name = logical_name(stored)
    return (stored,) if name == stored else (stored, name)


def module_of(name: str) -> str:
    """Return the module that holds a weight. Fused experts, which have no ``.weight``, count as a module."""
    return name.removesuffix(".weight")


def is_attention_scale(name: str, shape: tuple[int, ...], stored: Container[str]) -> bool:
    """Whether a tensor of a quantized checkpoint is a scale of attention or of its cache.

    Its name decides, and its shape: one value, or one a head, ``[heads, 1, 1]``. A vector is a parameter, whatever its
    name. ``stored``: the names of all tensors.
    """
    one_a_head = len(shape) > 2 and shape[-2:] == (1, 1) and prod(shape) == max(shape)
    if prod(shape) != 1 and not one_a_head:
        return False
    if name.endswith(OUTPUT_SCALE):
        return any(name.removesuffix(OUTPUT_SCALE) + weight in stored for weight in (".weight", "._weight_qdata"))
    return name.endswith(ATTENTION_SCALES)


def is_marker(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor only says how the others are stored, and is no tensor of the model."""
    if not name.endswith((FILE_MARKER, LAYER_MARKER)):
        return False
    if name.rpartition(".")[2] == FILE_MARKER:
        return dtype in FP8_DTYPES and len(shape) == 1 and shape[0] <= 2
    return name.endswith(LAYER_MARKER) and dtype == "U8" and len(shape) == 1
