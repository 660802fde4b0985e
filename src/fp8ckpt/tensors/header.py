"""The safetensors header, and all validation of it.

A file is ``<length: u64 little-endian> <JSON of that length> <data>``. The JSON maps each tensor's name to its dtype,
shape and ``data_offsets`` in the data; ``__metadata__`` maps text to text. The data is covered exactly: no overlap, no
hole, no remainder. This module checks all of it once, against the file's true size; a `TensorSpan` that it returns can
be read without another check. Source: the safetensors format description and reference implementation, version 0.8.
"""

from __future__ import annotations

import json
from functools import partial
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from fp8ckpt.errors import ConfigError, Fp8CheckpointError, HeaderError, TruncatedFileError
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan

_FIRST = 128 << 10  # bytes
_LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's own limit
_LONGEST_WIDE = 25_000_000  # bytes of text that is not ASCII, for which Python takes four bytes a character
_MOST_VALUES = 2_000_000  # commas and brackets of a JSON text, which bound its memory: enough for 250,000 matrices
_MOST_DEFECTS = 1_000  # of one header; the rest is not looked at
_MOST_DIMENSIONS = 64  # bounds the work on a hostile shape; torch itself stops at 64
_LARGEST_DIMENSION = 2**63 - 1
_CONSTANTS = {text: float(text) for text in ("NaN", "Infinity", "-Infinity")}  # one each: lists with NaN can be equal


class Header(NamedTuple):
    """One validated file. ``spans`` are in the order of the data."""

    file: File
    size: int
    metadata: dict[str, str]
    spans: tuple[TensorSpan, ...]
    text: bytes


def read_header(file: File) -> tuple[Header | None, list[Fp8CheckpointError]]:
    """Read and validate one header.

    Returns the header with the sound tensors, and every defect found; the header is None if nothing in it can be used.
    Reads the length, then the header; from a remote store it reads so much at once that most headers take one request.
    Memory is bounded by the header's true length (at most 100 MB).
    """
    try:
        size = file.stat.size
        head = np.zeros(min(size, _FIRST if file.store.at_once > 1 else 8), np.uint8)
        file.read(0, head)
        length = int.from_bytes(head[:8].tobytes(), "little")
        if (fatal := _length_defect(file, size, length)) is not None:
            return None, [fatal]
        stored = np.empty(length, np.uint8)
        known = min(length, head.size - 8)
        stored[:known] = head[8 : 8 + known]
        if known < length:
            file.read(8 + known, stored[known:])
        text = stored.tobytes()
        entries = parse_json(text, file, HeaderError)
    except Fp8CheckpointError as error:
        return None, [error]
    return _validated(file, size, text, entries)


def _length_defect(file: File, size: int, length: int) -> Fp8CheckpointError | None:
    if size < 8:
        return TruncatedFileError.of(file, size)
    if length > _LONGEST_HEADER:
        return HeaderError.of_length(file=file, length=length, most=_LONGEST_HEADER)
    if length > size - 8:
        return TruncatedFileError.of_header(file, size, length)
    return None


