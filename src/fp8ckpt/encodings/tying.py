"""Adapters of tied weights: PEFT saves every trained name, and a base has one tensor for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from fp8ckpt.errors import UnsupportedFormatError, listed
from fp8ckpt.families.names import answers
from fp8ckpt.families.tied import Tied
from fp8ckpt.tensors.adapters import Adapter, same_product, same_values
from fp8ckpt.tensors.checkpoint import Checkpoint


def is_one(tied: Tied, base: Checkpoint) -> bool:
    """Whether a base stores the tied tensor, and all its copies are equal."""
    spans = [base.tensors[name].span for name in tied.stored]
    return bool(spans) and all(same_values(spans[0], span) for span in spans[1:])


def as_one(adapter: Adapter, base: Checkpoint, tied: Tied) -> Adapter:
    """Return the adapter with the one tensor that the base has for all names of a tied tensor.

    Raises `UnsupportedFormatError` if only some of the names were trained. With whole tensors, PEFT gives the model one
    for each name; with factors, the shared tensor would change under the other names as well.
    """
    pairs = {f"{pair.module}.weight": pair for pair in adapter.pairs}
    names = _names(pairs.keys() | adapter.tensors.keys(), base, tied)
    stored = tied.stored[0]
    kept = next((key for key, name in names.items() if name == stored), "")
    whole = {key: adapter.tensors[key] for key in names if key in adapter.tensors}
    trained = {key: span for key, span in whole.items() if not same_values(span, base.tensors[stored].span)}
    if trained:
        key, first = next(iter(trained.items()))
        others = [name for name in list(tied.names)[: tied.size] if name != key]
        apart = bool(trained.keys() - pairs.keys()) and len(trained) < tied.size
        if apart or not all(same_values(first, span) for span in trained.values()):
            raise UnsupportedFormatError.of_untied(first, others=others)
    for key in (names.keys() & pairs.keys()) - {kept}:
        if kept not in pairs or not same_product(pairs[key], pairs[kept]):
            raise UnsupportedFormatError.of_tied_factors(pairs[key].a, key=key, stored=stored)
    dropped = names.keys() - {kept}
    return replace(
        adapter,
        pairs=tuple(pair for pair in adapter.pairs if f"{pair.module}.weight" not in dropped),
        tensors={key: span for key, span in adapter.tensors.items() if key not in dropped},
    )


def _names(keys: Collection[str], base: Checkpoint, tied: Tied) -> dict[str, str]:
    """Return the keys of an adapter that name the tied tensor, each with its name in the base."""
    disk = {key: made.pieces[0].source for key, made in answers(keys, base.shapes).items()}
    found = {key: tied.names.get(key, tied.names.get(disk.get(key, ""))) for key in sorted(keys)}
    return {key: name for key, name in found.items() if name is not None}


def tied_notes(
    base: Checkpoint,
    adapters: Collection[Adapter],
    sets: Collection[Tied],
    one: Collection[Tied],
    changed: Collection[str],
) -> Iterator[str]:
    """Yield notes on tensors that change with a merged one they are tied to (``one``), and on tensors stored apart from
    it, which do not.
    """
    factored = [{f"{pair.module}.weight" for pair in adapter.pairs} for adapter in adapters]
    for tied in sets:
        once = any(len(_names(keys, base, tied)) > 1 for keys in factored)
        added = ", by factors that are added once (PEFT's merge_and_unload adds those of each name)" if once else ""
        name = next((name for name in tied.stored if name in changed), None)
        others = [] if name is None else tied.others(name)
        if others and tied in one:
            yield f"{name} is {listed(others)} as well, so both change{added}"
        elif others and not any(other in changed for other in others):
            yield f"{listed(others)} is stored beside {name}, which it should be tied to: only {name} was merged"
