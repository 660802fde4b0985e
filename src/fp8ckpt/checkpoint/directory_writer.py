"""What the storage writers share: torch's distributed checkpoint writes one directory of final files, in one pass.

The coordinator lays out every file from the global plan, before any byte is written. Every rank then writes its own
regions at their offsets. The coordinator adds the headers, flushes, and renames. Each byte is written once: nothing is
saved in shards and consolidated later. `fp8ckpt.output.partial` has the rules of partial outputs. A subclass decides
what the files are (`_planned`), what each rank must know (`_shared_out`), and how bytes are made (`_write`).

Its life cycle, as DCP calls it:

1. ``reset(path)``                      a new save begins
2. ``set_up_storage_writer(...)``       on every rank
3. ``prepare_local_plan(plan)``         what this rank states of the output
4. ``prepare_global_plan(plans)``       coordinator: check that all were asked for the same, and that the plans cover
                                        each tensor once; lay out, create the files
5. ``write_data(plan, planner)``        this rank's regions, flushed to disk
6. ``finish(metadata, results)``        coordinator: the headers; then the name
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fp8ckpt.checkpoint.items import Rounds, Shared, tensors_of_plans
from fp8ckpt.encodings.results import ConvertResult
from fp8ckpt.errors import (
    RangeError,
    RanksDifferError,
    SourceChangedError,
    UnsupportedFormatError,
    WeightValueError,
    listed,
)
from fp8ckpt.families.kinds import carriable
from fp8ckpt.output.files import OutputFiles
from fp8ckpt.output.layout import FileLayout, TensorSpec
from fp8ckpt.output.matching import refuse_other_tensors
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan, contents_of, refuse_shared, refuse_unlike, said_of
from fp8ckpt.output.staging import Files, Part, Schedule, Stages, Staging, schedule
from fp8ckpt.ranks import GroupRanks, Ranks, has_group
from fp8ckpt.stores.address import address_of
from fp8ckpt.stores.local import kept_open
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint

logger = logging.getLogger(__name__)


class DirectoryWriter(StorageWriter):
    """A storage writer of the new directory ``path``, in the layout of ``like`` if given; tensors ``carry`` are taken
    from ``like`` if the state dict lacks them. ``process_group``: that of the save, if its ranks must meet while they
    write. ``bytes_written`` counts this rank's tensor bytes.
    """

    def __init__(
        self, path: str | Path, like: CheckpointLike | None, carry: Collection[str], process_group: ProcessGroup | None
    ) -> None:
        self._output = PartialOutput(path)
        self._like = like
        self._carry = carry
        self._group = process_group
        self._plan: OutputPlan | None = None  # the coordinator's
        self._schedule: Schedule | None = None
        self._tensors = 0
        self._carried: Collection[str] = ()  # from the base
        self._notes: list[str] = []
        self.bytes_written = 0

    def __getstate__(self) -> dict[str, Any]:
        # For the process of an asynchronous save: its default group has the ranks of the group that the save was given.
        return {**self.__dict__, "_group": None}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether nothing exists there yet; a destination in a store is checked when the save begins."""
        return address_of(checkpoint_id) is not None or not os.path.lexists(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, at another path if one is named. What a failed save held is released."""
        self.release()
        if checkpoint_id is not None:
            self._output = PartialOutput(checkpoint_id)
        self._notes = []
        self.bytes_written = 0

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse an existing destination before any planning."""
        self._output.goal.refuse_existing()
        if (base := self._base_of_output()) is not None:
            refuse_shared(self._output, base, "base")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan with what this rank states of the output; only tensors can be stored."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise UnsupportedFormatError.of_object(item.index.fqn)
        return dataclasses.replace(plan, storage_data=self._said())

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lay out the files, create them empty, and tell every rank what it must know."""
        self._refuse_unlike([plan.storage_data for plan in plans])
        tensors, held = tensors_of_plans(plans)
        self._plan, makers = self._planned(tensors)
        self._tensors = len(tensors)
        stages: list[Stages | None] = [None] * len(plans)
        if self._output.goal.in_parts:
            layouts = self._plan.layouts
            self._schedule = found = schedule(layouts, makers, held, len(plans))
            self._plan = dataclasses.replace(self._plan, holes=max(0, self._plan.nbytes - found.most))
            names = [[item.index.fqn for item in plan.items] for plan in plans]
            stages = [found.stages(layouts, rank, len(plans), of_rank) for rank, of_rank in enumerate(names)]
        with self._releasing():
            self._plan.begin(self._output)
            self._output.state.forget()
            shared = [*self._shared_out(plans, self._plan)]
        return [
            dataclasses.replace(plan, storage_data=Shared(len(plans), self._output.turn, own, of_rank))
            for plan, own, of_rank in zip(plans, shared, stages, strict=True)
        ]

    @kept_open()
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's regions, with as many threads as it has cores, and flush them to disk."""
        shared: Shared = plan.storage_data
        with self._output.taking_part(shared.turn):
            self._write_regions(plan, planner, shared)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # every offset was known before
        return done

    def _write_regions(self, plan: SavePlan, planner: SavePlanner, shared: Shared) -> None:
        meets = self._meets and shared.ranks > 1
        ranks = GroupRanks(self._group) if meets else Ranks()
        with self._releasing(), closing(self._files(shared.stages, ranks.rank)) as files:
            self.bytes_written += self._write(shared.own, planner, Rounds.of(plan.items, ranks, files, shared.stages))
            if (base := self._base_of_output()) is not None:
                base.store.refuse_changes()

    @kept_open()
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the headers, and publish the directory."""
        assert self._plan is not None  # prepare_global_plan() was called
        stages: Stages | None = None
        ending: Mapping[str, Sequence[Part]] = {}
        if self._schedule is not None:
            stages, ending = self._schedule.stages(self._plan.layouts, 0, 1, ()), self._schedule.ending
        with self._releasing():
            for layout in self._plan.layouts:
                with closing(self._files(stages, len(results))) as files:
                    files.of(layout.name).write(np.frombuffer(layout.head, np.uint8), 0)
                    self.bytes_written += self._complete(layout, files)
                    files.flush()
                    if isinstance(files, Staging):
                        files.send(ending[layout.name])
                        files.flush()
            self._plan.publish(self._output)
        self.release()

    def _files(self, stages: Stages | None, writer: int) -> Files:
        return OutputFiles(self._output.directory) if stages is None else Staging(self._output, stages, writer)

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """Around a step that may fail: remove an output that can never become complete; release any other."""
        try:
            yield
        except (WeightValueError, RangeError, SourceChangedError):
            self._output.discard()
            raise
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the destination's lock after a save that failed; what it wrote stays in ``.partial``."""
        self._output.release()

    def result(self, to: str, seconds: float) -> ConvertResult | None:
        """What all ranks did, once the save is done; None on every rank but the coordinator."""
        if self._plan is None:
            return None
        carried = f"{len(self._carried)} tensors of the base are carried from it: {listed(self._carried)}"
        return ConvertResult(
            destination=self._output.destination,
            to=to,
            files=len(self._plan.names),
            tensors=self._tensors,
            bytes_read=0,
            bytes_written=self._plan.nbytes,
            bytes_resumed=0,
            notes=(*([carried] if self._carried else []), *self._notes),
            seconds=seconds,
        )

    def reported(self, done: ConvertResult) -> ConvertResult:
        """Return the coordinator's result with what a rank can add to it; the same on every rank."""
        return done

    def _said(self) -> dict[str, Any]:
        """What this rank states of the output, and the others must state as well."""
        base = self._base_of_output()
        read = contents_of(base) if base is not None and has_group() else None
        own = {"the writer": type(self).__name__, "what is read": read, "carry": sorted(self._carry)}
        said = {**said_of(self._output), **own}
        if self._meets and has_group():
            said["the process_group"] = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        return said

    def _refuse_unlike(self, said: list[dict[str, Any]]) -> None:
        """Coordinator: raise if the ranks want different outputs, or are not those of the group in which they meet."""
        refuse_unlike(said)
        group = said[0].get("the process_group", [])
        if self._meets and len(said) > 1 and len(group) != len(said):
            raise RanksDifferError.of_group(count=len(group), saving=len(said), writer=type(self).__name__)

    def _base_of_output(self) -> Checkpoint | None:
        """The checkpoint whose layout is written, if any, opened at first use."""
        if self._like is not None:
            self._like = open_checkpoint(self._like)
        return self._like

    def _carried_from(self, base: Checkpoint, tensors: Mapping[str, TensorSpec], remedy: str) -> None:
        """Note the tensors that the model lacks and that are taken from the base: those of ``carry``, and of MTP
        layers. The log lists them. Raises `ModelMismatchError` if the two differ in anything else.
        """
        allowed = {*self._carry, *carriable(tensors, base.tensors, base.config)}
        self._carried = refuse_other_tensors(tensors, base, "model", remedy, allowed)
        if self._carried:
            logger.info("%d tensors are carried from %s: %s", len(self._carried), base.path, listed(self._carried))

    @property
    def _meets(self) -> bool:
        """Whether ranks must meet while they write: an output to a store is sent in rounds."""
        return self._output.goal.in_parts

    # ---------------------------------------------------------------- what a writer decides

    @abstractmethod
    def _planned(self, tensors: dict[str, TensorSpec]) -> tuple[OutputPlan, Mapping[str, str]]:
        """Return the files of the output, and for each stored tensor the model's tensor that it is made from, except
        for those that `_complete` writes; or refuse. ``tensors``: the model's, by name.
        """

    @abstractmethod
    def _shared_out(self, plans: list[SavePlan], output: OutputPlan) -> Iterable[Any]:
        """Yield what each rank must know."""

    @abstractmethod
    def _write(self, own: Any, planner: SavePlanner, rounds: Rounds) -> int:
        """Write this rank's regions; return the number of bytes."""

    def _complete(self, layout: FileLayout, files: Files) -> int:
        """Coordinator: write what is not made from any rank's tensors; return the number of bytes."""
        return 0


def given_like(like: CheckpointLike | None, base: CheckpointLike | None) -> CheckpointLike | None:
    """Return the checkpoint whose layout is written, given by either of its names."""
    if base is None:
        return like
    if like is not None:
        raise TypeError("base is the former name of like: give one of them")
    warnings.warn("base= is now like=, as in convert", DeprecationWarning, stacklevel=3)
    return base
