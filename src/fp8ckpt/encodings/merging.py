"""A base with adapters merged: planned like a conversion whose source is the base itself.

To FP8, the layout is the base's own, and tensors that no adapter changes keep their codes and scales, byte for byte. To
BF16, the layout is that of a conversion of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from fp8ckpt.encodings.adapting import adapted
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan, beside_weights, joint_units
from fp8ckpt.encodings.tying import is_one, tied_notes
from fp8ckpt.families.parallel import sibling_units
from fp8ckpt.families.tied import tied_tensors
from fp8ckpt.output.layout import TensorSpec
from fp8ckpt.output.like import BaseLayout, PlainLayout
from fp8ckpt.output.matching import refuse_base, refuse_other_dtypes
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan, refuse_shared
from fp8ckpt.output.side_files import notes_on_plain, side_files
from fp8ckpt.stores.store import same_bytes
from fp8ckpt.targets import FP8, TARGETS
from fp8ckpt.tensors.adapters import Adapter, refuse_nonfinite
from fp8ckpt.tensors.checkpoint import Checkpoint, raise_first
from fp8ckpt.tensors.config import Json, states_powers_of_two
from fp8ckpt.tensors.merged import MergedTensor
from fp8ckpt.tensors.reading import read_floats, scale_defects
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Tensor


def plan_merging(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    output: PartialOutput,
    to: str,
    *,
    fresh: bool,
    served: Callable[[Checkpoint], Json] | None = None,
) -> QuantizingPlan:
    """Plan the output, and refuse what can be refused, before the first byte is written.

    ``served`` makes the configuration with which engines serve the base; the layout is then corrected as well.
    """
    output.goal.refuse_existing()
    refuse_shared(output, base, "base")
    for adapter in adapters:
        refuse_shared(output, adapter.checkpoint, "adapter")
    asked = {name for adapter in adapters for name in (*adapter.tensors, *(pair.module for pair in adapter.pairs))}
    sets = tied_tensors(base.config, base.shapes, asked)
    tied = [one for one in sets if is_one(one, base)]
    changed = adapted(base, adapters, tied)
    if to == FP8:
        refuse_base(base, "merge --to bf16, and quantize that: convert --to fp8 --scheme SCHEME")
        specs = {name: TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in changed.items()}
        refuse_other_dtypes(specs, base)
    raise_first(scale_defects(base.quantized, base.cache_scales))
    for adapter in adapters:
        refuse_nonfinite(adapter)
    inputs = (base, *(adapter.checkpoint for adapter in adapters))
    arguments = {"job": "merge", "to": to, "fresh": fresh, "adapters": [adapter.fingerprint for adapter in adapters]}
    output_of = partial(OutputPlan, inputs, arguments)
    plan = _in_codes(base, changed, output_of, fresh, served) if to == FP8 else _plain(base, changed, output_of, to)
    return replace(
        plan, notes=(*plan.notes, *tied_notes(base, adapters, sets, tied, changed), *_side_file_notes(base, adapters))
    )


def _plain(
    base: Checkpoint, changed: Mapping[str, MergedTensor], output_of: Callable[..., OutputPlan], to: str
) -> QuantizingPlan:
    """Plan an output that is not quantized, in the layout of a conversion of the base."""
    layouts, texts, copies = PlainLayout.of(base, TARGETS[to])
    tensors: dict[str, Tensor] = {**base.tensors, **changed}
    plain = {span.name: tensors[span.name] for layout in layouts for span in layout.spans}
    planned, merged = output_of(layouts, texts, copies), {name: tensor.passes for name, tensor in changed.items()}
    notes = notes_on_plain(base)
    return QuantizingPlan(planned, base, None, {}, plain, (), False, report=True, merged=merged, notes=notes)


def _in_codes(
    base: Checkpoint,
    changed: Mapping[str, MergedTensor],
    output_of: Callable[..., OutputPlan],
    fresh: bool,
    served: Callable[[Checkpoint], Json] | None,
) -> QuantizingPlan:
    """Plan an output in the base's own layout."""
    changes = BaseLayout(base, served=None if served is None else served(base))
    spans = {span.name: span for layout in changes.layouts for span in layout.spans}
    weights, units = _weights(base, changed, spans)
    return QuantizingPlan(
        output=output_of(changes.layouts, changes.texts, changes.copies),
        source=base,
        base=base,
        weights=weights,
        plain=beside_weights(base, changed, spans, weights),
        units=units,
        fresh=fresh,
        report=True,
        powers_of_two=states_powers_of_two(base.config),
        merged={base.tensors[name].span.name: tensor.passes for name, tensor in changed.items()},
        notes=base.notes,
    )


def _weights(
    base: Checkpoint, changed: Mapping[str, MergedTensor], spans: Mapping[str, TensorSpan]
) -> tuple[dict[str, Quantization], tuple[tuple[str, ...], ...]]:
    """Return the weights that are quantized again, by the names of their codes, and the units of the wide ones.

    These are the weights that adapters change, and the siblings that must share a scale with them.
    """

    def quantization(tensor: QuantizedTensor) -> Quantization:
        merged = changed.get(tensor.name) or MergedTensor(tensor, tensor.dtype, (), read_floats)
        source = replace(merged.turned() if tensor.across else merged, dtype="F32")
        return Quantization.like(tensor, source, spans)._replace(merged=source)

    siblings = sibling_units(tensor.name for tensor in base.quantized)
    near = changed.keys() | {name for unit in siblings if not changed.keys().isdisjoint(unit) for name in unit}
    weights = {tensor.weight.name: quantization(tensor) for tensor in base.quantized if tensor.name in near}
    touched = {name for name, weight in weights.items() if weight.source.name in changed}
    units = tuple(unit for unit in joint_units(weights.values()) if not touched.isdisjoint(unit))
    together = touched.union(*units)
    return {name: weight for name, weight in weights.items() if name in together}, units


def _side_file_notes(base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield notes on files beside an adapter (a tokenizer's) that differ from those of the output."""
    theirs = side_files(base)
    for adapter in adapters:
        for name, file in side_files(adapter.checkpoint).items():
            if name in theirs and name != "README.md" and not same_bytes(file, theirs[name]):
                yield f"{name} differs beside the adapter; the base's is written"
