"""Safetensors headers: what is valid is understood as the safetensors library understands it; all else has a name."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.errors import ConfigError, Fp8CheckpointError, HeaderError, StorageError, TruncatedFileError
from fp8ckpt.stores.local import local_file
from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.header import Header, parse_json, read_header
from fp8ckpt.tensors.stored import DTYPE_BITS, TensorSpan, tensor_nbytes
from tests.oracle import Stored, write_safetensors
from tests.support import examples

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WORD = b"abcd"


def frame(text: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header and data."""
    if isinstance(text, dict):
        text = json.dumps(text)
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read(tmp_path: Path, raw: bytes) -> tuple[Header | None, list[Fp8CheckpointError]]:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    header, defects = read_header(local_file(file))
    for defect in defects:
        assert isinstance(defect, Fp8CheckpointError)
        assert "\n" not in str(defect)
        assert defect.file == "model.safetensors"
        assert len(str(defect)) < 2000
    assert header is not None or defects
    return header, defects


def library(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes as the safetensors library gives them."""
    with safetensors.safe_open(file, "np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}


def agrees(file: Path, header: Header) -> None:
    """The library accepts the file, and sees in it what the header says."""
    assert library(file) == {span.name: (span.dtype, list(span.shape)) for span in header.spans}
    size = file.stat().st_size
    for span in header.spans:
        assert 8 <= span.start <= span.stop <= size
        assert span.nbytes == tensor_nbytes(span.dtype, span.shape)


TENSORS = {
    "model.norm.weight": Stored("BF16", (3,), b"abcdef"),
    "scalar": Stored("F32", (), b"abcd"),
    "empty": Stored("F16", (0, 7), b""),
    "codes": Stored("F8_E4M3", (2, 3), b"abcdef"),
    'an odd näme ☃ " \\ \n': Stored("U8", (1,), b"a"),
    "": Stored("BOOL", (2,), b"\0\1"),
    "packed": Stored("F4", (2, 3), b"abc"),
    "six": Stored("F6_E2M3", (4,), b"abc"),
}


def test_a_valid_file(tmp_path: Path) -> None:
    """Names, dtypes, shapes, positions and metadata come out as they went in."""
    file = tmp_path / "model.safetensors"
    write_safetensors(file, TENSORS, {"format": "pt", "note": "ü"})
    header, defects = read_header(local_file(file))
    assert not defects
    assert header is not None
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.size == file.stat().st_size
    assert {span.name for span in header.spans} == set(TENSORS)
    raw = file.read_bytes()
    for span in header.spans:
        stored = TENSORS[span.name]
        assert (span.dtype, span.shape, raw[span.start : span.stop]) == tuple(stored)
        assert span.file == local_file(file)
    assert [span.start for span in header.spans] == sorted(span.start for span in header.spans)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_agrees_with_the_library(tmp_path: Path, dtype: str) -> None:
    """All dtypes of safetensors 0.8, with its own sizes."""
    shape = (4, 2)
    data = bytes(tensor_nbytes(dtype, shape))
    file = tmp_path / "model.safetensors"
    file.write_bytes(frame({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}, data))
    header, defects = read_header(local_file(file))
    assert not defects
    assert header is not None
    with safetensors.safe_open(file, "pt") as opened:
        assert list(opened.keys()) == ["a"]
        if DTYPE_BITS[dtype] >= 8:
            assert opened.get_slice("a").get_dtype() == dtype


def test_span_properties() -> None:
    """Bytes and elements of a span."""
    span = TensorSpan("a", File(PLANNED, "f"), "BF16", (2, 3), 100, 112)
    assert (span.nbytes, span.numel) == (12, 6)
    assert TensorSpan("a", File(PLANNED, "f"), "F32", (), 8, 12).numel == 1


@pytest.mark.parametrize("text", ["{}", "{}   ", '{"__metadata__":{}}', ' \n{"__metadata__":{"a":"b"}}\t'])
def test_a_file_without_tensors_is_valid(tmp_path: Path, text: str) -> None:
    """An empty header, padded or not, is no defect."""
    header, defects = read(tmp_path, frame(text))
    assert not defects
    assert header is not None
    assert header.spans == ()


NO_JSON: tuple[str | bytes, ...] = (
    b"", "{", "{} x", b"\xff\xfe\xfa", '{"\\ud800": 1}', '{"a": "\\udfff"}', "[" * 100_000, '{"a":' * 100_000,
    '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", '{"a":' + "9" * 10_000 + "}",
)  # fmt: skip
USELESS: list[tuple[bytes, type[HeaderError], str]] = [
    (b"", TruncatedFileError, "holds 0 bytes"),
    (b"\x02\0\0\0\0\0\0", TruncatedFileError, "holds 7 bytes"),
    (frame(b"{}", length=3), TruncatedFileError, "claims 3 bytes"),
    (frame(b"{}", length=100_000_000), TruncatedFileError, "claims 100000000 bytes"),
    (frame(b"{}", length=100_000_001), HeaderError, "claims 100000001 bytes"),
    (frame(b"{}", length=2**64 - 1), HeaderError, "claims 18446744073709551615 bytes"),
    *((frame(text), HeaderError, "not valid JSON") for text in NO_JSON),
    *(
        (frame(text), HeaderError, f"the JSON is a {of}")
        for text, of in (("[]", "list"), ("null", "NoneType"), ("7", "int"))
    ),
    *((frame(f'{{"a": {text}}}'), HeaderError, f"{text} is not JSON") for text in ("NaN", "Infinity")),
]


@pytest.mark.parametrize(("raw", "kind", "words"), USELESS, ids=range(len(USELESS)))
def test_nothing_in_it_can_be_used(tmp_path: Path, raw: bytes, kind: type[HeaderError], words: str) -> None:
    """Truncated files, lying lengths and what is no JSON object: one defect, no header."""
    header, defects = read(tmp_path, raw)
    assert header is None
    assert [type(defect) for defect in defects] == [kind]
    assert words in str(defects[0])
    assert defects[0].remedy


BROKEN: dict[str, Any] = {
    **{f"no {key}": {k: v for k, v in ENTRY.items() if k != key} for key in ENTRY},
    **{f"entry {value!r}": value for value in (None, [], "F32", 5)},
    **{f"dtype {value!r}": {**ENTRY, "dtype": value} for value in (5, ["F32"], None)},
    **{f"shape {value!r}": {**ENTRY, "shape": value} for value in (1, {"0": 1}, "1", None)},
    **{f"dim {value!r}": {**ENTRY, "shape": [value]} for value in (1.0, True, "1", None, [1], -1, 2**70, 2**63)},
    "dims negative": {**ENTRY, "shape": [-1, -1]},
    **{f"many dims {value}": {**ENTRY, "shape": [value] * 1000} for value in (1, 2**62, 0)},
    **{f"offsets {value!r}": {**ENTRY, "data_offsets": value}
       for value in ([0, 4.0], [False, 4], [None, 4], [4], [0, 4, 8], "04", {"a": 0, "b": 4}, 4)},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_entry_is_named(tmp_path: Path, name: str) -> None:
    """An entry whose types are wrong is named, and the sound tensors beside it are kept."""
    sound = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}
    header, defects = read(tmp_path, frame({"bad.weight": BROKEN[name], "sound": sound}, WORD * 2))
    assert header is not None
    assert [span.name for span in header.spans] == ["sound"]
    assert [type(defect) for defect in defects] == [HeaderError]
    assert defects[0].tensor == "bad.weight"
    assert "malformed" in defects[0].found


@pytest.mark.parametrize("dtype", ["F8", "f32", "FLOAT", "", "F8_E3M4", "I128", "\ud83d\ude00"])
def test_an_unknown_dtype_is_named(tmp_path: Path, dtype: str) -> None:
    _, defects = read(tmp_path, frame({"w": {**ENTRY, "dtype": dtype}}, WORD))
    assert [type(defect) for defect in defects] == [HeaderError]
    assert "unknown dtype" in defects[0].found
    assert "F8_E4M3" in (defects[0].expected or "")
    assert defects[0].tensor == "w"


@pytest.mark.parametrize("change", [
    *({"shape": shape} for shape in ([2], [0], [2**62, 2**62], [2**63 - 1] * 64)),
    {"dtype": "F64"},
    *({"data_offsets": offsets} for offsets in ([0, 3], [4, 0], [-4, 0], [0, 2**70], [2**70, 2**70 + 5])),
    {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},  # half a byte over
    {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]},
    {"dtype": "F6_E2M3", "shape": [1], "data_offsets": [0, 1]},
])  # fmt: skip
def test_offsets_that_do_not_hold_the_shape(tmp_path: Path, change: dict[str, Any]) -> None:
    """The offsets must hold exactly what dtype and shape take."""
    entry = {**ENTRY, **change}
    _, defects = read(tmp_path, frame({"w": entry}, WORD))
    assert [type(defect) for defect in defects] == [HeaderError]
    assert "data_offsets" in defects[0].found
    assert f"bytes for {entry['dtype']} (" in (defects[0].expected or "").replace("[", "(")


def entries(*spans: tuple[int, int]) -> dict[str, Any]:
    each = ({"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]} for start, stop in spans)
    return {f"t{i}": entry for i, entry in enumerate(each)}


@pytest.mark.parametrize(("spans", "size", "kind", "tensor", "words"), [
    ([(0, 4), (2, 6)], 6, HeaderError, "t1", "overlaps t0"),
    ([(0, 4), (0, 4)], 4, HeaderError, "t1", "overlaps t0"),
    ([(0, 4), (6, 8)], 8, HeaderError, "t1", "hole of 2 bytes after t0"),
    ([(2, 4)], 4, HeaderError, "t0", "hole of 2 bytes after the header"),
    ([(0, 4)], 3, TruncatedFileError, None, "the file holds"),
    ([(0, 4)], 0, TruncatedFileError, None, "the file holds"),
    ([(0, 2**40)], 4, TruncatedFileError, None, "the file holds"),
    ([(0, 4)], 5, HeaderError, None, "1 bytes follow the last tensor"),
    ([], 1, HeaderError, None, "1 bytes follow the last tensor"),
    ([(2**61, 2**61 + 4)], 4, HeaderError, "t0", "hole"),
])  # fmt: skip
def test_data_is_covered_exactly(
    tmp_path: Path, spans: list[tuple[int, int]], size: int, kind: type[HeaderError], tensor: str | None, words: str
) -> None:
    """Overlaps, holes, a short file and bytes left over."""
    _, defects = read(tmp_path, frame(entries(*spans), bytes(size)))
    assert type(defects[0]) is kind
    assert defects[0].tensor == tensor
    assert words in defects[0].found


def test_every_defect_is_listed(tmp_path: Path) -> None:
    """Not the first defect only."""
    header = {"a": 1, "b": {**ENTRY, "dtype": "X"}, "c": {**ENTRY, "shape": [9]}, "d": ENTRY, "__metadata__": {"k": 1}}
    _, defects = read(tmp_path, frame(header, WORD))
    assert [defect.tensor for defect in defects] == [None, "a", "b", "c"]
    _, defects = read(tmp_path, frame(entries((0, 4), (2, 6), (8, 9)), bytes(3)))
    assert len(defects) == 3


@pytest.mark.parametrize("metadata", [1, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}, True])
def test_metadata_maps_text_to_text(tmp_path: Path, metadata: object) -> None:
    """Anything else in ``__metadata__`` is a defect, and the tensors are kept."""
    header, defects = read(tmp_path, frame({"__metadata__": metadata, "w": ENTRY}, WORD))
    assert header is not None
    assert [span.name for span in header.spans] == ["w"]
    assert [type(defect) for defect in defects] == [HeaderError]
    assert "__metadata__" in defects[0].found


@pytest.mark.parametrize("text", [
    '{"w": %s, "w": %s}',
    '{"w": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "v": %s}',
    '{"__metadata__": {"k": "1", "k": "2"}, "w": %s}',
    '{"__metadata__": {}, "__metadata__": {}, "w": %s}',
    '{"w": %s, "\\u0077": %s}',
    '{"w": %s, "w": %s, "v": 1}',
    '{"w": {"dtype": ":F32", "dtype": "F32", "shape": [{"a": 1, "a": 1}], "data_offsets": [0, 4]}}',
])  # fmt: skip
def test_duplicate_keys_are_refused(tmp_path: Path, text: str) -> None:
    """No object of the header may have a key twice, however it is spelled."""
    text = text.replace("%s", json.dumps(ENTRY))
    for written in (text, text.replace(" ", "")):  # as people write, and as writers do
        header, defects = read(tmp_path, frame(written, WORD))
        assert header is None
        assert [type(defect) for defect in defects] == [HeaderError]
        assert "twice" in defects[0].found


LONG: tuple[dict[str, Any], ...] = tuple(
    {name: {**ENTRY, "dtype": "X"}} for name in ("a\nfp8ckpt: all is well", "\x1b[2J", "\u2028", "x" * 5_000_000)
)


@pytest.mark.parametrize("header", [*LONG, {"w": {**ENTRY, "shape": ["\n" * 2_000_000]}}], ids=range(5))
def test_a_defect_is_one_short_line(tmp_path: Path, header: dict[str, Any]) -> None:
    """Where a name is of control characters, or a name or an entry of megabytes."""
    _, [defect] = read(tmp_path, frame(header))
    assert str(defect).isprintable()
    assert len(str(defect)) < 1000


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    """No such file, a directory, and a broken link are a StorageError."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "directory").mkdir()
    for name in ("absent", "link", "directory"):
        header, defects = read_header(local_file(tmp_path / name))
        assert header is None
        assert [type(defect) for defect in defects] == [StorageError]
        assert defects[0].file == name


def test_a_sparse_terabyte_costs_nothing(tmp_path: Path) -> None:
    """Only the header is read, whatever the size of the data."""
    size = 1 << 40
    file = tmp_path / "model.safetensors"
    head = frame({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    file.write_bytes(head)
    os.truncate(file, len(head) + size)
    header, defects = read_header(local_file(file))
    assert not defects
    assert header is not None
    assert header.spans[0].stop == len(head) + size


def test_a_claimed_length_allocates_nothing(tmp_path: Path) -> None:
    """A header that claims 100 MB in a file of 10 bytes takes no memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        read(tmp_path, frame(b"{}", length=100_000_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_parse_json_raises_the_kind_asked_for(tmp_path: Path) -> None:
    """The same parser serves other files, with their own error."""
    with pytest.raises(ConfigError, match="not valid JSON"):
        parse_json(b"{", tmp_path / "x.json", ConfigError)
    assert parse_json(b'{"a": [1, {"b": null}]}', tmp_path / "x.json", ConfigError) == {"a": [1, {"b": None}]}


# What the safetensors library refuses, we refuse too: a file that we call sound must load elsewhere.

_REFUSED_BY_THE_LIBRARY = {
    "utf-16": (json.dumps({"w": ENTRY}).encode("utf-16"), WORD),
    "utf-16 without a mark": (json.dumps({"w": ENTRY}).encode("utf-16-le"), WORD),
    "utf-32": (json.dumps({"w": ENTRY}).encode("utf-32"), WORD),
    "byte order mark": (json.dumps({"w": ENTRY}).encode("utf-8-sig"), WORD),
    "encoded surrogate": (b'{"w\xed\xa0\x80":' + json.dumps(ENTRY).encode() + b"}", WORD),
    "minus zero": (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', WORD),
    "minus zero dimension": (b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
    "product beyond 64 bits, times zero":
        (json.dumps({"w": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}).encode(), b""),
    "a number out of range beside the entry's own":
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e999}}', WORD),
    "nesting beside the entry's own":
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b"[" * 200 + b"]" * 200 + b"}}", WORD),
}  # fmt: skip


@pytest.mark.parametrize("name", _REFUSED_BY_THE_LIBRARY)
def test_what_the_library_refuses_is_refused(tmp_path: Path, name: str) -> None:
    """Encodings, numbers and nesting that its parser does not take."""
    raw = frame(*_REFUSED_BY_THE_LIBRARY[name])
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    with pytest.raises(safetensors.SafetensorError):
        library(file)
    _, defects = read(tmp_path, raw)
    assert defects


def check(tmp_path: Path, raw: bytes) -> None:
    """Only named errors come out, on one line; what has no defect, the library reads alike."""
    header, defects = read(tmp_path, raw)
    assert all(str(defect).isprintable() for defect in defects)
    if not defects:
        assert header is not None
        agrees(tmp_path / "model.safetensors", header)


@examples(300)
@given(raw=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_fuzz_arbitrary_bytes(tmp_path: Path, raw: bytes, length: int | None) -> None:
    """Any bytes as a file, and any bytes as a header under a true or a false length."""
    check(tmp_path, raw)
    check(tmp_path, frame(raw, length=length))


_numbers = st.one_of(
    st.integers(0, 8),
    st.integers(-(2**70), 2**70),
    st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 - 1, 2**70, 10**400]),
    st.floats(),
    st.booleans(),
)
_ODD = ["w", "__metadata__", "", "\0", "a\nb", "\ud800", "weight_scale", "dtype"]
_names = st.text(max_size=6) | st.sampled_from(_ODD)
_json = st.recursive(
    st.none() | _numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_names, inner, max_size=4),
    max_leaves=12,
)
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F8", "?"]) | _json,
        "shape": st.lists(st.integers(0, 4), max_size=4) | st.lists(_numbers, max_size=4) | _json,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | st.lists(_numbers, max_size=3) | _json,
    },
    optional={"x": _json},
)


@examples(400)
@given(header=st.dictionaries(_names, _entries | _json, max_size=4), data=st.binary(max_size=16))
def test_fuzz_json(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    """Any JSON shaped nearly like a header: huge, negative, fractional and boolean numbers, surrogates, odd names."""
    check(tmp_path, frame(json.dumps(header), data))


@st.composite
def _valid(draw: st.DrawFn) -> bytes:
    """A sound file of a few tensors, which mutations start from."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), unique=True, max_size=4)):
        dtype = draw(st.sampled_from([dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + tensor_nbytes(dtype, tuple(shape))
        if name != "__metadata__":
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        else:
            end = start
    return frame(json.dumps(header, ensure_ascii=draw(st.booleans())), bytes(end))


@examples(200)
@given(raw=_valid())
def test_sound_files_have_no_defect(tmp_path: Path, raw: bytes) -> None:
    """What the format allows is accepted, and agrees with the library."""
    header, defects = read(tmp_path, raw)
    assert not defects
    assert header is not None
    agrees(tmp_path / "model.safetensors", header)


_SNIPPETS = [
    b"", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u", b"\\ud800", b"\\ud83d\\ude00", b"-", b"-0", b"0", b"00",
    b"1e5", b"1.0", b"1e999", b"true", b"null", b"NaN", b"-Infinity", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\0", b"\n", b" ", b"18446744073709551616", b"-1", b"4611686018427387904", b'"__metadata__"', b"F8_E8M0", b"I64",
    b"[" * 150, b"]" * 150, b',"x":1', b'"dtype":"F32",', b"1," * 70,
]  # fmt: skip


@examples(600)
@given(raw=_valid(), data=st.data())
def test_fuzz_mutated_headers(tmp_path: Path, raw: bytes, data: st.DataObject) -> None:
    """Bytes of a sound file flipped, inserted, deleted and replaced, with the length kept true or not."""
    text = bytearray(raw)
    grown = 0
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        taken = data.draw(st.integers(0, 4))
        snippet = data.draw(st.sampled_from(_SNIPPETS) | st.binary(max_size=3))
        before = len(text)
        text[at : at + taken] = snippet
        grown += len(text) - before
    if data.draw(st.booleans()) and len(text) >= 8:
        length = int.from_bytes(raw[:8], "little") + grown
        text[:8] = max(length, 0).to_bytes(8, "little")
    check(tmp_path, bytes(text))


@examples(300)
@given(raw=_valid(), number=_numbers, data=st.data())
def test_fuzz_replaced_numbers(tmp_path: Path, raw: bytes, number: object, data: st.DataObject) -> None:
    """One dimension or offset of a sound header becomes any other number."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    places = [(n, key, i) for n in entries for key in ("shape", "data_offsets") for i in range(len(entries[n][key]))]
    if places:
        name, key, i = data.draw(st.sampled_from(places))
        header[name][key][i] = number
    check(tmp_path, frame(json.dumps(header), raw[8 + length :]))


@pytest.mark.parametrize("depth", [1, 100, 127, 128, 900, 990, 1000, 1100, 3000, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize(
    "where",
    ['{"w": %s}', '{"w": {"dtype": %s}}', '{"\\u0077": %s}', '{"__metadata__": {"a": %s}}', '{"w": {"shape": [%s]}}'],
)
def test_nesting_at_any_depth(tmp_path: Path, where: str, opening: str, depth: int) -> None:
    """Nesting near and beyond the limit of recursion is a defect, never a crash."""
    nested = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    _, defects = read(tmp_path, frame(where.replace("%s", nested)))
    assert defects
