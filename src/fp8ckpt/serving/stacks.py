"""Stacked experts in FP8, which transformers does not read everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError
from fp8ckpt.families.loaders import has_no_fp8_experts, is_stack, misreads_stacks
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.serving.subject import Finding, Subject, some


def of_experts(subject: Subject) -> Iterator[Finding]:
    """Experts are a tensor each, where the model has no other layers in FP8; a note for other stacks."""
    stacks = [t for t in subject.quantized if is_stack(t.name, t.shape) and t.weight.dtype in FP8_DTYPES]
    stated, config = subject.stated, subject.checkpoint.config
    if not stacks or stated is None or (misread := misreads_stacks(config, stated.method)) is None:
        return
    found = f"{len(stacks)} stacks of experts are FP8 ({some(tensor.name for tensor in stacks)}): {misread}"
    if not has_no_fp8_experts(config):
        yield found
        return
    remedy = "leave them in BF16 (convert --scheme, --skip experts), or give each expert a tensor of its own"
    yield ServingError(found, tensor=stacks[0], expected="an expert a tensor", remedy=remedy)
