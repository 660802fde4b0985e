"""The results of a conversion or a save: sizes and counts, and the report of quantizing by weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WeightReport:
    """The effect of quantizing on one weight, or on all.

    ``moved``: elements whose code differs from the base's (None without a base). ``clipped``: magnitudes beyond the
    written scale; ``outgrown``: beyond the base's scale. ``scales``: the number of scales; ``fresh`` of them are new.
    ``fresh_factors``: new second levels of scales (NVFP4), under which all scales are new. Errors are those of the
    written values against the source: ``mean_error`` relative to the mean magnitude, ``largest_error`` to the largest.
    """

    name: str
    elements: int
    moved: int | None
    clipped: int
    outgrown: int
    scales: int
    fresh: int
    mean_error: float
    largest_error: float
    fresh_factors: int = 0


@dataclass(frozen=True)
class QuantizationReport:
    """All weights together, and each. ``carried``: tensors that were copied from the base, byte for byte."""

    total: WeightReport
    weights: tuple[WeightReport, ...]
    carried: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertResult:
    """The result of a conversion or a save: a `PlainResult` or an `Fp8Result`, or this class itself for a save that is
    not to FP8. Sizes are in bytes.

    ``tensors``: of the source. ``bytes_read``: from the source's files; 0 for a model. ``bytes_written``: of all files
    of weights, ``bytes_resumed`` of which an earlier run wrote. ``notes``: facts for the user.

    >>> result = fp8ckpt.convert("sample-fp8", "sample-bf16")
    >>> result.tensors, result.bytes_resumed
    (45, 0)
    """

    destination: Path | str
    to: str
    files: int
    tensors: int
    bytes_read: int
    bytes_written: int
    bytes_resumed: int
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class PlainResult(ConvertResult):
    """The result of a conversion to BF16, FP16 or FP32. ``nan_codes``: how many NaN codes were carried over, by tensor.

    >>> fp8ckpt.convert("sample-fp8", "sample-fp32", to="fp32").nan_codes
    {}
    """

    dequantized: int
    dropped_scales: int
    nan_codes: dict[str, int]


@dataclass(frozen=True)
class Fp8Result(ConvertResult):
    """The result of a conversion or a save to FP8.

    ``base_bytes_read``: codes of the base, read for the report alone. ``bytes_rewritten``: bytes written a second time,
    for weights whose one scale turned out not to fit. ``report``: the effect of quantizing by weight; None if it was
    not asked for.

    >>> _ = fp8ckpt.convert("sample-fp8", "sample-bf16")
    >>> fp8ckpt.convert("sample-bf16", "sample-block", to="fp8", scheme="block").quantized
    8
    """

    quantized: int
    base_bytes_read: int
    bytes_rewritten: int
    report: QuantizationReport | None
