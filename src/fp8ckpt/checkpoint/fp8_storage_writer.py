"""A storage writer with which torch's distributed checkpoint quantizes as it writes: final FP8 files in a base's
layout, in one pass.

The output equals, file for file and byte for byte, what ``convert(..., to="fp8", like=base)`` makes of the same values,
however they are sharded. Names, headers, index, configuration and side files are the base's, as are activation scales
and the scales of a cache. The rule of `fp8ckpt.numerics.scaling` keeps or makes each scale, from all elements of its
block. No rank holds a copy of its shard, in any dtype, and values stay on their device until a piece of them is worked
on.

The life cycle is that of `fp8ckpt.checkpoint.directory_writer`; `fp8ckpt.checkpoint.fp8_part` is what one rank does in
it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from fp8ckpt.checkpoint.directory_writer import DirectoryWriter, given_like
from fp8ckpt.checkpoint.fp8_part import Part, Task
from fp8ckpt.checkpoint.items import Rounds
from fp8ckpt.encodings.results import ConvertResult, Fp8Result, QuantizationReport
from fp8ckpt.encodings.rule import units_of
from fp8ckpt.numerics import scaling
from fp8ckpt.numerics.codes import SCALES
from fp8ckpt.output.layout import FileLayout, TensorSpec
from fp8ckpt.output.like import BaseLayout
from fp8ckpt.output.matching import refuse_base, refuse_other_dtypes
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.output.staging import Files
from fp8ckpt.stores.store import File
from fp8ckpt.targets import refuse_other
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike

_COPIED = 4 << 20  # bytes of the base that are copied at once


class FP8StorageWriter(DirectoryWriter):
    """A storage writer that quantizes to the new directory ``path``, for ``dcp.save`` and ``dcp.async_save``.

    ``like``: the FP8 checkpoint that the model came from: a directory, a hub id in the local cache, or an open
    `Checkpoint`; ``base`` is its former name. The state dict has its logical tensors under its names, in bfloat16,
    float16 or float32, DTensors of any placement among them. ``scales``: "reuse" keeps the scale of a block whose
    values still fit it, "fresh" makes all anew. ``carry``: names of tensors that are taken from the base if the state
    dict lacks them; those of MTP layers always are. ``process_group``: the one that ``dcp.save`` is given.
    ``bytes_written`` counts this rank's tensor bytes.

    ``report``: report what quantizing changed; for that the base's codes are read, once over all ranks
    (``base_bytes_read``, their sum). After ``dcp.save`` the attribute ``report`` is, on every rank, the one that
    ``convert(..., like=base)`` gives; None without it, and if the save ran in another process.

    Raises, on every rank: `UnsupportedFormatError` for a base without codes of e4m3 or four bits, or a dtype that is
    not quantized, `ModelMismatchError` for tensors or shapes other than the base's, `WeightValueError` for elements
    that are not finite, `RangeError` for values that no stored dtype can hold. ``dcp.save`` raises them inside torch's
    ``CheckpointException``.

    >>> import torch.distributed.checkpoint as dcp
    >>> checkpoint = fp8ckpt.open_checkpoint("sample-fp8")
    >>> state_dict = {name: checkpoint.read(name) for name in checkpoint.tensors}
    >>> _ = dcp.save(state_dict, storage_writer=fp8ckpt.FP8StorageWriter("saved", like="sample-fp8"))
    >>> fp8ckpt.verify("sample-fp8", "saved").ok
    True
    """

    def __init__(
        self,
        path: str | Path,
        *,
        like: CheckpointLike | None = None,
        scales: str = "reuse",
        report: bool = True,
        carry: Collection[str] = (),
        process_group: ProcessGroup | None = None,
        base: CheckpointLike | None = None,
    ) -> None:
        refuse_other("scales", scales, SCALES)
        given = given_like(like, base)
        if given is None:
            raise TypeError("FP8StorageWriter needs like, the FP8 checkpoint that the model came from")
        super().__init__(path, given, carry, process_group)
        self._fresh = scales == "fresh"
        self._counting = report
        self.report: QuantizationReport | None = None
        self.base_bytes_read = 0
        self._beside: set[str] = set()  # the coordinator's: stored tensors that no shard holds
        self._empty: set[str] = set()  # and those of them that are the scales of weights without elements

    @property
    def _base(self) -> Checkpoint:
        base = self._base_of_output()
        assert base is not None  # __init__() saw to it
        return base

    def _said(self) -> dict[str, Any]:
        return {**super()._said(), "fresh": self._fresh, "report": self._counting}

    @property
    def _meets(self) -> bool:
        """Always: ranks exchange what decides scales."""
        return True

    def _planned(self, tensors: dict[str, TensorSpec]) -> tuple[OutputPlan, Mapping[str, str]]:
        base, remedy = self._base, "give the FP8 checkpoint that the model came from"
        refuse_base(base, remedy)
        self._carried_from(base, tensors, remedy)
        refuse_other_dtypes(tensors, base)
        layout = BaseLayout(base)
        held = [tensor for name, tensor in base.tensors.items() if name not in self._carried]
        makers = {tensor.name: tensor.name for tensor in held if tensor.scaled is None}
        filled = [tensor.scaled for tensor in held if tensor.scaled is not None and tensor.numel]
        makers |= {span.name: w.name for w in filled for span in (w.weight, *w.scales)}
        self._beside = {span.name for part in layout.layouts for span in part.spans if span.nbytes}
        self._beside -= makers.keys()
        self._empty = {tensor.scale.name for tensor in base.quantized if not tensor.numel and tensor.per_byte == 1}
        arguments = {"job": "save", "fresh": self._fresh}
        return OutputPlan((base,), arguments, layout.layouts, layout.texts, layout.copies), makers

    def _shared_out(self, plans: list[SavePlan], output: OutputPlan) -> Iterator[Task]:
        units = units_of(self._base.quantized)
        leader = {name: unit[0] for unit in units if len(unit) > 1 for name in unit}
        for plan in plans:
            joined = {item.index.fqn: leader[item.index.fqn] for item in plan.items if item.index.fqn in leader}
            yield Task(joined, self._carried)

    def _write(self, own: Task, planner: SavePlanner, rounds: Rounds) -> int:
        part = Part(self._base, own, planner, rounds, fresh=self._fresh, report=self._counting)
        written = part.run()
        self._carried, self.report, self.base_bytes_read = own.carried, part.report, part.base_bytes_read
        return written

    def reported(self, done: ConvertResult) -> Fp8Result:
        """Return the result with what only a save to FP8 has, such as the report; the same on every rank."""
        return Fp8Result(
            **vars(done),
            quantized=sum(tensor.name not in self._carried for tensor in self._base.quantized),
            base_bytes_read=self.base_bytes_read,
            bytes_rewritten=0,
            report=self.report,
        )

    def _complete(self, layout: FileLayout, files: Files) -> int:
        """Copy what no shard holds: carried tensors, and the base's activation scales and scales of a cache. The scale
        of a weight without elements is written here, too.
        """
        file = File(self._base.store, layout.name)
        done = 0
        for span in layout.spans:
            if span.name not in self._beside:
                continue
            if self._fresh and span.name in self._empty:
                fresh = scaling.fresh_scales(np.zeros(span.numel, np.float32), span.dtype).view(np.uint8)
                files.of(layout.name).write(fresh, span.start)
            else:
                for start in range(span.start, span.stop, _COPIED):
                    stored = np.empty(min(_COPIED, span.stop - start), np.uint8)
                    file.read(start, stored)
                    files.of(layout.name).write(stored, start)
            done += span.nbytes
        return done
