"""What must be true before values are written in the layout of an FP8 base: the base is one, and both hold the same
tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fp8ckpt.errors import ModelMismatchError, UnsupportedFormatError
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.numerics.quantize import CODINGS
from fp8ckpt.output.layout import TensorSpec
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.checkpoint import Checkpoint, raise_first
from fp8ckpt.tensors.reading import scale_defects
from fp8ckpt.tensors.stored import DTYPE_BITS
from fp8ckpt.tensors.tensor import Tensor

FLOATS = (*TARGET_BYTES, "F64")  # of a state dict: each is cast to another


def refuse_base(base: Checkpoint, remedy: str) -> None:
    """A base holds FP8, or scales of an FP8 cache, and scales that are scales. Raises `UnsupportedFormatError` and
    `ScaleValueError`.
    """
    if not base.quantized and not base.cache_scales:
        found = "none of its tensors is quantized"
        raise UnsupportedFormatError(found, file=str(base.path), expected="an FP8 base", remedy=remedy)
    raise_first(scale_defects(base.quantized, base.cache_scales))


def refuse_other_tensors(
    found: Mapping[str, Tensor] | Mapping[str, TensorSpec],
    base: Checkpoint,
    what: str,
    remedy: str,
    carry: Collection[str] = (),
) -> set[str]:
    """The same logical tensors in ``what`` (the "source", the "model") as in the base, of the same shapes. Returns
    those that are only in the base and may be, being of ``carry``. Raises `ModelMismatchError`.
    """
    missing, extra = base.tensors.keys() - found.keys(), found.keys() - base.tensors.keys()
    carried = missing & set(carry)
    missing -= carried
    if missing or extra:
        raise ModelMismatchError.of_tensors(base.path, missing, extra, what, remedy)
    for name, tensor in base.tensors.items():
        if name not in carried and found[name].shape != tensor.shape:
            raise ModelMismatchError.of_shape(name, _file_of(found[name]), found[name].shape, tensor.shape, what)
    return carried


def refuse_other_dtypes(found: Mapping[str, Tensor] | Mapping[str, TensorSpec], base: Checkpoint) -> None:
    """The tensors are of dtypes that those of the base can be made of. Raises `UnsupportedFormatError`,
    `ModelMismatchError`.
    """
    for name, given in found.items():
        tensor = base.tensors[name]
        if tensor.scaled is not None:
            if tensor.scaled.code_dtype not in CODINGS:
                raise UnsupportedFormatError.of_codes(tensor, tensor.scaled.code_dtype)
            refuse_dtype(given)
    refuse_other_kinds(found, base, TARGET_BYTES.keys())


def refuse_other_kinds(
    found: Mapping[str, Tensor] | Mapping[str, TensorSpec], base: Checkpoint, floats: Collection[str] = FLOATS
) -> None:
    """Tensors that are not FP8 in the base are of its dtype; ``floats`` are rounded to one another. Raises
    `ModelMismatchError`.
    """
    for name, given in found.items():
        stored = base.tensors[name].dtype
        if given.dtype != stored and not {given.dtype, stored} <= set(floats):
            raise ModelMismatchError.of_dtype(name, _file_of(given), given.dtype, stored)


def in_fewer_bits(found: Mapping[str, Tensor], base: Checkpoint) -> list[str]:
    """The tensors that the base holds in more bits, and plain: what they were cannot come back, trained or not."""
    plain = {name: tensor.dtype for name, tensor in base.tensors.items() if tensor.scaled is None}
    return [name for name in found.keys() & plain if DTYPE_BITS[plain[name]] > DTYPE_BITS[found[name].dtype]]


def refuse_dtype(given: Tensor | TensorSpec) -> None:
    """A weight to be quantized is of a dtype that quantizing is defined for."""
    if given.dtype not in TARGET_BYTES:
        what = f"a weight of dtype {given.dtype}"
        remedy = "cast it first, if its values are numbers and not packed codes"
        raise UnsupportedFormatError.of_dtype(given.name, _file_of(given), what, TARGET_BYTES, remedy)


def _file_of(tensor: Tensor | TensorSpec) -> File | None:
    return None if isinstance(tensor, TensorSpec) else tensor.span.file
