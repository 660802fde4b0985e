"""The range of the scales of one tensor, or of all of a kind: least, median and greatest; and which stand out.

A scale *stands out* if it is more than `FAR` times the median of its kind, or less than a `FAR`-th of it. For a weight
with many scales, its greatest and its least are compared with the medians of all greatest and all least of the kind.
Reads scales, and no codes; memory is that of one weight's scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from fp8ckpt.tensors.reading import read_floats
from fp8ckpt.tensors.stored import TensorSpan

FAR = 8.0  # three binades of the sixteen that e4m3 has


@dataclass(frozen=True)
class ScaleRange:
    """The range of ``count`` scales; all values are 0.0 if there are no scales."""

    count: int
    least: float
    median: float
    greatest: float


_NONE = ScaleRange(0, 0.0, 0.0, 0.0)


def scale_range(span: TensorSpan) -> ScaleRange:
    """Return the range of the scales that are stored in one tensor, without those that are zero."""
    values = read_floats(span)
    values = values[values != 0]  # groups of zeros have such scales
    if not values.size:
        return _NONE
    return ScaleRange(span.numel, float(values.min()), float(np.median(values)), float(values.max()))


def joined(ranges: Iterable[ScaleRange]) -> ScaleRange:
    """Return the range over several weights; the median is that of their medians."""
    known = [each for each in ranges if each.count]
    if not known:
        return _NONE
    return ScaleRange(
        sum(each.count for each in known),
        min(each.least for each in known),
        median(each.median for each in known),
        max(each.greatest for each in known),
    )


def outliers(ranges: Mapping[str, ScaleRange]) -> dict[str, float]:
    """Return the weights of one kind that stand out, each with its factor, above 1 or below it."""
    known = {name: each for name, each in ranges.items() if each.count}
    if not known:
        return {}
    greatest = median(each.greatest for each in known.values())
    least = median(each.least for each in known.values())
    found = {}
    for name, each in known.items():
        factors = (each.greatest / greatest, each.least / least)
        factor = max(factors, key=lambda factor: max(factor, 1 / factor))
        if max(factor, 1 / factor) > FAR:
            found[name] = factor
    return found
