"""From FP8 to BF16, FP16 or FP32: the same files with the same tensors, without the scales."""

from __future__ import annotations

from fp8ckpt.encodings.asked import Asked
from fp8ckpt.encodings.recipes import QuantizingPlan
from fp8ckpt.errors import RangeError
from fp8ckpt.families.between import as_in_model
from fp8ckpt.families.loaders import leaves_experts_random
from fp8ckpt.output import extents as cutting
from fp8ckpt.output.like import PlainLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import OutputPlan
from fp8ckpt.output.side_files import notes_on_plain
from fp8ckpt.targets import TARGETS
from fp8ckpt.tensors.checkpoint import raise_first
from fp8ckpt.tensors.reading import load_dequantizer, scale_defects
from fp8ckpt.tensors.scaled import QuantizedTensor
from fp8ckpt.tensors.tensor import Reader

FILE, MODEL = "file", "model"
#: The names and stackings of the written tensors: those of the files, or those of the model in transformers.
LAYOUTS = (FILE, MODEL)


def plan_plain(asked: Asked, output: PartialOutput) -> QuantizingPlan:
    """Plan the output, and refuse what can be refused, before the first byte is written."""
    checkpoint, dtype = asked.opened_source(output), TARGETS[asked.to]
    raise_first(scale_defects(checkpoint.quantized, checkpoint.cache_scales))
    if dtype == "F16":
        for tensor in checkpoint.quantized:
            if tensor.numel:
                _refuse_overflow(tensor)
    tensors, notes = checkpoint.tensors, notes_on_plain(checkpoint)
    if asked.layout == MODEL:
        tensors = as_in_model(checkpoint)
        plain = PlainLayout.of_tensors(checkpoint, tensors, dtype)
    else:
        plain = PlainLayout.of(checkpoint, dtype)
        if leaves_experts_random(checkpoint.config, tensors):
            notes += ("transformers leaves this model's experts random when each is a tensor: use --layout model",)
    written = OutputPlan((checkpoint,), asked.arguments(job="convert", dtype=dtype), *plain)
    return QuantizingPlan(
        written, checkpoint, None, {}, tensors, (), fresh=False, report=True, see=asked.see, notes=notes
    )


def _refuse_overflow(tensor: QuantizedTensor) -> None:
    """Raise if finite codes have values beyond 65504, the largest float16."""
    if count := tensor.count_overflown(Reader(cutting.CHUNK // 2, load_dequantizer)):
        raise RangeError.of_halves(tensor, count=count)
