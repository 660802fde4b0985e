"""Dequantization of any part of a weight, against the oracle, bit for bit."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fp8ckpt.numerics import dequantize as module
from fp8ckpt.numerics.codes import FP8_DTYPES, FP8_SCALES, SCALE_DTYPES
from fp8ckpt.numerics.dequantize import Dequantizer, bits_dtype
from fp8ckpt.numerics.geometry import BlockGrid, infer_grid
from tests.oracle import NUMPY, Stored, dequantize
from tests.support import examples

Shape = tuple[int, ...]
TARGETS = ("BF16", "F16", "F32")


def draw_scales(rng: np.random.Generator, dtype: str, shape: Shape) -> Stored:
    """Positive finite scales of every magnitude that the dtype has, subnormals included."""
    if dtype in ("U8", "F8_E8M0"):
        return Stored.codes(rng.integers(0, 255, shape, np.uint8), dtype)
    wide = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}[dtype]
    any_size = rng.integers(1, wide[1], shape, wide[0])
    usual = np.asarray(np.exp2(rng.uniform(-12, 4, shape)), np.float32).astype(NUMPY[dtype]).view(wide[0])
    chosen = np.where(rng.random(shape) < 0.3, any_size, usual).astype(wide[0])
    return Stored(dtype, shape, chosen.tobytes())


class Case:
    """A weight with scales, and what it dequantizes to."""

    def __init__(self, shape: Shape, block: Shape, code_dtype: str, scale_dtype: str, dtype: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.grid = BlockGrid(shape, block)
        self.codes = rng.integers(0, 256, shape, np.uint8)
        self.dtype = dtype
        self.commonest = code_dtype == "F8_E4M3"
        weight = Stored.codes(self.codes, code_dtype)
        scale = draw_scales(rng, scale_dtype, self.grid.shape)
        self.expected = np.frombuffer(dequantize(weight, scale, block, dtype), bits_dtype(dtype)).reshape(shape)
        stored = np.frombuffer(scale.data, SCALE_DTYPES[scale_dtype]).reshape(self.grid.shape)
        self.dequantizer = Dequantizer(self.grid, stored, scale_dtype, code_dtype, dtype)

    def empty(self, shape: Shape) -> np.ndarray:
        return np.full(shape, 0xABCD, bits_dtype(self.dtype))

    def check_flat(self, start: int, stop: int) -> None:
        out = self.empty((stop - start,))
        self.dequantizer.flat(self.codes.reshape(-1)[start:stop], start, out)
        np.testing.assert_array_equal(out, self.expected.reshape(-1)[start:stop])
        codes = self.codes.reshape(-1)[start:stop]
        assert self.dequantizer.gives(codes, start, out) == (self.commonest and self.dtype == "BF16")
        for at in {0, out.size // 2, out.size - 1} if out.size else ():
            out[at] ^= 1 << at % 16
            assert not self.dequantizer.gives(codes, start, out)
            out[at] ^= 1 << at % 16

    def check_region(self, offsets: Shape, sizes: Shape, out: np.ndarray | None = None) -> None:
        window = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        out = self.empty(sizes) if out is None else out
        self.dequantizer.region(np.ascontiguousarray(self.codes[window]), offsets, out)
        np.testing.assert_array_equal(out, self.expected[window])


_dims = {1: st.integers(1, 300), 2: st.integers(1, 40), 3: st.integers(1, 12)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.integers(1, 3).flatmap(lambda rank: st.tuples(*[_dims[rank]] * rank)))
    block = tuple(draw(st.one_of(st.integers(1, dim + 1), st.sampled_from([1, dim, 7, 16]))) for dim in shape)
    return Case(
        shape, block, draw(st.sampled_from(list(FP8_DTYPES))), draw(st.sampled_from(list(FP8_SCALES))),
        draw(st.sampled_from(TARGETS)), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


@examples(300)
@given(cases(), st.data())
def test_flat_equals_the_oracle(case: Case, data: st.DataObject) -> None:
    """Any run of elements in row-major order, started and stopped anywhere."""
    start = data.draw(st.integers(0, case.codes.size))
    stop = data.draw(st.integers(start, case.codes.size))
    case.check_flat(start, stop)
    case.check_flat(0, case.codes.size)


@examples(300)
@given(cases(), st.data())
def test_region_equals_the_oracle(case: Case, data: st.DataObject) -> None:
    """Any region, unaligned to the blocks, empty ones included."""
    offsets = tuple(data.draw(st.integers(0, dim)) for dim in case.codes.shape)
    sizes = tuple(
        data.draw(st.integers(0, dim - offset)) for dim, offset in zip(case.codes.shape, offsets, strict=True)
    )
    case.check_region(offsets, sizes)
    case.check_region((0,) * case.codes.ndim, case.codes.shape)


@examples(200)
@given(cases(), st.data())
def test_region_writes_into_any_strides(case: Case, data: st.DataObject) -> None:
    """Every second column, a transposed buffer, a reversed one: values land where the view says, nowhere else."""
    offsets = tuple(data.draw(st.integers(0, dim - 1)) for dim in case.codes.shape)
    sizes = tuple(
        data.draw(st.integers(1, dim - offset)) for dim, offset in zip(case.codes.shape, offsets, strict=True)
    )
    wide = case.empty((*sizes[:-1], 2 * sizes[-1]))
    case.check_region(offsets, sizes, wide[..., ::2])
    np.testing.assert_array_equal(wide[..., 1::2], 0xABCD)
    case.check_region(offsets, sizes, case.empty(sizes[::-1]).T)
    case.check_region(offsets, sizes, case.empty(sizes)[..., ::-1])


@examples(100)
@given(cases(), st.data())
def test_flat_writes_into_any_stride(case: Case, data: st.DataObject) -> None:
    """A strided output of `flat` is written in place."""
    start = data.draw(st.integers(0, case.codes.size))
    stop = data.draw(st.integers(start, case.codes.size))
    wide = case.empty((2 * (stop - start),))
    case.dequantizer.flat(case.codes.reshape(-1)[start:stop], start, wide[::2])
    np.testing.assert_array_equal(wide[::2], case.expected.reshape(-1)[start:stop])
    np.testing.assert_array_equal(wide[1::2], 0xABCD)


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("scale_dtype", FP8_SCALES)
@pytest.mark.parametrize("code_dtype", FP8_DTYPES)
def test_all_codes_with_every_scale_dtype_and_target(code_dtype: str, scale_dtype: str, dtype: str) -> None:
    """All 256 codes, under one scale a short row, a small block, a row that repays a table, and a tensor."""
    for shape, block in (((40, 256), (1, 256)), ((80, 128), (2, 128)), ((10, 1280), (1, 1280))):
        rng = np.random.default_rng(5)
        case = Case(shape, block, code_dtype, scale_dtype, dtype, 5)
        scale = draw_scales(rng, scale_dtype, case.grid.shape)
        codes = np.tile(np.arange(256, dtype=np.uint8), prod(shape) // 256).reshape(shape)
        expected = np.frombuffer(
            dequantize(Stored.codes(codes, code_dtype), scale, block, dtype), bits_dtype(dtype)
        ).reshape(shape)
        stored = np.frombuffer(scale.data, SCALE_DTYPES[scale_dtype])
        out = case.empty(shape)
        Dequantizer(case.grid, stored, scale_dtype, code_dtype, dtype).region(codes, (0, 0), out)
        np.testing.assert_array_equal(out, expected)
    one = draw_scales(np.random.default_rng(6), scale_dtype, ())
    codes = np.arange(256, dtype=np.uint8)
    expected = np.frombuffer(dequantize(Stored.codes(codes, code_dtype), one, (256,), dtype), bits_dtype(dtype))
    out = case.empty((256,))
    Dequantizer(
        BlockGrid((256,), (256,)), np.frombuffer(one.data, SCALE_DTYPES[scale_dtype]), scale_dtype, code_dtype, dtype
    ).flat(codes, 0, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F16", "U8"])
@pytest.mark.parametrize("dtype", TARGETS)
def test_every_scale_of_a_small_dtype(scale_dtype: str, dtype: str) -> None:
    """All positive finite scales of a dtype, each under codes of every magnitude."""
    last = {"BF16": 0x7F80, "F16": 0x7C00, "U8": 255}[scale_dtype]
    patterns = np.arange(0 if scale_dtype == "U8" else 1, last, dtype=np.uint8 if scale_dtype == "U8" else np.uint16)
    row = np.array([0x00, 0x80, 0x01, 0x81, 0x07, 0x08, 0x39, 0xC5, 0x7E, 0x7F, 0xFF], np.uint8)
    codes = np.tile(row, (patterns.size, 1))
    scale = Stored(scale_dtype, (patterns.size, 1), patterns.tobytes())
    expected = np.frombuffer(dequantize(Stored.codes(codes), scale, (1, row.size), dtype), bits_dtype(dtype))
    out = np.empty(codes.size, bits_dtype(dtype))
    stored = patterns.view(SCALE_DTYPES[scale_dtype])
    Dequantizer(BlockGrid(codes.shape, (1, row.size)), stored, scale_dtype, "F8_E4M3", dtype).flat(
        codes.reshape(-1), 0, out
    )
    np.testing.assert_array_equal(out, expected)


class Calls:
    """Counts which kernels run, and runs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        counted = SimpleNamespace(**vars(module.kernels))  # the loops themselves call each other, as they are compiled
        for name in ("look_up", "look_up_blocks", "multiply_blocks", "multiply_e4m3_to_bf16"):
            setattr(counted, name, self._counting(name, getattr(module.kernels, name)))
        monkeypatch.setattr(module, "kernels", counted)

    def _counting(self, name: str, kernel: Any) -> Any:
        def run(*arguments: Any) -> None:
            self.seen.append(name)
            kernel(*arguments)

        return run


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(("shape", "block", "scale_dtype", "kernel"), [
    ((64, 64), (64, 64), "BF16", "look_up"),
    ((64, 64), (64, 64), "U8", "look_up"),
    ((300, 200), (128, 128), "F32", "look_up_blocks"),
    ((5, 3000), (1, 3000), "BF16", "look_up_blocks"),
    ((24, 100), (1, 32), "U8", "look_up_blocks"),
    ((24, 100), (1, 32), "F8_E8M0", "look_up_blocks"),
    ((24, 100), (1, 32), "F32", "multiply_blocks"),
    ((40, 24), (1, 24), "F16", "multiply_blocks"),
])  # fmt: skip
def test_which_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, block: Shape, scale_dtype: str, kernel: str, dtype: str
) -> None:
    """Large blocks and exponents are looked up, small blocks and the commonest codes multiplied, with equal bits."""
    if dtype == "BF16":
        kernel = "multiply_e4m3_to_bf16"
    calls = Calls(monkeypatch)
    case = Case(shape, block, "F8_E4M3", scale_dtype, dtype, 11)
    case.check_flat(0, case.codes.size)
    assert set(calls.seen) == {kernel}


