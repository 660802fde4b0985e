"""The plan of a load: which tensors of a checkpoint fill those of a model, checked before the first byte is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fp8ckpt.checkpoint.assembling import assemble, of_names
from fp8ckpt.checkpoint.live import (
    laid_out_like,
    local_part,
    refuse_shared_memory,
    refuse_what_hides,
    restore_buffers,
    tensors_of,
    tie,
    tied_groups,
)
from fp8ckpt.checkpoint.planners import Part, parts_of
from fp8ckpt.checkpoint.regions import rounds
from fp8ckpt.collector import collector_paused
from fp8ckpt.errors import ModelMismatchError, listed, shown
from fp8ckpt.families.kinds import mtp_tensors
from fp8ckpt.ranks import BEYOND
from fp8ckpt.tensors.checkpoint import CheckpointLike, open_checkpoint
from fp8ckpt.tensors.reading import torch_dtype

logger = logging.getLogger(__name__)


class LoadPlan:
    """The tensors of a model, and those of a checkpoint that each is made of.

    ``named``: the tensors to fill, by the model's own names, or by those on disk if an adapter translates them;
    ``parts``: what this rank reads; ``twice``: the tied tensors that are on disk twice, each with the one that is
    loaded.
    """

    @collector_paused()
    def __init__(self, model: nn.Module, path: CheckpointLike, partial: bool, narrow: bool, follow_index: bool) -> None:
        self.model = model
        self.checkpoint = open_checkpoint(path, follow_index=follow_index)
        refuse_what_hides(model, "load the model before adapters are added")
        tie(model)
        remedy = "materialize it first: model.to_empty(device=...), and set again the buffers that no checkpoint holds"
        self._native = tensors_of(model, remedy)
        self._refuse_copies()
        self._refuse_memory()
        stored = self.checkpoint.shapes
        self.named = self._native
        self._tied = tied_groups(model)
        if (assembled := assemble(model, self._with_absent(), stored)) is None:
            self.named = dict(model.state_dict_adapter.to_hf(dict(self._native)))  # type: ignore[union-attr, operator]  # a host's
            assembled = of_names(self.named, stored)
        self._assemblies = assembled.parts
        for group in self._tied:
            made = [assembled.parts[name] for name in group if name in assembled.parts]
            held = [name for name in group if name in self._native]
            if made and held and not assembled.parts.keys() & {*held}:
                self._assemblies[held[0]] = made[0]
        self._sources, self.twice = self._find_sources()
        unused = assembled.unused
        self._carried = {*assembled.ignored, *mtp_tensors(unused, self.checkpoint.config)}
        self._refuse_mismatches([name for name in unused if name not in self._carried] if not partial else [])
        self._refuse_dtypes(narrow)
        self.parts = [
            part
            for name, tensor in self.named.items()
            if self._sources[name] == name and not self._shares(name)
            for part in parts_of(tensor, self._assemblies[name])
        ]

    def second(self) -> tuple[dict[str, torch.Tensor], list[Part]]:
        """Return new tensors for the second copies on disk, sharded like those loaded, and the parts that fill them."""
        tensors = {name: torch.empty_like(self.named[first]) for name, first in self.twice.items()}
        return tensors, [part for name, tensor in tensors.items() for part in parts_of(tensor, self._assemblies[name])]

    def _with_absent(self) -> dict[str, torch.Tensor]:
        """The model's tensors, also by the names in other pipeline stages that they are tied to."""
        groups = [(group, [name for name in group if name in self._native]) for group in self._tied]
        absent = {name: self._native[held[0]] for group, held in groups if held for name in group}
        return {**absent, **self._native}

    def _find_sources(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return for each tensor the one whose assembly fills it, if any: itself, or one that it is tied to; and the
        tensors that are on disk twice.
        """
        of_tensor = {id(tensor): name for name, tensor in self.named.items()}
        sources = {name: name for name in self.named if name in self._assemblies}
        twice: dict[str, str] = {}
        for group in self._tied:
            held = [self._native[name] for name in group if name in self._native]
            names = [of_tensor[id(tensor)] for tensor in held if id(tensor) in of_tensor]
            present = [name for name in names if name in self._assemblies]
            if present:
                sources.update((name, present[0]) for name in names if name not in self._assemblies)
                twice.update((name, present[0]) for name in present[1:])
        at: dict[tuple[int, ...], str] = {}  # two tensors may share memory without being one parameter
        for name in (name for name in sources if sources[name] == name and name not in twice):
            local = local_part(self.named[name])
            place = (local.data_ptr(), *local.shape, *local.stride())
            if local.numel() and (first := at.setdefault(place, name)) != name:
                twice[name] = first
        return sources, twice

    def _refuse_mismatches(self, unused: list[str]) -> None:
        where = self.checkpoint.path
        if missing := [name for name in self.named if name not in self._sources]:
            raise ModelMismatchError.of_absent(file=where, names=missing)
        if unused:
            raise ModelMismatchError.of_unused(file=where, names=unused)
        for name, tensor in self.named.items():
            found, expected = tuple(tensor.shape), self._assemblies[self._sources[name]].shape
            if found != tuple(expected):
                raise ModelMismatchError.of_model_shape(name, file=where, shape=found, stored=expected)

    def _refuse_copies(self) -> None:
        """Refuse a state dict that consists of copies: what is loaded into them would not reach the model."""
        held = {0, *map(_storage, (*self.model.parameters(), *self.model.buffers()))}
        if copies := [name for name, tensor in self._native.items() if _storage(tensor) not in held]:
            raise ModelMismatchError.of_copies(names=copies)

    def _refuse_memory(self) -> None:
        """Refuse tensors that cannot be written, or whose elements share memory with each other."""
        for name, tensor in self._native.items():
            local = local_part(tensor)
            if local.is_inference() and not torch.is_inference_mode_enabled():
                raise ModelMismatchError.of_inference(name)
            refuse_shared_memory(name, local)

    def _refuse_dtypes(self, narrow: bool) -> None:
        """Refuse FP8 parameters, which would get codes without scales, and casts that would round plain values."""
        for name, tensor in self.named.items():
            for source in {piece.source for piece in self._assemblies[self._sources[name]].pieces}:
                stored = self.checkpoint.tensors[source]
                if stored.scaled is not None and tensor.dtype.itemsize == 1:
                    raise ModelMismatchError.of_codes(name, dtype=tensor.dtype)
                if stored.scaled is None and not narrow and rounds(torch_dtype(stored.dtype), tensor.dtype):
                    raise ModelMismatchError.of_rounding(stored, (stored.dtype, tensor.dtype))

    def log(self) -> None:
        """Log what this rank holds, what it reads, the memory beyond the model, and what is left out."""
        held = sum(local_part(tensor).nbytes for tensor in self.named.values())
        read = 0
        for part in self.parts:
            source = self.checkpoint.tensors[part.source]
            span = source.span
            read += span.nbytes * part.values.numel() // max(1, span.numel)
        logger.info(
            "loading %s: this rank holds %d bytes, reads %d bytes of the source, "
            "and takes at most %d MiB beyond the model",
            self.checkpoint.path,
            held,
            read,
            BEYOND >> 20,
        )
        if self._carried:
            logger.info(
                "%d tensors that the model does not have are left out: %s",
                len(self._carried),
                listed(self._carried),
            )

    def _shares(self, name: str) -> bool:
        """Whether the tensor is on disk twice and shares memory with the one loaded: not all parallelized ones do."""
        first = self.twice.get(name)
        return first is not None and local_part(self.named[name]).data_ptr() == local_part(self.named[first]).data_ptr()

    def compare(self, second: Mapping[str, torch.Tensor]) -> None:
        """Raise `ModelMismatchError` if tied tensors that are on disk twice differ there."""
        for name, tensor in second.items():
            loaded = local_part(self.named[self.twice[name]]), local_part(tensor)
            if not torch.equal(*(part.contiguous().view(torch.uint8) for part in loaded)):
                found = f"the model ties it to {shown(self.twice[name])}, but they differ on disk"
                raise ModelMismatchError.of_two(name, file=self.checkpoint.path, found=found)

    def finish(self) -> None:
        """Fill tied tensors and those that an adapter made anew; restore the buffers that no checkpoint holds."""
        with torch.no_grad():
            for name, source in self._sources.items():
                if self.named[name] is not self.named[source]:
                    self.named[name].copy_(laid_out_like(self.named[source], self.named[name]))
            if self.named is not self._native:
                adapter: Any = self.model.state_dict_adapter
                for name, tensor in adapter.from_hf(dict(self.named)).items():
                    if name in self._native and tensor is not self._native[name]:
                        self._native[name].copy_(tensor)
        tie(self.model)
        restore_buffers(self.model)


def _storage(tensor: torch.Tensor) -> int:
    """The address of a tensor's values; 0 if it has none."""
    local = local_part(tensor)
    return local.untyped_storage().data_ptr() if local.numel() else 0
