"""From FP8 to BF16, FP16 or FP32: the same files with the same tensors, less the scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fp8ckpt.encodings.seen import Seen
from fp8ckpt.engine import ExtentWriter, Filled, Progress, begin
from fp8ckpt.errors import RangeError
from fp8ckpt.families.between import as_in_model
from fp8ckpt.families.loaders import leaves_experts_random
from fp8ckpt.numerics.codes import TARGET_BYTES
from fp8ckpt.output import extents as cutting
from fp8ckpt.output.extents import Chunk, Extent, extents_of, met, page_chunks, reads_of
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.like import PlainLayout
from fp8ckpt.output.partial import Facts, PartialOutput
from fp8ckpt.output.plan import OutputPlan, refuse_shared
from fp8ckpt.output.side_files import notes_on_plain
from fp8ckpt.stores.store import Bytes
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint, raise_first
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.stored import DTYPE_BITS
from fp8ckpt.tensors.tensor import DequantizerOf, Reader, Tensor, bytes_of_values

if TYPE_CHECKING:
    from fp8ckpt.ranks import Ranks


FILE, MODEL = "file", "model"
#: Under which names and in which stackings tensors are written: the file's own, or those of its model in transformers.
LAYOUTS = (FILE, MODEL)


@dataclass(frozen=True)
class PlainPlan:
    """An output, and the ``tensors`` that are written, by name, as they are read of the source; what a user should
    know.
    """

    source: Checkpoint
    tensors: Mapping[str, Tensor]
    output: OutputPlan
    notes: tuple[str, ...]

    def extents(self, most: int) -> dict[int, Extent]:
        """All that is written, by numbers, in extents of ``most`` bytes."""
        layouts = self.output.layouts
        return dict(enumerate(extent for layout in layouts for extent in extents_of(layout, page_chunks(layout), most)))

    def made_of(self) -> dict[str, int]:
        """Of how many bytes each tensor of the output is made."""
        return {name: bytes_of_values(tensor) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Dequantized:
    """What a run did. Sizes are in bytes."""

    plan: PlainPlan
    bytes_read: int
    bytes_resumed: int
    nan_codes: dict[str, int]
    seen: Seen


def run(
    source: CheckpointLike,
    output: PartialOutput,
    dtype: str,
    workers: int,
    progress: Progress | None,
    ranks: Ranks,
    *,
    layout: str = FILE,
    follow_index: bool = False,
    see: bool = False,
) -> Dequantized:
    """Plan, write and publish, together with the other ranks. ``layout``: see `LAYOUTS`; ``see``: count codes."""
    from fp8ckpt.tensors.reading import load_dequantizer

    planned = ranks.together(lambda: plan_plain(source, output, dtype, layout, follow_index, see=see))
    plan = planned.output
    extents = planned.extents(output.extent)
    done = begin(plan, output, ranks, extents)
    mine = [i for i in extents if i not in done][ranks.rank :: ranks.size]
    # Neighbouring chunks are of one tensor, and workers stay close together.
    dequantizer = lru_cache(maxsize=2 * workers)(load_dequantizer)
    fillers = [_Filler(planned.tensors, dtype, dequantizer, see=see) for _ in range(workers)]

    def write() -> int:
        todo = {i: extents[i] for i in mine}
        store = planned.source.store
        with store.ahead(reads_of(planned.tensors, todo.values(), store)):
            ExtentWriter(output, ranks.rank, todo, _sum, progress).run(fillers)
        plan.refuse_changes()
        return sum(filler.bytes_read for filler in fillers)

    bytes_read = sum(ranks.gather(write))
    nan_codes, seen = ranks.first(lambda: _publish(plan, output))
    return Dequantized(planned, bytes_read, sum(extents[i].nbytes for i in done), nan_codes, seen)


def plan_plain(
    source: CheckpointLike, output: PartialOutput, dtype: str, layout: str, follow_index: bool, *, see: bool = False
) -> PlainPlan:
    """Everything that can be known or refused before the first byte is written."""
    from fp8ckpt.tensors.reading import scale_defects

    output.refuse_existing()
    checkpoint = open_checkpoint(source, follow_index=follow_index)
    refuse_shared(output, checkpoint, "source")
    raise_first(scale_defects(checkpoint.quantized, checkpoint.cache_scales))
    if dtype == "F16":
        for tensor in checkpoint.quantized:
            if tensor.numel:
                _refuse_overflow(tensor)
    tensors, notes = checkpoint.tensors, notes_on_plain(checkpoint)
    if layout == MODEL:
        tensors = as_in_model(checkpoint)
        plain = PlainLayout.of_tensors(checkpoint, tensors, dtype)
    else:
        plain = PlainLayout.of(checkpoint, dtype)
        if leaves_experts_random(checkpoint.config, tensors):
            notes += ("transformers leaves experts random that are a tensor each of this model: say --layout model",)
    arguments = {"job": "convert", "dtype": dtype, **({"see": True} if see else {})}
    written = OutputPlan((checkpoint,), arguments, *plain)
    return PlainPlan(checkpoint, tensors, written, notes)


def _refuse_overflow(tensor: QuantizedTensor) -> None:
    """Float16 ends at 65504: a tensor whose finite codes go beyond is refused."""
    from fp8ckpt.tensors.reading import load_dequantizer

    if count := tensor.count_overflown(Reader(cutting.CHUNK // 2, load_dequantizer)):
        found = f"{count} elements go beyond 65504, the largest float16"
        raise RangeError(found, tensor=tensor.name, file=tensor.span.file, remedy="convert to bf16 or fp32")


def _sum(facts: Iterable[Facts]) -> Facts:
    every = list(facts)
    nan_codes: Counter[str] = Counter()
    for one in every:
        nan_codes.update(one["nan_codes"])
    return {"nan_codes": nan_codes, "seen": Seen.of(one["seen"] for one in every).recorded()}


def _publish(plan: OutputPlan, output: PartialOutput) -> tuple[dict[str, int], Seen]:
    """The last step: the NaN codes of all extents, and what was seen, added up before their records go."""
    total = _sum(output.records().values())
    plan.publish(output)
    return dict(sorted(total["nan_codes"].items())), Seen.of([total["seen"]])


class _Filler:
    """One worker's reading and dequantizing: fills pieces of the output from the source, with buffers of its own."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: str, dequantizer: DequantizerOf, *, see: bool) -> None:
        self._tensors = tensors
        self._see = see
        self._reader = Reader(cutting.CHUNK // TARGET_BYTES[dtype], dequantizer, counting=True)

    @property
    def bytes_read(self) -> int:
        """Data bytes of the source, scales aside."""
        return self._reader.bytes_read

    def fill(self, layout: FileLayout, chunk: Chunk, out: Bytes) -> Filled:
        """Fill ``out`` with the bytes of a chunk of an output file; the facts are the NaN codes by tensor, and what
        was seen.
        """
        self._reader.nonfinite.clear()
        seen = Seen()
        self._reader.passing = seen.count if self._see else None
        start = chunk.start
        if start < len(layout.head):
            head = layout.head[start : chunk.stop]
            out[: len(head)] = memoryview(head)
        for span, low, high in met(layout, chunk):
            first = (low - span.start) * 8 // DTYPE_BITS[span.dtype]
            self._tensors[span.name].elements(first, span.dtype, out[low - start : high - start], self._reader)
        return Filled({"nan_codes": dict(self._reader.nonfinite), "seen": seen.recorded()})

    def close(self) -> None:
        """Nothing to release."""