def parse_json(text: bytes, file: File, kind: type[HeaderError] | type[ConfigError]) -> dict[str, Any]:
    """Return a JSON object. Raise ``kind`` if an object in it has the same key twice, or a constant is not JSON.

    A configuration may hold infinities and NaN, as Python writes them (Nemotron-H's limits of a time step).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            # add() is None
            name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise kind.of_key(name, file=file)
        return mapping

    def whole(text: str) -> int:
        if text == "-0":
            raise ValueError("-0 is no whole number")
        return int(text)

    def constant(text: str) -> float:
        if kind is ConfigError:
            return _CONSTANTS[text]
        raise ValueError(f"{text} is not JSON")

    values = sum(map(text.count, (b",", b"[", b"{"))) if len(text) > _MOST_VALUES else 0
    if values > _MOST_VALUES or (len(text) > _LONGEST_WIDE and not text.isascii()):
        raise kind.of_size(file, len(text), values, (_MOST_VALUES, _LONGEST_WIDE))
    read = partial(json.loads, parse_constant=constant, parse_int=whole if b"-" in text else None)
    try:
        value = read(text.decode())
        if _may_repeat(value, text):
            del value  # both at once would take twice the memory
            value = read(text.decode(), object_pairs_hook=unique)
        if b"\\" in text:  # an escaped lone surrogate is not text, and cannot be printed
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, Fp8CheckpointError):
            raise
        raise kind.of_text(file=file, error=error) from None
    if not isinstance(value, dict):
        raise kind.of_type(file=file, value=value)
    return value


def _may_repeat(value: Any, text: bytes) -> bool:
    """Whether an object of the text may have a key twice. A hook would see it, in twice the time.

    If the text has as many colons as keys were read from an object of objects, no key was dropped: a colon follows
    each.
    """
    if not isinstance(value, dict):
        return True
    return text.count(b":") != len(value) + sum(len(entry) for entry in value.values() if isinstance(entry, dict))


def _validated(
    file: File, size: int, text: bytes, entries: dict[str, Any]
) -> tuple[Header | None, list[Fp8CheckpointError]]:
    defects: list[Fp8CheckpointError] = []
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the reference implementation reads null as absent
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        defects.append(HeaderError.of_metadata(file=file))
        metadata = {}
    data_start = 8 + len(text)
    spans: list[TensorSpan] = []
    for name, entry in entries.items():
        found = _span(file, name, entry, data_start)
        if isinstance(found, TensorSpan):
            spans.append(found)
        elif len(defects) >= _MOST_DEFECTS:
            return None, [*defects, HeaderError.of_many(file=file, most=_MOST_DEFECTS)]
        else:
            defects.append(found)
    complete = len(spans) == len(entries)
    if not complete or _coverage_defects(file, size, data_start, spans):  # most list them in data order
        spans.sort(key=attrgetter("start", "stop"))
        defects += _coverage_defects(file, size, data_start, spans) if complete else []
    return Header(file, size, metadata, tuple(spans), text), defects


def _span(file: File, name: str, entry: Any, data_start: int) -> TensorSpan | HeaderError:
    """Return the span that an entry describes, or its defect."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        # Exact types: JSON booleans and floats are not sizes.
        if type(dtype) is not str or type(shape) is not list or type(begin) is not int or type(end) is not int:
            raise TypeError
        if len(shape) > _MOST_DIMENSIONS or len(entry) != 3:
            raise TypeError
        for dim in shape:
            if type(dim) is not int or not 0 <= dim <= _LARGEST_DIMENSION:
                raise TypeError
    except (KeyError, TypeError, ValueError):
        return HeaderError.of_entry(name, file=file, entry=json.dumps(entry))
    if (known := _DTYPES.get(dtype)) is None:
        return HeaderError.of_dtype(name, file=file, dtype=dtype, known=DTYPE_BITS)
    dtype, bits = known
    size = prod(shape) * bits
    if begin < 0 or end < begin or size != (end - begin) * 8 or (not size and _overflows(shape, bits)):
        return HeaderError.of_offsets(file, name, (begin, end), size, (dtype, shape))
    return _made((name, file, dtype, tuple(shape), data_start + begin, data_start + end))


_DTYPES = {dtype: (dtype, bits) for dtype, bits in DTYPE_BITS.items()}  # each name once in memory
_made = partial(tuple.__new__, TensorSpan)  # takes half the time; a large model has a hundred thousand tensors


def _overflows(shape: list[int], bits: int) -> bool:
    """Whether the other dimensions of an empty tensor multiply to more than the reference implementation can hold."""
    return 0 in shape and prod(dim or 1 for dim in shape) * bits >= 2**64


def _coverage_defects(file: File, size: int, data_start: int, spans: list[TensorSpan]) -> list[Fp8CheckpointError]:
    """Return the defects of coverage: spans that do not cover the data exactly."""
    defects: list[Fp8CheckpointError] = []
    end = data_start
    previous = "the header"
    for span in spans:
        name, _, _, _, start, stop = span
        if start != end:
            if len(defects) >= _MOST_DEFECTS:
                return [*defects, HeaderError.of_many(file=file, most=_MOST_DEFECTS)]
            defects.append(HeaderError.of_place(span, start, end, previous))
        end = max(end, stop)
        previous = name
    if size < end:
        defects.append(TruncatedFileError.of(file, size, end))
    elif size > end:
        defects.append(HeaderError.of_rest(file=file, rest=size - end, end=end))
    return defects
