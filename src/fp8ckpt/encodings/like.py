"""FP8 in the base's own layout: the base decides everything that a file can decide.

It decides which tensors are FP8, names, grids, scale dtypes and shapes, the dtypes of unquantized tensors, files and
their order, down to the text of every header, configuration and side file. The source decides only the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fp8ckpt.encodings.asked import Asked
from fp8ckpt.encodings.recipes import Quantization, QuantizingPlan, beside_weights, joint_units, source_tensors
from fp8ckpt.errors import ModelMismatchError, listed
from fp8ckpt.families.between import has_transformers, translated
from fp8ckpt.families.kinds import carriable
from fp8ckpt.families.names import LAYOUTS, find_layout, name_pattern
from fp8ckpt.families.tied import Tied, embeddings_and_head, tied_tensors, ties_embeddings
from fp8ckpt.output.like import BaseLayout
from fp8ckpt.output.matching import in_fewer_bits, refuse_base, refuse_other_dtypes, refuse_other_tensors
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan, refuse_shared
from fp8ckpt.output.side_files import side_files
from fp8ckpt.stores.store import same_bytes
from fp8ckpt.tensors.assembly import Assembly
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, Json, states_powers_of_two
from fp8ckpt.tensors.joined import JoinedTensor
from fp8ckpt.tensors.reading import same_bits
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.tensor import Tensor


def plan_like(asked: Asked, output: PartialOutput, served: Callable[[Checkpoint], Json]) -> QuantizingPlan:
    """Plan the output, and refuse what can be refused, before the first byte is written.

    ``served`` makes the configuration with which engines serve the base; if serving was asked for, the layout is
    corrected as well.
    """
    assert asked.like is not None  # the caller checked it
    given, like = asked.opened_source(output), asked.opened(asked.like)
    refuse_shared(output, like, "base")
    refuse_base(like, "give the FP8 checkpoint that the source came from, or choose a --scheme")
    tensors, carried, notes = _matched(given, like, asked.carry)
    changes = BaseLayout(like, served=served(like) if asked.serving else None)
    spans = {span.name: span for layout in changes.layouts for span in layout.spans}
    weights = {  # by the names that codes are stored under
        tensor.weight.name: Quantization.like(tensor, _in_order(tensors[tensor.name], tensor), spans)
        for tensor in like.quantized
        if tensor.name not in carried
    }
    powers_of_two = states_powers_of_two(like.config)
    fresh, report = asked.scales == "fresh", asked.report
    arguments = asked.arguments(job="quantize", fresh=fresh, report=report, powers_of_two=powers_of_two)
    return QuantizingPlan(
        output=OutputPlan((given, like), arguments, changes.layouts, changes.texts, changes.copies),
        source=given,
        base=like,
        weights=weights,
        plain=beside_weights(like, tensors, spans, weights),
        units=tuple(joint_units(weights.values())),
        fresh=fresh,
        report=report,
        see=asked.see,
        powers_of_two=powers_of_two,
        carried=tuple(sorted(carried)),
        notes=(*given.notes, *like.notes, *notes, *_side_file_notes(given, like)),
    )


def _matched(
    given: Checkpoint, like: Checkpoint, carry: str | None
) -> tuple[dict[str, Tensor], set[str], tuple[str, ...]]:
    """Return the source's tensors as the base has them, the names of those to take from the base, and notes. Raise
    `ModelMismatchError` for tensors that differ in other ways.
    """
    tensors, notes = _as_in(like, given)
    allowed = carriable(tensors, like.tensors, like.config, name_pattern("carry", carry))
    remedy = f"give the base that {given.path} came from"
    if not (tensors.keys() <= like.tensors.keys() or has_transformers()):
        remedy += ", or install transformers, whose tables say how models stack experts: pip install 'fp8ckpt[hf]'"
    carried = refuse_other_tensors(tensors, like, "source", remedy, allowed)
    if carried:
        notes += (f"{len(carried)} tensors that the source lacks are carried from the base: {listed(carried)}",)
    refuse_other_dtypes(tensors, like)
    if fewer := in_fewer_bits(tensors, like):
        notes += (f"{len(fewer)} tensors have fewer bits in the source than in the base: {listed(fewer)}",)
    if not like.quantized:
        count = len(like.cache_scales)
        notes = (f"the base has no FP8 weights: its {count} scales of the key-value cache are written back", *notes)
    return tensors, carried, notes


def _as_in(base: Checkpoint, given: Checkpoint) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the source's tensors under the base's names and stackings, as far as it has them, and notes."""
    naming = find_layout(given.tensors, base.tensors)
    tensors = source_tensors(given, {name: naming.native_to_hf(name) for name in given.tensors})
    tied = tied_tensors(base.config, base.shapes, tensors.keys() ^ base.tensors.keys())
    if not tied and ties_embeddings(base.config) is None:  # then equal bytes decide
        tied = [embeddings_and_head(base.shapes)]
    tensors, notes = _tied_as_in(tensors, base, tied)
    if tensors.keys() <= base.tensors.keys() or base.tensors.keys() <= tensors.keys():
        return tensors, notes
    if (found := translated(given, base)) is None:
        return tensors, notes
    tensors, notes = _tied_as_in(found.tensors, base, tied)
    return tensors, (f"{found.made} tensors are stacked, cut or named differently in the source", *notes)


def _in_order(given: Tensor, base: QuantizedTensor) -> Tensor:
    """Return a tensor of the source with its dimensions in the order of the base's codes."""
    if not base.across:
        return given
    name, rank = given.name, len(given.shape)
    return JoinedTensor(name, Assembly.whole(name, given.shape).transpose(rank - 2, rank - 1), {name: given})


def _tied_as_in(
    tensors: dict[str, Tensor], base: Checkpoint, tied: Sequence[Tied]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the source's tensors with tied weights stored as in the base, under each name or under one; and notes.

    A base that stores both shows by equal bytes that the two are one. Raises `ModelMismatchError` if the base has no
    place for a head that is no longer the embeddings.
    """
    tensors, notes = dict(tensors), []
    for one in tied:
        kept = next((name for name in one.stored if name in tensors), None)
        if kept is None:
            continue
        for name in one.stored:
            if name not in tensors and same_bits(base.tensors[name], base.tensors[kept]):
                tensors[name] = tensors[kept]
                notes.append(f"{name}, which the source does not store, is tied to {kept}, as in the base")
        for name in tensors.keys() - base.tensors.keys():
            if not any(layout.hf_to_native(name) in one.names for layout in LAYOUTS):
                continue
            if not same_bits(tensors[name], tensors[kept]):
                if len(one.stored) > 1:  # the name belongs to another model
                    continue
                raise ModelMismatchError.of_head(name, file=tensors[name].span.file, kept=kept)
            del tensors[name]
            notes.append(f"{name} of the source is tied to {kept} and is not stored, as in the base")
    return tensors, tuple(notes)


def _side_file_notes(source: Checkpoint, base: Checkpoint) -> list[str]:
    """Return notes on the source's side files that differ from the output's, which are the base's."""
    ours, theirs = side_files(source), side_files(base)
    notes = []
    for name in sorted(ours.keys() - {CONFIG, MISTRAL_CONFIG}):
        if name not in theirs:
            notes.append(f"{name} is only in the source, and is not written")
        elif not same_bytes(ours[name], theirs[name]):
            notes.append(f"{name} differs in the source; the base's is written")
    return notes
