"""The meaning of one stored code, and of one stored scale.

A *code* has eight bits (FP8) or four (F4: a byte holds two, the first in the low half); `code_values` gives the float32
value of each pattern. A *scale* is always the multiplier, whatever a file calls it; `scale_values` gives scales as
float32. NVFP4 has two levels of scales: a `Factor` for the whole tensor scales those of its groups.

Dtype names are those of safetensors headers. Sources: OCP "8-bit Floating Point Specification" 1.0 (E4M3, E5M2), OCP
"Microscaling Formats" 1.0 (E2M1, E8M0), and the IEEE-style ``fnuz`` variants of Noune et al. 2022 (one NaN, at 0x80; no
infinities; no negative zero).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class CodeFormat(NamedTuple):
    """The layout of a code: sign bit, then ``exponent_bits``, then ``mantissa_bits``."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    # Code c is not finite if (c & mask) - first, as a byte, is below `count`: one test that a compiler vectorises.
    nonfinite_mask: int
    nonfinite_first: int
    nonfinite_count: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def per_byte(self) -> int:
        return 8 // self.bits


F4 = "F4"  # e2m1; most files store it in bytes, as U8 or I8

#: Codes by the safetensors name of their dtype. Released models use only e4m3fn of FP8; the others can be read too.
CODE_FORMATS = {
    "F8_E4M3": CodeFormat(4, 3, 7, 0x7F, 0x7F, 1),
    "F8_E5M2": CodeFormat(5, 2, 15, 0x7F, 0x7C, 4),
    "F8_E4M3FNUZ": CodeFormat(4, 3, 8, 0xFF, 0x80, 1),
    "F8_E5M2FNUZ": CodeFormat(5, 2, 16, 0xFF, 0x80, 1),
    F4: CodeFormat(2, 1, 1, 0, 0, 0),
}

#: The formats with one code a byte.
FP8_DTYPES = tuple(dtype for dtype, form in CODE_FORMATS.items() if form.bits == 8)

#: Bytes per element of the dtypes that codes are dequantized to.
TARGET_BYTES = {"BF16": 2, "F16": 2, "F32": 4}

#: What happens to a base's scales: kept if the values still fit them, or all made anew.
SCALES = ("reuse", "fresh")

#: Scale dtypes; U8 holds e8m0 exponents. Scales in F8_E4M3 have a factor.
SCALE_DTYPES = {
    "F32": np.uint32, "BF16": np.uint16, "F16": np.float16, "U8": np.uint8, "F8_E8M0": np.uint8, "F8_E4M3": np.uint8,
}  # fmt: skip
E8M0_DTYPES = ("U8", "F8_E8M0")
FP8_SCALES = tuple(dtype for dtype in SCALE_DTYPES if dtype not in FP8_DTYPES)  # those of FP8 codes

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


class Factor(NamedTuple):
    """The second level of scales: all scales of a tensor are multiplied by ``value``, or divided."""

    value: np.float32
    divides: bool

    def of(self, scales: F32) -> F32:
        """Return the multipliers of codes, in float32."""
        with np.errstate(all="ignore"):  # invalid scales are refused later, by name
            found: F32 = scales / self.value if self.divides else scales * self.value
            return found


@lru_cache
def code_values(dtype: str) -> F32:
    """Return the float32 values [256 or 16] of all codes of a dtype. NaN codes keep their sign bit, and are quiet."""
    form = CODE_FORMATS[dtype]
    bits = np.zeros(1 << form.bits, np.uint32)
    for code in range(bits.size):
        exponent = code >> form.mantissa_bits & (1 << form.exponent_bits) - 1
        mantissa = code & (1 << form.mantissa_bits) - 1
        if (code & form.nonfinite_mask) - form.nonfinite_first & 0xFF < form.nonfinite_count:
            infinite = dtype == "F8_E5M2" and mantissa == 0
            bits[code] = 0x7F800000 if infinite else 0x7FC00000
        else:
            fraction = mantissa / (1 << form.mantissa_bits)
            magnitude = (
                (1 + fraction) * 2.0 ** (exponent - form.bias) if exponent else fraction * 2.0 ** (1 - form.bias)
            )
            bits[code] = np.float32(magnitude).view(np.uint32)
        # The single NaN of the fnuz formats has the pattern of negative zero, and no sign of its own. It gets the sign
        # that the reference decoders (ml_dtypes, torch) give it.
        bits[code] |= np.uint32(code >> form.bits - 1 << 31)
    values = bits.view(np.float32)
    values.flags.writeable = False
    return values


def scale_values(stored: npt.NDArray[np.generic], dtype: str, factor: Factor | None = None) -> F32:
    """Return scales as float32. The conversion is exact for every scale dtype; with a ``factor`` it rounds once.

    ``stored`` has the numpy dtype that `SCALE_DTYPES` gives; the shape is kept.
    """
    if factor is not None:
        return factor.of(scale_values(stored, dtype))
    if dtype == "F8_E4M3":
        return code_values(dtype)[stored.view(np.uint8)]
    if dtype == "F32":
        return stored.view(np.float32)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return stored.astype(np.float32)
    exponent = stored.astype(np.uint32)  # the value is 2 ** (byte - 127)
    bits = exponent << 23
    bits = np.where(exponent == 0, np.uint32(0x00400000), bits)  # 2 ** -127, a float32 subnormal
    bits = np.where(exponent == 255, np.uint32(0x7FC00000), bits)
    return bits.view(np.float32)


def count_bad_scales(scales: F32) -> int:
    """Return how many scales are NaN, infinite, zero or negative."""
    return int(scales.size - np.count_nonzero((scales > 0) & (scales < np.inf)))
