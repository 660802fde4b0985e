"""Assemblies are what numpy does to arrays of whatever values, and what does not tile its tensor is found."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8ckpt.stores.memory import MemoryStore
from fp8ckpt.stores.store import ByteRange, File
from fp8ckpt.tensors.assembly import NEW, Assembly, Piece, composed, reversed_assemblies
from fp8ckpt.tensors.joined import JoinedTensor
from fp8ckpt.tensors.reading import load_dequantizer
from fp8ckpt.tensors.stored import TensorSpan
from fp8ckpt.tensors.tensor import Reader
from tests.support import examples

Pair = tuple[np.ndarray, Assembly]


def build(assembly: Assembly, sources: dict[str, np.ndarray]) -> np.ndarray:
    """The joined tensor, piece by piece; what no piece covers stays -1."""
    made = np.full(assembly.shape, -1, np.int64)
    for piece in assembly.pieces:
        offsets, sizes = piece.source_region
        part = sources[piece.source][tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        kept = [axis for axis in piece.axes if axis != NEW]
        part = part.transpose([*kept, *(a for a in range(part.ndim) if a not in kept)]).reshape(piece.sizes)
        made[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))] = part
    return made


def source(name: str, shape: tuple[int, ...], sources: dict[str, np.ndarray]) -> Pair:
    first = sum(array.size for array in sources.values())
    sources[name] = np.arange(first, first + int(np.prod(shape, dtype=int))).reshape(shape)
    return sources[name], Assembly.whole(name, shape)


@st.composite
def joined(draw: st.DrawFn) -> tuple[np.ndarray, Assembly, dict[str, np.ndarray]]:
    """A tensor made by some operations, by numpy and as an assembly."""
    sources: dict[str, np.ndarray] = {}
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    array, assembly = source("a", shape, sources)
    for step in range(draw(st.integers(0, 5))):
        kinds = ["stack", "concatenate", "transpose", "narrow", "chunk", "split axis", "merge axes"]
        kind = draw(st.sampled_from(kinds))
        axis = draw(st.integers(0, array.ndim - 1)) if array.ndim else 0
        if kind == "stack" and array.ndim < 4:
            other, made = source(f"s{step}", array.shape, sources)
            axis = draw(st.integers(-1, array.ndim))
            array, assembly = np.stack([array, other], axis), Assembly.stack([assembly, made], axis)
        elif kind == "concatenate":
            more = (*array.shape[:axis], draw(st.integers(1, 3)), *array.shape[axis + 1 :])
            other, made = source(f"c{step}", more, sources)
            array, assembly = np.concatenate([array, other], axis), Assembly.concatenate([assembly, made], axis)
        elif kind == "transpose" and array.ndim > 1:
            second = draw(st.integers(0, array.ndim - 1))
            array, assembly = array.swapaxes(axis, second), assembly.transpose(axis, second)
        elif kind == "narrow":
            start = draw(st.integers(0, array.shape[axis] - 1))
            size = draw(st.integers(1, array.shape[axis] - start))
            array = array[(slice(None),) * axis + (slice(start, start + size),)]
            assembly = assembly.narrow(axis, start, size)
        elif kind == "chunk":
            count = draw(st.integers(1, 3))
            size = -(-array.shape[axis] // count)
            array, assembly = (
                np.split(array, range(size, array.shape[axis], size), axis)[-1],
                assembly.chunk(count, axis)[-1],
            )
        elif kind == "split axis" and array.ndim < 4:
            rows = draw(st.sampled_from([n for n in range(1, array.shape[axis] + 1) if array.shape[axis] % n == 0]))
            shape = (*array.shape[:axis], rows, array.shape[axis] // rows, *array.shape[axis + 1 :])
            array, assembly = array.reshape(shape), assembly.reshape(shape)
        elif kind == "merge axes" and array.ndim > 1:
            axis = min(axis, array.ndim - 2)
            shape = (*array.shape[:axis], -1, *array.shape[axis + 2 :])
            array, assembly = array.reshape(shape), assembly.reshape(shape)
    return array, assembly, sources


@given(joined())
@examples(150)
def test_operations_are_those_of_arrays(made: tuple[np.ndarray, Assembly, dict[str, np.ndarray]]) -> None:
    """Stacked, concatenated, transposed, cut, reshaped, in any order: the same elements, and nothing is amiss."""
    array, assembly, sources = made
    assert assembly.shape == array.shape
    np.testing.assert_array_equal(build(assembly, sources), array)
    assert assembly.defect({name: of.shape for name, of in sources.items()}) is None


@given(joined(), st.data())
@examples(100)
def test_a_cut_is_the_region_and_nothing_else(
    made: tuple[np.ndarray, Assembly, dict[str, np.ndarray]], data: st.DataObject
) -> None:
    """The pieces of a region are that region of the tensor, each in coordinates of the whole."""
    array, assembly, sources = made
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    sizes = tuple(data.draw(st.integers(1, size - at)) for size, at in zip(array.shape, offsets, strict=True))
    inside = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
    expected = np.full(array.shape, -1)
    expected[inside] = array[inside]
    np.testing.assert_array_equal(
        build(Assembly(array.shape, tuple(assembly.cut((offsets, sizes)))), sources), expected
    )


@given(joined())
@examples(100)
def test_the_way_back_is_the_same_boxes(made: tuple[np.ndarray, Assembly, dict[str, np.ndarray]]) -> None:
    """Reversed, the sources are pieces of the joined tensor; the joined tensor through both is itself."""
    array, assembly, sources = made
    shapes = {name: of.shape for name, of in sources.items()}
    back = reversed_assemblies({"joined": assembly}, shapes)
    for name, made_back in back.items():
        found = build(made_back, {"joined": array})
        np.testing.assert_array_equal(found, np.where(np.isin(sources[name], array), sources[name], -1))
    np.testing.assert_array_equal(build(composed({"it": assembly}, back)["it"], {"joined": array}), array)


@given(joined(), st.data())
@examples(100)
def test_a_joined_tensor_gives_its_values(
    made: tuple[np.ndarray, Assembly, dict[str, np.ndarray]], data: st.DataObject
) -> None:
    """Any region, into any strides, and any run, through any scratch; `reads` says what is read."""
    array, assembly, arrays = made
    store = MemoryStore({name: of.astype(np.int32).tobytes() for name, of in arrays.items()})
    sources = {
        name: TensorSpan(name, File(store, name), "I32", of.shape, 0, of.size * 4) for name, of in arrays.items()
    }
    tensor = JoinedTensor("joined", assembly, sources)
    assert (tensor.shape, tensor.numel, tensor.dtype, tensor.dtypes()) == (array.shape, array.size, "I32", ("I32",))
    reader = Reader(data.draw(st.sampled_from([4, 12, 4096])), load_dequantizer)
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    sizes = tuple(data.draw(st.integers(1, size - at)) for size, at in zip(array.shape, offsets, strict=True))
    out = np.zeros(sizes[::-1], np.uint32).transpose() if data.draw(st.booleans()) else np.zeros(sizes, np.uint32)
    store.reads.clear()
    tensor.values((offsets, sizes), "I32", out, reader)
    np.testing.assert_array_equal(out, array[tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))])
    assert bytes_of(store.reads) == bytes_of(tensor.reads((offsets, sizes)))
    assert reader.bytes_read == out.nbytes
    start = data.draw(st.integers(0, array.size - 1))
    run = np.empty(4 * data.draw(st.integers(0, array.size - start)), np.uint8)
    tensor.elements(start, "I32", run, reader)
    np.testing.assert_array_equal(run.view(np.int32), array.reshape(-1)[start : start + run.size // 4])


def bytes_of(reads: Iterable[ByteRange]) -> list[tuple[str, int]]:
    """Each byte that is read, by file and place."""
    return sorted((file, at) for file, start, stop in reads for at in range(start, stop))


DEFECTS = {
    "a gap": ((2, 3), [((0, 0), (0, 0), (1, 3))], "cover"),
    "an overlap": ((2, 3), [((0, 0), (0, 0), (2, 3)), ((0, 0), (1, 1), (1, 1))], "overlap"),
    "an overlap that hides a gap": ((2, 3), [((0, 0), (0, 0), (1, 3)), ((0, 0), (0, 0), (1, 3))], "overlap"),
    "outside the source": ((2, 3), [((1, 0), (0, 0), (2, 3))], "has shape (2, 3)"),
    "before the source": ((2, 3), [((0, -1), (0, 0), (2, 3))], "has shape (2, 3)"),
    "outside the tensor": ((2, 3), [((0, 0), (0, 1), (2, 3))], "cover"),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_what_does_not_tile_is_found(case: str) -> None:
    """Gaps, overlaps and boxes outside are told; so is a source that is not there."""
    shape, boxes, text = DEFECTS[case]
    pieces = tuple(Piece("a", at, offsets, sizes, (0, 1)) for at, offsets, sizes in boxes)
    assert text in (Assembly(shape, pieces).defect({"a": (2, 3)}) or "")
    assert "not there" in (Assembly(shape, pieces).defect({}) or "")


def test_what_does_not_fit_together_is_refused() -> None:
    """Stacking other shapes, merging to another number of elements."""
    a, b = Assembly.whole("a", (2, 3)), Assembly.whole("b", (2, 4))
    with pytest.raises(ValueError, match="stacked"):
        Assembly.stack([a, b])
    with pytest.raises(ValueError, match="concatenated"):
        Assembly.concatenate([a, b], 0)
    with pytest.raises(ValueError, match="reshaped"):
        a.reshape((4, 2))
    with pytest.raises(ValueError, match="length 1"):
        a.squeeze(0)


def test_composing_stacks_looks_at_each_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at each of them for each of them."""
    experts = 200
    stack = Assembly.stack([Assembly.whole(str(i), (4, 8)) for i in range(experts)])
    wholes = {f"expert {i}": piece for i, piece in enumerate(stack.chunk(experts))}
    cuts, real = [], Piece.cut
    monkeypatch.setattr(Piece, "cut", lambda piece, region: (cuts.append(piece), real(piece, region))[1])
    back = {name: Assembly.whole("stack", (experts, 4, 8)).narrow(0, i, 1) for i, name in enumerate(wholes)}
    cuts.clear()
    assert composed(back, {"stack": stack}) == wholes
    assert len(cuts) <= 4 * experts
