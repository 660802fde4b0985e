"""The one table of formats: what stands beside a weight's codes, and under which names.

Weights are found by dtype, in the headers; everything else by name, beside the weight. A new family is a row of one of
these tables. An ending that is empty stands for any key: "X.weight" with "X.weight_scale_inv", and fused experts'
"X.gate_up_proj" with "X.gate_up_proj_scale_inv".

Codes of four bits lie in bytes, two in one, and have no dtype of their own: they are told by the row, or by their
scales, which are exponents of groups of 32 (MXFP4) or e4m3 of groups of 16 (NVFP4), as no integers have them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ckpt.numerics.codes import CODE_FORMATS, E8M0_DTYPES, F4, FP8_DTYPES

if TYPE_CHECKING:
    from fp8ckpt.tensors.stored import TensorSpan

# When a key of a scale's ending is a scale, although no FP8 weight stands beside it: a mistake with a name, then.
ALWAYS = "always"
BESIDE = "beside"  # a weight of its name, of whatever dtype
CODES = "codes"  # never: the ending also ends the names of parameters, such as layer scales and those of norms
BYTES = "bytes"  # where it holds bytes


class ScaleRow(NamedTuple):
    """How the key of a weight's codes becomes that of its scale.

    ``weight``: the ending of the key of the codes; ``scale``: what stands in its place, and ``factor``: for the second
    level of scales, which ``divides`` or multiplies. ``leaf``: what the last part of the key of the codes begins with,
    and the weight's own name does not. ``even``: blocks divide the weight, so that the two shapes say their size.
    ``bits``: of a code that lies in bytes; 0 where only the scales tell. ``groups``: whether the codes of a group are a
    dimension of their own. ``across``: whether the weight's last two dimensions are the codes' in the other order.
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
        """Whether the weight's own name lacks the ending of its codes."""
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
    # gpt-oss: "X_blocks" and "X_scales" are "X", [experts, in, out], as its releases in BF16 and engines have it
    ScaleRow("_blocks", "_scales", BYTES, bits=4, groups=True, across=True),
)
# A key of these endings is a scale or a mistake. "_scale" is no such ending, ".weight_scale" is.
ONLY_SCALES = (
    ".weight_scale", ".weight_scale_2", ".weight_global_scale", *(row.scale for row in SCALES if row.meant == ALWAYS),
)  # fmt: skip

# Codes of four bits by the dtype of their scales: how many share one.
GROUPS = {**dict.fromkeys(E8M0_DTYPES, 32), "F8_E4M3": 16}
TWO_LEVELS = "F8_E4M3"
_BYTES = ("U8", "I8")
MAY_BE_CODES = frozenset((*CODE_FORMATS, *_BYTES))

# The same for the scales of activations: a conversion drops them, the way back carries them over.
ACTIVATIONS = (
    ScaleRow(".weight", ".activation_scale", ALWAYS),  # Mistral3 (static)
    ScaleRow(".weight", ".input_scale", ALWAYS),  # compressed-tensors, ModelOpt
    ScaleRow(".weight", ".qscale_act", ALWAYS),  # Mistral native
    ScaleRow("", "_activation_scale", ALWAYS),  # fused experts
    ScaleRow("", "_input_scale", ALWAYS),
    ScaleRow(".weight", ".act_scale"),  # the name of ".input_scale" before it had that one
    ScaleRow(".weight", ".scale_input"),  # ComfyUI
    ScaleRow("_qdata", "_act_quant_scale", leaf="_"),  # torchao
    ScaleRow(".weight_packed", ".input_global_scale", ALWAYS),  # compressed-tensors in four bits
)
ONLY_ACTIVATION_SCALES = tuple(row.scale for row in ACTIVATIONS if row.meant == ALWAYS)

# Scales of attention and of its cache, which belong to no weight. They are one value, or one a head.
ATTENTION_SCALES = (
    ".q_scale", ".k_scale", ".v_scale",  # ModelOpt, compressed-tensors, Quark; of a projection or of the attention
    ".kv_scale", ".prob_output_scale", ".prob_scale",  # one cache for both; the attention's weights
    "_fake_quantizer.qscale_act",  # Mistral native
)  # fmt: skip
# What a projection puts out, and the cache holds: a scale beside a matrix, and elsewhere any parameter's name.
OUTPUT_SCALE = ".output_scale"

