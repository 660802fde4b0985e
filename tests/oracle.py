"""The one naive oracle: the numeric contract spelled with ml_dtypes and numpy, and a safetensors writer spelled with
json.

It shares no code with the package: not its tables, not its rounding, not its layout, and none of torch's casts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

NUMPY = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz, "F4": ml_dtypes.float4_e2m1fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_, "F64": np.float64,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as a file holds it; of F4, two elements lie in a byte, the first in the low half."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray, dtype: str) -> Stored:
        """Values cast to ``dtype`` (which must be exact, or the test's own choice of rounding)."""
        return cls(dtype, array.shape, np.ascontiguousarray(array.astype(NUMPY[dtype])).tobytes())

    @classmethod
    def codes(cls, codes: np.ndarray, dtype: str = "F8_E4M3") -> Stored:
        """Bytes that are FP8 codes (or e8m0 exponents) already."""
        return cls(dtype, codes.shape, np.ascontiguousarray(codes, np.uint8).tobytes())

    @property
    def array(self) -> np.ndarray:
        """The values, in numpy's or ml_dtypes' own dtype."""
        if self.dtype == "F4":
            halves = [half for byte in self.data for half in (byte & 15, byte >> 4)]
            return np.array(halves, np.uint8).view(NUMPY["F4"]).reshape(self.shape)
        return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)


def scale_floats(scale: Stored) -> np.ndarray:
    """Scales as float32; U8 holds e8m0 exponents."""
    values = np.frombuffer(scale.data, NUMPY["F8_E8M0" if scale.dtype == "U8" else scale.dtype])
    return values.astype(np.float32).reshape(scale.shape)


def spread(scales: np.ndarray, shape: tuple[int, ...], block_size: tuple[int, ...]) -> np.ndarray:
    """One scale a block [grid] as one an element [shape]."""
    scales = scales.reshape(tuple(-(-dim // block) for dim, block in zip(shape, block_size, strict=True)))
    for axis, (dim, block) in enumerate(zip(shape, block_size, strict=True)):
        scales = np.take(scales, np.arange(dim) // block, axis=axis)
    return scales


def multipliers(scale: Stored, factor: Stored | None = None, *, divides: bool = False) -> np.ndarray:
    """Scales as float32, times the second level's ``factor`` or divided by it."""
    scales = scale_floats(scale)
    if factor is None:
        return scales
    with np.errstate(all="ignore"):
        value = factor.array.reshape(()).astype(np.float32)
        return np.asarray(scales / value if divides else scales * value, np.float32)


def dequantize(
    weight: Stored, scale: Stored, block_size: tuple[int, ...], dtype: str, factor: Stored | None = None,
    *, divides: bool = False,
) -> bytes:  # fmt: skip
    """``round_nearest_even(float32(code) * float32(scale), dtype)``, element by element, as the bytes of the whole
    tensor.
    """
    codes = weight.array.astype(np.float32)
    scales = spread(multipliers(scale, factor, divides=divides), weight.shape, block_size)
    with np.errstate(all="ignore"):
        return np.ascontiguousarray((codes * scales).astype(np.float32).astype(NUMPY[dtype])).tobytes()


def quantize(
    values: Stored, scale: Stored, block_size: tuple[int, ...], factor: Stored | None = None,
    *, divides: bool = False, codes: str = "F8_E4M3",
) -> bytes:  # fmt: skip
    """``e4m3fn(clamp(float32(value) / float32(scale), -448, 448))``, nearest even, of finite values: the codes of the
    whole tensor. Those of F4, up to 6, in pairs.
    """
    scales = spread(multipliers(scale, factor, divides=divides), values.shape, block_size)
    with np.errstate(all="ignore"):
        quotients = np.asarray(values.array.astype(np.float32) / scales, np.float32)
    most = np.float32(448 if codes == "F8_E4M3" else 6)
    found = np.ascontiguousarray(np.clip(quotients, -most, most).astype(NUMPY[codes])).tobytes()
    return found if codes == "F8_E4M3" else pack(found)


def pack(codes: bytes) -> bytes:
    """Codes of four bits, one a byte, as they lie in a file."""
    return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))


def maxima(values: Stored, block_size: tuple[int, ...]) -> np.ndarray:
    """The largest magnitude of each block, as float32 [grid]."""
    magnitudes = np.abs(values.array.astype(np.float32))
    found = np.zeros(tuple(-(-dim // block) for dim, block in zip(values.shape, block_size, strict=True)), np.float32)
    for index in np.ndindex(found.shape):
        found[index] = magnitudes[
            tuple(slice(i * block, (i + 1) * block) for i, block in zip(index, block_size, strict=True))
        ].max()
    return found


def fresh_scale(values: Stored, block_size: tuple[int, ...], dtype: str) -> Stored:
    """``amax / 448`` in float32, 1 for zeros, as the least value of ``dtype`` that is not below.

    A quotient below 2**-126 has fewer bits: there it is the least multiple of 2**-149 of which 448 are not below
    ``amax``.
    """
    amax = maxima(values, block_size)
    quotients = np.asarray(amax / np.float32(448), np.float32)
    steps = np.ldexp(amax.astype(np.float64), 149)  # whole numbers, exactly
    up = np.ldexp(np.ceil(np.where(steps < 2.0**33, steps, 0) / 448), -149).astype(np.float32)
    wanted = np.where(quotients < 2.0**-126, up, quotients)
    wanted = np.where(amax == 0, np.float32(1), wanted)
    if dtype == "F32":
        return Stored(dtype, amax.shape, wanted.tobytes())
    kind = np.dtype(NUMPY["F8_E8M0" if dtype == "U8" else dtype])
    every = np.arange(1 << 8 * kind.itemsize).astype(f"u{kind.itemsize}").view(kind)
    with np.errstate(invalid="ignore"):
        every = np.sort(every.astype(np.float32)[every.astype(np.float32) > 0])
    least = every[np.searchsorted(every, wanted, side="left")]
    return Stored(dtype, amax.shape, np.ascontiguousarray(least.astype(kind)).tobytes())


def write_safetensors(file: Path, tensors: dict[str, Stored], metadata: dict[str, str] | None = None) -> None:
    """A valid file, with the tensors in the order given."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(tensor.data)],
        }
        data += tensor.data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(file: Path) -> dict[str, Stored]:
    """Every tensor of a valid file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        found[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[8 + length + start : 8 + length + stop])
    return found


def read_directory(directory: Path) -> dict[str, Stored]:
    """Every tensor of every safetensors file of a directory."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in read_safetensors(file).items()
    }


def write_plain(directory: Path, tensors: dict[str, Stored]) -> Path:
    """A directory of one file and no configuration."""
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def assert_same_tree(found: Path, expected: Path) -> None:
    """The same files with the same bytes."""
    one, two = tree(found), tree(expected)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
