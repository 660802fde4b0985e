"""Scales as engines read them: their shapes, activation scales, powers of two, and equal scales of joined weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8ckpt.errors import ServingError, shown
from fp8ckpt.families.parallel import sibling_units
from fp8ckpt.output.like import with_needless_dimensions
from fp8ckpt.serving import notes
from fp8ckpt.serving.subject import Finding, Subject
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.blocks import block_sizes
from fp8ckpt.tensors.formats import module_of
from fp8ckpt.tensors.reading import read_floats
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan

if TYPE_CHECKING:
    import numpy.typing as npt

_EXPONENTS = ("F8_E8M0", "U8")


def shapes(subject: Subject) -> Iterator[Finding]:
    """A single scale must have no dimensions, or one."""
    quantized = subject.quantized
    wrong: list[TensorSpan] = [tensor.scale for tensor in with_needless_dimensions(subject.checkpoint)]
    if wrong:
        shape, count = list(wrong[0].shape), len(wrong)
        yield ServingError.of_dimensions(wrong[0], shape=shape, count=count, all=len(quantized))
    wrong = [span for t in quantized for span in t.activation_scales if not _is_one_value(span.shape, t.shape)]
    if wrong:
        of_shape = ServingError.of_activation_values if wrong[0].numel > 1 else ServingError.of_activation_shape
        yield of_shape(wrong[0], shape=list(wrong[0].shape), count=len(wrong))


def _is_one_value(shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> bool:
    return shape in ((), (1,)) or (len(weight_shape) == 3 and shape == weight_shape[:1])


def of_activations(subject: Subject) -> Iterator[Finding]:
    """One activation scale for each weight, or for none, as is stated for its module; if nothing is, all or none."""
    static: dict[frozenset[bool], list[QuantizedTensor]] = {}
    for tensor in subject.quantized:
        of_module = subject.stated.static(module_of(tensor.name)) if subject.stated else frozenset[bool]()
        static.setdefault(of_module, []).append(tensor)
    for stated, tensors in static.items():
        having = [tensor for tensor in tensors if tensor.activation_scales]
        lacking = [tensor for tensor in tensors if not tensor.activation_scales]
        count = len(subject.quantized)
        if lacking and (stated == {True} or (having and not stated)):
            by = f"by {subject.file}" if stated else "or for none"
            yield ServingError.of_lacking(lacking[0], count=len(lacking), all=count, by=by)
        if having and stated == {False}:
            name, file = having[0].name, having[0].activation_scales[0].file
            yield ServingError.of_needless(name, file=file, count=len(having), all=count, by=subject.file)


def powers_of_two(subject: Subject) -> Iterator[Finding]:
    """Every scale must be a power of two if ``scale_fmt`` is "ue8m0": engines drop the mantissa."""
    if not configuration.states_powers_of_two(subject.checkpoint.config):
        return
    spans = [tensor.scale for tensor in subject.quantized if tensor.scale.dtype not in _EXPONENTS]
    wrong: list[TensorSpan] = []
    count = 0
    for span, values in _read(spans):
        if others := int(np.count_nonzero(np.frexp(values)[0] != 0.5)):
            wrong.append(span)
            count += others
    if wrong:
        yield ServingError.of_powers(wrong[0], scales=count, count=len(wrong), by=subject.file)


def of_siblings(subject: Subject) -> Iterator[Finding]:
    """Note joined weights whose scales, or second-level scales, are unequal."""
    second = {t.name: t.second.span for t in subject.quantized if t.second is not None}
    yield from _unequal(second, notes.UNEQUAL_FACTORS)
    if block_sizes(subject.checkpoint.store, subject.checkpoint.config).stated:
        return  # grids are joined unchanged, those of a single block too
    single = {
        t.name: t.scale for t in subject.quantized if t.grid.per_tensor and t.scale.numel == 1 and len(t.shape) == 2
    }
    yield from _unequal(single, notes.UNEQUAL_SCALES)


def _unequal(single: dict[str, TensorSpan], note: str) -> Iterator[Finding]:
    units = sibling_units(single)
    values = {span.name: float(value[0]) for span, value in _read(single[name] for unit in units for name in unit)}
    unequal = [unit for unit in units if len({values[single[name].name] for name in unit}) > 1]
    if unequal:
        yield note.format(len(unequal), len(units), ", ".join(shown(name) for name in unequal[0]))


def _read(spans: Iterable[TensorSpan]) -> Iterator[tuple[TensorSpan, npt.NDArray[Any]]]:
    """Yield the values of scales, in their order on disk."""
    for span in sorted(spans, key=lambda span: (span.file.name, span.start)):
        yield span, read_floats(span).reshape(-1)