@pytest.mark.parametrize("block", [(16, 128), (2, 32), (20, 8000)])
def test_rows_longer_than_the_scratch(block: Shape) -> None:
    """What is worked on at once may begin and end in any block of a row."""
    case = Case((20, 9000), block, "F8_E4M3", "F32", "BF16", 7)
    case.check_flat(0, case.codes.size)
    case.check_flat(4099, case.codes.size - 29)
    case.check_region((3, 70), (9, 8800))


@pytest.mark.parametrize("dtype", TARGETS)
def test_both_ways_give_equal_bits(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The same tensor through tables only, then through products only."""
    calls = Calls(monkeypatch)
    for threshold, kernel in ((0, "look_up_blocks"), (1 << 60, "multiply_blocks")):
        monkeypatch.setattr(module, "_LEAST_ELEMENTS_PER_TABLE", threshold)
        for code_dtype in FP8_DTYPES:
            case = Case((70, 90), (16, 24), code_dtype, "F32", dtype, 3)
            case.check_flat(0, case.codes.size)
            case.check_flat(13, case.codes.size - 29)
            case.check_region((5, 7), (60, 71))
        assert set(calls.seen) == {kernel, *(["multiply_e4m3_to_bf16"] if dtype == "BF16" else [])}
        calls.seen.clear()


@examples(15)
@given(st.sampled_from(list(FP8_DTYPES)), st.sampled_from(["F32", "BF16", "F16"]), st.sampled_from(TARGETS), st.data())
@example("F8_E4M3", "F32", "BF16", None)
def test_large_blocks_at_any_phase(code_dtype: str, scale_dtype: str, dtype: str, data: st.DataObject | None) -> None:
    """Blocks big enough for tables, entered at every kind of phase."""
    case = Case((3, 200, 300), (1, 128, 128), code_dtype, scale_dtype, dtype, 17)
    offsets = tuple(data.draw(st.integers(0, dim - 1)) for dim in case.codes.shape) if data else (1, 127, 129)
    sizes = (
        tuple(data.draw(st.integers(1, dim - o)) for dim, o in zip(case.codes.shape, offsets, strict=True))
        if data
        else (2, 73, 171)
    )
    case.check_region(offsets, sizes)
    start = int(np.ravel_multi_index(offsets, case.codes.shape))
    case.check_flat(start, case.codes.size)


def test_zero_dimensional_weights() -> None:
    """A weight of one element and no dimension."""
    case = Case((), (), "F8_E4M3", "BF16", "BF16", 0)
    case.check_flat(0, 1)
    case.check_region((), ())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 2, 3, 4, 5)])
@pytest.mark.parametrize("scale_dtype", ["F32", "U8"])
def test_weights_of_more_dimensions(shape: Shape, scale_dtype: str) -> None:
    """Four and five dimensions, with blocks in all of them."""
    case = Case(shape, (1, 2, 2, 3, 2)[-len(shape) :], "F8_E4M3", scale_dtype, "BF16", 8)
    for start in range(0, case.codes.size, 7):
        case.check_flat(start, case.codes.size)
    case.check_region((1,) * len(shape), tuple(dim - 1 for dim in shape))


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("scale_dtype", FP8_SCALES)
def test_scales_of_any_shape_are_taken(scale_shape: Shape, scale_dtype: str) -> None:
    """Scales come "in any shape with one element a block": 0-d ones too, of every dtype."""
    stored = np.full(
        scale_shape,
        {"F32": 0x3F800000, "BF16": 0x3F80, "F16": 1, "U8": 127, "F8_E8M0": 127}[scale_dtype],
        SCALE_DTYPES[scale_dtype],
    )
    dequantizer = Dequantizer(BlockGrid((2, 2), (2, 2)), stored, scale_dtype, "F8_E4M3", "F32")
    out = np.empty(4, np.uint32)
    dequantizer.flat(np.full(4, 0x38, np.uint8), 0, out)
    assert out.view(np.float32).tolist() == [1.0] * 4
    assert dequantizer.scales.tolist() == [[1.0]]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 4, 4)])
def test_a_weight_without_elements(shape: Shape) -> None:
    """Its grid comes from the inference rule, its one scale is taken, and nothing is written."""
    grid = infer_grid(shape, (), None)
    assert grid is not None
    dequantizer = Dequantizer(grid, np.ones(1, np.uint16), "BF16", "F8_E4M3", "BF16")
    out = np.empty(shape, np.uint16)
    dequantizer.region(np.empty(shape, np.uint8), (0,) * len(shape), out)
    dequantizer.flat(np.empty(0, np.uint8), 0, out.reshape(-1))


@pytest.mark.parametrize("shape", [(4,), (2, 2), (2, 1, 2, 1)])
def test_scales_are_given_in_the_shape_of_the_grid(shape: Shape) -> None:
    """As float32, whatever the shape that they are stored in."""
    stored = np.float32([1, 3, 2.5, 0.5]).view(np.uint32).reshape(shape)
    dequantizer = Dequantizer(BlockGrid((4, 4), (2, 2)), stored, "F32", "F8_E4M3", "BF16")
    assert dequantizer.scales.tolist() == [[1, 3], [2.5, 0.5]]
    assert dequantizer.scales.dtype == np.float32


def test_a_dequantizer_is_shared_by_threads() -> None:
    """Threads that dequantize parts of one tensor at once get the bits of one that does it alone."""
    from concurrent.futures import ThreadPoolExecutor

    case = Case((300, 400), (128, 128), "F8_E4M3", "F32", "BF16", 4)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: case.check_flat(i * 997, case.codes.size - i * 31), range(100)))


def test_the_commonest_kernel_for_every_code_and_scale() -> None:
    """All codes under every positive finite BF16 scale, and float32 scales of every magnitude, subnormals included."""
    codes = np.tile(np.arange(256, dtype=np.uint8), 20)[
        np.newaxis
    ]  # more than its scratch holds, and no multiple of it
    every = (np.arange(1, 0x7F80, dtype=np.uint32) << 16).view(np.float32)
    rng = np.random.default_rng(5)
    fine = rng.integers(1, 0x7F800000, 2000, np.uint32).view(np.float32)
    out = np.empty(codes.shape, np.uint16)
    for scale in np.concatenate((every[::7], fine)):
        module.kernels.multiply_e4m3_to_bf16(codes, scale.reshape(1, 1), 0, 0, 1, codes.size, out)
        expected = np.frombuffer(
            dequantize(Stored.codes(codes[0, :256]), Stored.of(scale.reshape(1), "F32"), (256,), "BF16"), np.uint16
        )
        assert np.array_equal(out.reshape(-1, 256), np.broadcast_to(expected, (20, 256))), scale
