"""The one naive oracle: the numeric contract spelled with ml_dtypes and numpy, and a safetensors writer spelled with json.

It shares no code with the package: not its tables, not its rounding, not its layout, and none of torch's casts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

NUMPY = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "U8": np.uint8,
    "I8": np.int8, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_, "F64": np.float64,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as a file holds it."""

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
        return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)


def scale_floats(scale: Stored) -> np.ndarray:
    """Scales as float32; U8 holds e8m0 exponents."""
    values = np.frombuffer(scale.data, NUMPY["F8_E8M0" if scale.dtype == "U8" else scale.dtype])
    return values.astype(np.float32).reshape(scale.shape)


def dequantize(weight: Stored, scale: Stored, block_size: tuple[int, ...], dtype: str) -> bytes:
    """``round_nearest_even(float32(code) * float32(scale), dtype)``, element by element, as the bytes of the whole tensor."""
    codes = weight.array.astype(np.float32)
    grid = tuple(-(-dim // block) for dim, block in zip(weight.shape, block_size, strict=True))
    scales = scale_floats(scale).reshape(grid)
    for axis, (dim, block) in enumerate(zip(weight.shape, block_size, strict=True)):
        scales = np.take(scales, np.arange(dim) // block, axis=axis)
    with np.errstate(all="ignore"):
        return np.ascontiguousarray((codes * scales).astype(np.float32).astype(NUMPY[dtype])).tobytes()


def write_safetensors(file: Path, tensors: dict[str, Stored], metadata: dict[str, str] | None = None) -> None:
    """A valid file, with the tensors in the order given."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(tensor.data)]}
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
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in read_safetensors(file).items()}
