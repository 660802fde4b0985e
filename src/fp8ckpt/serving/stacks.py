"""Stacked experts in FP8, which transformers does not read everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError
from fp8ckpt.families.loaders import misreads_stacks
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.serving.subject import Finding, Subject, some


def of_experts(subject: Subject) -> Iterator[Finding]:
    """Stacks are of a method and a model whose stacks transformers reads, or of one expert a tensor."""
    stacks = [t for t in subject.quantized if len(t.shape) == 3 and t.weight.dtype in FP8_DTYPES]
    stated = subject.stated
    if not stacks or stated is None or (misread := misreads_stacks(subject.checkpoint.config, stated.method)) is None:
        return
    always, how = misread
    found = f"{len(stacks)} stacks of experts are FP8 ({some(tensor.name for tensor in stacks)}): {how}"
    if not always:
        yield found
        return
    remedy = "leave experts in BF16 (convert --scheme, --skip experts), or give each a tensor of its own"
    file = stacks[0].weight.file
    yield ServingError(found, tensor=stacks[0].name, file=file, expected="an expert a tensor", remedy=remedy)