# What a file holds to say what it is. ComfyUI: a tensor of no values, or of two; and, of late, a text for each layer.
MARKERS = FILE_MARKER, LAYER_MARKER = "scaled_fp8", ".comfy_quant"
# What stands in the names of a checkpoint whose scales may be in the order in which a kernel reads them.
ORDERED = (_TORCHAO, LAYER_MARKER)

# What is packed or integer, and is not read: dtypes, and endings of weights; then endings of what stands beside them.
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
# A second factor (that is not the row's own) or a zero point, which we do not apply: by the ending of the weight's key.
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


def beside(rows: Iterable[ScaleRow]) -> Callable[[str], list[tuple[ScaleRow, str]]]:
    """What gives the keys that may stand beside codes of a name, by these rows of a table."""
    ends = [(row, row.weight, row.scale) for row in rows]

    def keys(codes: str) -> list[tuple[ScaleRow, str]]:
        return [(row, codes.removesuffix(end) + scale) for row, end, scale in ends if codes.endswith(end)]

    return keys if ends else lambda codes: []


def factor_key(codes: str, row: ScaleRow) -> str | None:
    """The key of the second level of scales that a row has beside the codes ``codes``."""
    return codes.removesuffix(row.weight) + row.factor if row.factor else None


def code_dtype(span: TensorSpan, spans: Mapping[str, Any]) -> str | None:
    """The dtype of the codes that a tensor holds, or None where it holds none. ``spans``: all tensors by name."""
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
    """The shape of the weight whose codes lie in a tensor."""
    if span.dtype == codes:
        return span.shape
    *lead, last = span.shape
    if row.groups:
        last *= lead.pop()
    return (*lead, 2 * last)


_RENAMING = tuple(row for row in SCALES if row.renames)
RENAMING_ENDINGS = tuple(row.weight for row in _RENAMING)


def logical_name(codes: str) -> str:
    """The name of the weight whose codes are stored under ``codes``: torchao's "X._weight_qdata" is "X.weight".

    For keys of codes only: another tensor may have such a name as its own.
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
    """The block size that the shapes of codes and scales say, in a format that has even blocks alone."""
    if not codes.endswith(_EVEN) or len(scale_shape) != len(shape) or not all((*shape, *scale_shape)):
        return None
    if any(dim % count for dim, count in zip(shape, scale_shape, strict=True)):
        return None
    return tuple(dim // count for dim, count in zip(shape, scale_shape, strict=True))


def in_kernel_order(codes: str, scale_dtype: str, scale_shape: tuple[int, ...], stored: Container[str]) -> bool:
    """Whether the scales of blocks may be stored in the order in which a kernel reads them, as torchao and ComfyUI
    store those of groups, and not row by row. ``stored``: the names of all tensors.
    """
    if scale_dtype not in GROUPS or prod(scale_shape) == 1:
        return False
    return codes.endswith(_TORCHAO) or codes.removesuffix(".weight") + LAYER_MARKER in stored


def names_of(stored: str) -> tuple[str, ...]:
    """The names that a tensor stored under a key may have: its own, and that of the weight whose codes it is."""
    name = logical_name(stored)
    return (stored,) if name == stored else (stored, name)


def module_of(name: str) -> str:
    """The module that holds a weight; fused experts, which are no ``.weight``, count as one."""
    return name.removesuffix(".weight")


def is_attention_scale(name: str, shape: tuple[int, ...], stored: Container[str]) -> bool:
    """Whether a tensor is a scale of attention or of its cache, in a checkpoint that is quantized.

    By its name, and by its shape: one value, or one a head, ``[heads, 1, 1]``. A vector is a parameter, whatever its
    name. ``stored``: the names of all tensors.
    """
    one_a_head = len(shape) > 2 and shape[-2:] == (1, 1) and prod(shape) == max(shape)
    if prod(shape) != 1 and not one_a_head:
        return False
    if name.endswith(OUTPUT_SCALE):
        return any(name.removesuffix(OUTPUT_SCALE) + weight in stored for weight in (".weight", "._weight_qdata"))
    return name.endswith(ATTENTION_SCALES)


def is_marker(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor only says how the others are stored, and is none of the model."""
    if not name.endswith((FILE_MARKER, LAYER_MARKER)):
        return False
    if name.rpartition(".")[2] == FILE_MARKER:
        return dtype in FP8_DTYPES and len(shape) == 1 and shape[0] <= 2
    return name.endswith(LAYER_MARKER) and dtype == "U8" and len(shape) == 1
