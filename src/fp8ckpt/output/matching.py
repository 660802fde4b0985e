"""What must hold before values are written in an FP8 base's layout: the base is FP8, and both have the same tensors."""

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

FLOATS = (*TARGET_BYTES, "F64")  # dtypes of a state dict that are cast to one another


def refuse_base(base: Checkpoint, remedy: str) -> None:
    """Raise `UnsupportedFormatError` unless a base holds FP8, or scales of an FP8 cache, and `ScaleValueError` unless
    all of its scales are valid.
    """
    if not base.quantized and not base.cache_scales:
        raise UnsupportedFormatError.of_base(file=str(base.path), remedy=remedy)
    raise_first(scale_defects(base.quantized, base.cache_scales))


def refuse_other_tensors(
    found: Mapping[str, Tensor] | Mapping[str, TensorSpec],
    base: Checkpoint,
    what: str,
    remedy: str,
    carry: Collection[str] = (),
) -> set[str]:
    """Raise `ModelMismatchError` unless ``what`` (the "source", the "model") has the logical tensors of the base, with
    the same shapes. Returns those of ``carry`` that only the base has.
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
    """Raise `UnsupportedFormatError` or `ModelMismatchError` unless the base's tensors can be made of these dtypes."""
    for name, given in found.items():
        tensor = base.tensors[name]
        if tensor.scaled is not None:
            if tensor.scaled.code_dtype not in CODINGS:
                raise UnsupportedFormatError.of_codes(tensor, dtype=tensor.scaled.code_dtype)
            refuse_dtype(given)
    refuse_other_kinds(found, base, TARGET_BYTES.keys())


def refuse_other_kinds(
    found: Mapping[str, Tensor] | Mapping[str, TensorSpec], base: Checkpoint, floats: Collection[str] = FLOATS
) -> None:
    """Raise `ModelMismatchError` unless tensors that are not FP8 in the base have its dtype, or both are of ``floats``,
    which are rounded to one another.
    """
    for name, given in found.items():
        stored = base.tensors[name].dtype
        if given.dtype != stored and not {given.dtype, stored} <= set(floats):
            raise ModelMismatchError.of_dtype(name, file=_file_of(given), dtype=given.dtype, base=stored)


def in_fewer_bits(found: Mapping[str, Tensor], base: Checkpoint) -> list[str]:
    """The tensors that the base holds in more bits, and plain: the base's values cannot be restored, trained or not."""
    plain = {name: tensor.dtype for name, tensor in base.tensors.items() if tensor.scaled is None}
    return [name for name in found.keys() & plain if DTYPE_BITS[plain[name]] > DTYPE_BITS[found[name].dtype]]


def refuse_dtype(given: Tensor | TensorSpec) -> None:
    """Raise `UnsupportedFormatError` if quantizing is not defined for the dtype of a weight."""
    if given.dtype not in TARGET_BYTES:
        what = f"a weight of dtype {given.dtype}"
        remedy = "cast it first, if its values are numbers and not packed codes"
        raise UnsupportedFormatError.of_dtype(given.name, _file_of(given), what, TARGET_BYTES, remedy)


def _file_of(tensor: Tensor | TensorSpec) -> File | None:
    return None if isinstance(tensor, TensorSpec) else tensor.span.file
