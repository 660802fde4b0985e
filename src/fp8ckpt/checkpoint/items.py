"""The items of a save: the regions of tensors that each rank writes, and the rounds in which ranks write them together
(`fp8ckpt.output.staging`). An output directory takes one round.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from fp8ckpt.errors import ModelMismatchError, UnsupportedFormatError
from fp8ckpt.numerics.geometry import Region, runs
from fp8ckpt.output.layout import TensorSpec
from fp8ckpt.output.staging import Files, Stages, Staging
from fp8ckpt.ranks import Ranks
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.reading import stored_dtype
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan, tensor_nbytes

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Shared(NamedTuple):
    """What the coordinator tells each rank: the number of ``ranks``, the ``turn`` of this run, what its writer must
    know (``own``), and the ``stages`` of its rounds; None if the output is a directory, which takes one round.
    """

    ranks: int
    turn: str
    own: Any
    stages: Stages | None


class Rounds(NamedTuple):
    """The rounds in which a rank writes its ``items``, together with the others."""

    items: Sequence[Sequence[WriteItem]]
    ranks: Ranks
    files: Files
    stages: Stages | None

    @classmethod
    def of(cls, items: Iterable[WriteItem], ranks: Ranks, files: Files, stages: Stages | None) -> Rounds:
        """Divide a rank's items into rounds; without stages, into a single one."""
        if stages is None:
            return cls([list(items)], ranks, files, None)
        of_round: list[list[WriteItem]] = [[] for _ in stages.sends]
        for item, number in zip(items, stages.round_of, strict=True):
            of_round[number].append(item)
        return cls(of_round, ranks, files, stages)

    def write(self, step: Callable[[Sequence[WriteItem]], T]) -> Iterator[list[T]]:
        """Run ``step`` on the items of each round and flush; yield the results of all ``ranks``, which meet after each
        round.

        A round ends when the caller asks for the next.
        """
        for number, items in enumerate(self.items):
            yield self.ranks.gather(partial(self._flushed, step, items))
            if self.stages is not None and isinstance(self.files, Staging):
                self.files.send(self.stages.sends[number])
                if self.ranks.rank == 0:
                    logger.info("%d of %d bytes are being sent", self.stages.done[number], self.stages.done[-1])
        if self.stages is not None:
            self.ranks.gather(self.files.flush)

    def _flushed(self, step: Callable[[Sequence[WriteItem]], T], items: Sequence[WriteItem]) -> T:
        done = step(items)
        self.files.flush()
        return done


def region_of(item: WriteItem) -> Region:
    """The region of the full tensor that an item covers."""
    assert item.tensor_data is not None  # no BYTE_IO is left
    return tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)


def resolved(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    """The values of an item, in the shape of its region."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)  # prepare_local_plan() refused all else
    return tensor.detach()


def write_region(files: Files, span: TensorSpan, region: Region, data: Bytes) -> int:
    """Write the bytes of a region, in row-major order, at their offsets in its file; return the number of bytes."""
    itemsize = DTYPE_BITS[span.dtype] // 8
    file = files.of(span.file.name)
    done = 0
    for first, count in runs(span.shape, *region):
        file.write(data[done : done + count * itemsize], span.start + first * itemsize)
        done += count * itemsize
    return done


def tensors_of_plans(plans: Iterable[SavePlan]) -> tuple[dict[str, TensorSpec], dict[str, Counter[int]]]:
    """Return the tensors by name, in the order met, and the bytes that each rank writes of each, in the plans' dtype.
    Raises `ModelMismatchError` unless the plans cover each tensor exactly once.
    """
    found: dict[str, TensorSpec] = {}
    held: dict[str, Counter[int]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None  # no BYTE_IO is left
            name, dtype = item.index.fqn, item.tensor_data.properties.dtype
            if name not in found:
                if (stored := stored_dtype(dtype)) is None:
                    raise UnsupportedFormatError.of_no_place(name, dtype=dtype)
                found[name], held[name] = TensorSpec(name, stored, tuple(item.tensor_data.size)), Counter()
            held[name][rank] += tensor_nbytes(found[name].dtype, tuple(item.tensor_data.chunk.sizes))
    for name, tensor in found.items():
        planned, whole = sum(held[name].values()), tensor_nbytes(tensor.dtype, tensor.shape)
        if planned != whole:
            raise ModelMismatchError.of_plans(name, planned=planned, whole=whole)
    return found, held
