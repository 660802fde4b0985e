"""FP8 in the base's own layout: the base decides everything that a file can decide.

Which tensors are FP8, names, grids, scale dtypes and shapes, the dtypes of what is not quantized, files and their
order, down to the text of every header, configuration and side files. Only values are the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan, source_tensors
from fp8ckpt.families.names import find_layout
from fp8ckpt.families.siblings import equal_units
from fp8ckpt.output.like import BaseLayout
from fp8ckpt.output.matching import refuse_base, refuse_other_dtypes, refuse_other_tensors
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan, refuse_shared
from fp8ckpt.output.side_files import side_files
from fp8ckpt.stores.store import same_bytes
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, Json, states_powers_of_two
from fp8ckpt.tensors.reading import stored_scales


def plan_like(
    source: CheckpointLike,
    base: CheckpointLike,
    output: PartialOutput,
    *,
    fresh: bool,
    report: bool,
    served: Callable[[Checkpoint], Json] | None = None,
    follow_index: bool = False,
) -> QuantizingPlan:
    """Everything that can be known or refused before the first byte is written.

    ``served``: makes the configuration with which engines serve a base, whose layout is put right, too.
    """
    output.refuse_existing()
    given, like = (open_checkpoint(path, follow_index=follow_index) for path in (source, base))
    refuse_shared(output, given, "source")
    refuse_shared(output, like, "base")
    refuse_base(like, "give the FP8 checkpoint that the source came from, or choose a --scheme")
    naming = find_layout(given.tensors, like.tensors)
    tensors = source_tensors(given, {name: naming.native_to_hf(name) for name in given.tensors})
    refuse_other_tensors(tensors, like, "source", f"give the base that {given.path} came from")
    refuse_other_dtypes(tensors, like)
    changes = BaseLayout(like, served=None if served is None else served(like))
    spans = {span.name: span for layout in changes.layouts for span in layout.spans}
    weights = {  # by the names that codes are stored under
        tensor.weight.name: Quantization(
            tensors[tensor.name], spans[tensor.weight.name], spans[tensor.scale.name], tensor.grid, tensor
        )
        for tensor in like.quantized
    }
    scales = {tensor.scale.name for tensor in like.quantized}
    stored = {span.name: span for header in like.files for span in header.spans}
    plain = {name: tensors.get(name, stored[name]) for name in spans if name not in weights and name not in scales}
    powers_of_two = states_powers_of_two(like.config)
    arguments = {"job": "quantize", "fresh": fresh, "report": report, "powers_of_two": powers_of_two}
    return QuantizingPlan(
        output=OutputPlan((given, like), arguments, changes.layouts, changes.texts, changes.copies),
        source=given,
        base=like,
        weights=weights,
        plain=plain,
        units=tuple(_units([weight for weight in weights.values() if weight.wide and weight.scale.nbytes])),
        fresh=fresh,
        report=report,
        powers_of_two=powers_of_two,
        notes=(*given.notes, *like.notes, *_side_file_notes(given, like)),
    )


def _units(wide: Sequence[Quantization]) -> Iterator[tuple[str, ...]]:
    """Wide weights, those of one scale with the siblings that share it. Grids are joined by engines as they are: each
    is alone.
    """
    alone = {weight.before.name: weight.name for weight in wide if weight.before and weight.grid.per_tensor}
    units = equal_units(stored_scales(weight.before for weight in wide if weight.before and weight.grid.per_tensor))
    yield from (tuple(alone[name] for name in unit) for unit in units)
    yield from ((weight.name,) for weight in wide if not weight.grid.per_tensor)


def _side_file_notes(source: Checkpoint, base: Checkpoint) -> list[str]:
    """Side files of the source that the output will not have, since the base's go out."""
    ours, theirs = side_files(source), side_files(base)
    notes = []
    for name in sorted(ours.keys() - {CONFIG, MISTRAL_CONFIG}):
        if name not in theirs:
            notes.append(f"{name} is only in the source, and is not written")
        elif not same_bytes(ours[name], theirs[name]):
            notes.append(f"{name} differs in the source; the base's is written")
    return notes
