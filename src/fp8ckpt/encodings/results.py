"""What a conversion or a save did: the facts of it, and the report of quantizing, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What quantizing did to one weight, or to all.

    ``moved``: elements whose code is not the base's (None without a base). ``clipped``: magnitudes beyond the written
    scale; ``outgrown``: beyond the base's. ``scales`` in all, of which ``fresh`` are new; ``fresh_factors``: of second
    levels of scales (NVFP4), under which all are new. Errors are those of the written values against the source:
    ``mean_error`` is relative to the mean magnitude, ``largest_error`` to the largest.
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
    """All weights together, and each. ``carried``: tensors that were taken from the base, byte for byte."""

    total: WeightReport
    weights: tuple[WeightReport, ...]
    carried: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion or a save did: a `PlainResult`, an `Fp8Result`, or of a save that is not to FP8 no more than
    this. Sizes are in bytes.

    ``tensors``: of the source. ``bytes_read``: of the source's files; a model has none. ``bytes_written``: of all files
    of weights, ``bytes_resumed`` of which an earlier run wrote. ``notes``: what a user should know.

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
    """What a conversion to BF16, FP16 or FP32 did. ``nan_codes`` counts, by tensor, those that were carried over.

    >>> fp8ckpt.convert("sample-fp8", "sample-fp32", to="fp32").nan_codes
    {}
    """

    dequantized: int
    dropped_scales: int
    nan_codes: dict[str, int]


@dataclass(frozen=True)
class Fp8Result(ConvertResult):
    """What a conversion or a save to FP8 did.

    ``base_bytes_read``: codes of the base, which are read for the report alone. ``bytes_rewritten``: written a second
    time, for weights whose one scale turned out not to fit. ``report``: what quantizing did, weight by weight; None
    where none was asked for.

    >>> _ = fp8ckpt.convert("sample-fp8", "sample-bf16")
    >>> fp8ckpt.convert("sample-bf16", "sample-block", to="fp8", scheme="block").quantized
    8
    """

    quantized: int
    base_bytes_read: int
    bytes_rewritten: int
    report: QuantizationReport | None
