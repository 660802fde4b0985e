"""The layout of an output file, against the bytes that the safetensors library writes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.output.layout import FileLayout, TensorSpec, index_of, lay_out
from fp8ckpt.stores.local import local_file
from fp8ckpt.stores.memory import PLANNED
from fp8ckpt.stores.store import File
from fp8ckpt.tensors.header import read_header
from fp8ckpt.tensors.reading import torch_dtype
from fp8ckpt.tensors.stored import DTYPE_BITS, tensor_nbytes
from tests.support import examples

# Every dtype that torch can hold and the library can write from torch.
_WRITABLE = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0)


def tensor_of(spec: TensorSpec, seed: int) -> torch.Tensor:
    """Any bytes as a tensor; no byte of a bool is neither 0 nor 1."""
    raw = np.random.default_rng(seed).integers(
        0, 2 if spec.dtype == "BOOL" else 256, tensor_nbytes(spec.dtype, spec.shape), np.uint8
    )
    if not raw.size:
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    return torch.from_numpy(raw).view(torch_dtype(spec.dtype)).reshape(spec.shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def written(layout: FileLayout, tensors: dict[str, torch.Tensor]) -> bytes:
    """The file that the layout describes, each tensor at its own offset."""
    raw = bytearray(layout.size)
    raw[: len(layout.head)] = layout.head
    for span in layout.spans:
        raw[span.start : span.stop] = bytes_of(tensors[span.name])
    return bytes(raw)


def check(specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    tensors = {spec.name: tensor_of(spec, i) for i, spec in enumerate(specs)}
    layout = lay_out("model.safetensors", specs, metadata)
    assert written(layout, tensors) == safetensors.torch.save(tensors, metadata or None)


def test_all_dtypes_in_one_file() -> None:
    """Tensors of every dtype go in the library's order, whatever order they come in."""
    specs = [TensorSpec(f"{i % 3}.{dtype}", dtype, (3, 5)) for i, dtype in enumerate(_WRITABLE)]
    check(specs, {"format": "pt"})
    check(specs[::-1], {"format": "pt"})


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"note": 'ü☃"\\\n\x7f'}])
def test_metadata(metadata: dict[str, str]) -> None:
    """No metadata, the usual one, and text that must be escaped."""
    check([TensorSpec("w", "BF16", (2,))], metadata)


@pytest.mark.parametrize("name", [
    "", " ", "a.b.weight", "é", "e\u0301", "\U0001f600", '"', "\\", "/", "\n\t\b\f\r", "\0\x01\x1f",
    "\x7f\x80\u2028\ufeff", "__metadata",
])  # fmt: skip
def test_odd_names(name: str) -> None:
    """Names are spelled in the header as the library spells them."""
    check([TensorSpec(name, "F32", (1,)), TensorSpec("w", "F32", (2,))], {})


def test_names_go_by_their_bytes() -> None:
    """Within a dtype, the order is that of the names' UTF-8 bytes, not of numbers or of case."""
    check([TensorSpec(name, "U8", (1,)) for name in ("a10", "a2", "A", "é", "z", "\uffff", "\U00010000")], {})


def test_scalars_and_empty_tensors() -> None:
    """A 0-d tensor takes one element; an empty one takes none, and has its place."""
    check(
        [
            TensorSpec("s", "BF16", ()),
            TensorSpec("e", "F32", (0,)),
            TensorSpec("f", "F32", (3, 0)),
            TensorSpec("c", "F8_E4M3", (3,)),
        ],
        {},
    )


def test_a_file_without_tensors() -> None:
    """Only a header."""
    check([], {})
    check([], {"format": "pt"})


_specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from(_WRITABLE),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


@examples(300)
@given(
    _specs,
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"), max_size=5), max_size=1
    ),
)
def test_equals_the_library_byte_for_byte(specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    """Any names, dtypes, shapes and (one entry of) metadata."""
    check(specs, metadata)


def test_more_metadata_is_sorted() -> None:
    """The library writes several entries in an order of chance; ours go by name, and nothing else differs."""
    layout = lay_out("f", [TensorSpec("w", "U8", (1,))], {"b": "2", "a": "1", "c": "3"})
    assert b'{"__metadata__":{"a":"1","b":"2","c":"3"},"w":' in layout.head


@examples(100)
@given(_specs)
def test_a_layout_reads_back_as_itself(tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec]) -> None:
    """Our own header reader finds the same spans, and no defect; data begins at a multiple of 8."""
    layout = lay_out("model.safetensors", specs, {"format": "pt"})
    file = tmp_path_factory.mktemp("layout") / layout.name
    file.write_bytes(layout.head + bytes(layout.size - len(layout.head)))
    header, defects = read_header(local_file(file))
    assert not defects
    assert header is not None
    assert sorted(header.spans, key=str) == sorted(
        (span._replace(file=local_file(file)) for span in layout.spans), key=str
    )
    assert header.metadata == {"format": "pt"}
    assert len(layout.head) % 8 == 0
    assert all(span.file == File(PLANNED, "model.safetensors") for span in layout.spans)


def test_packed_dtypes_are_laid_out() -> None:
    """Dtypes of less than a byte keep their size in bits."""
    layout = lay_out(
        "f", [TensorSpec("four", "F4", (3, 2)), TensorSpec("six", "F6_E3M2", (4,)), TensorSpec("b", "BOOL", (1,))], {}
    )
    assert [(span.name, span.nbytes) for span in layout.spans] == [("six", 3), ("four", 3), ("b", 1)]


def test_index_of_several_files() -> None:
    """The map of tensors to files and the bytes of all tensors; other metadata is kept."""
    first = lay_out(
        "model-00001-of-00002.safetensors",
        [TensorSpec("b", "BF16", (2, 3)), TensorSpec("a", "F32", ())],
        {"format": "pt"},
    )
    second = lay_out(
        "model-00002-of-00002.safetensors", [TensorSpec("c", "U8", (5,)), TensorSpec("e", "F32", (0,))], {}
    )
    index = index_of([first, second], {"total_size": 1, "note": "kept"})
    assert index == {
        "metadata": {"total_size": 12 + 4 + 5, "note": "kept"},
        "weight_map": {"a": first.name, "b": first.name, "c": second.name, "e": second.name},
    }


def test_index_counts_parameters_where_it_did() -> None:
    """``total_parameters`` is recomputed where there was one, and not invented."""
    layout = lay_out("f", [TensorSpec("a", "BF16", (2, 3)), TensorSpec("s", "F32", ())], {})
    assert index_of([layout], {"total_parameters": 99})["metadata"] == {"total_parameters": 7, "total_size": 16}
    assert index_of([layout], {})["metadata"] == {"total_size": 16}


def test_index_leaves_its_input_alone() -> None:
    """The metadata given is not changed, and layouts may come from a generator."""
    metadata: dict[str, object] = {"total_size": 1}
    layouts = (lay_out(f"f{i}", [TensorSpec(f"t{i}", "U8", (i,))], {}) for i in range(3))
    assert index_of(layouts, metadata) == {
        "metadata": {"total_size": 3},
        "weight_map": {"t0": "f0", "t1": "f1", "t2": "f2"},
    }
    assert metadata == {"total_size": 1}


@examples(100)
@given(st.sampled_from(list(DTYPE_BITS)), st.lists(st.integers(0, 50), max_size=4).map(tuple))
def test_tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> None:
    """Elements times bits, in bytes."""
    assert tensor_nbytes(dtype, shape) == math.prod(shape) * DTYPE_BITS[dtype] // 8
