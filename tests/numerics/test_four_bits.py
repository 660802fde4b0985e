"""Codes of four bits, against the oracle and against the libraries that write them, bit for bit: MXFP4 (groups of 32,
exponents) and NVFP4 (groups of 16, e4m3, and a factor of the tensor that multiplies or divides).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, quantize_and_pack_fp4, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fp8ckpt.numerics.codes import F4, SCALE_DTYPES, Factor, scale_values
from fp8ckpt.numerics.dequantize import Dequantizer, bits_dtype
from fp8ckpt.numerics.geometry import BlockGrid, bytes_of_region, bytes_of_run
from fp8ckpt.numerics.quantize import (
    E2M1,
    block_array,
    count_inexact,
    encode,
    pack,
    parts_of_run,
    raise_maxima,
    tally,
    unpack,
    values_of,
)
from fp8ckpt.numerics.scaling import choose_scales, fits, fresh_factor, fresh_scales, may_fit
from tests import oracle
from tests.oracle import NUMPY, Stored
from tests.support import examples

TARGETS = ("BF16", "F16", "F32")
Shape = tuple[int, ...]


class Kind(NamedTuple):
    """A scale dtype, its group, and whether a factor divides (None: there is none)."""

    scale: str
    group: int
    divides: bool | None

    def factor(self, value: float) -> tuple[Factor | None, dict[str, Any]]:
        """Ours, and the oracle's arguments."""
        if self.divides is None:
            return None, {}
        stored = Stored.of(np.float32(value).reshape(()), "F32")
        return Factor(np.float32(value), self.divides), {"factor": stored, "divides": self.divides}

    def every_scale(self) -> np.ndarray:
        """Each byte that is a scale."""
        stored = np.arange(1, 0x7F, dtype=np.uint8) if self.scale == "F8_E4M3" else np.arange(255, dtype=np.uint8)
        return stored.view(SCALE_DTYPES[self.scale])


KINDS = {
    "MXFP4": Kind("U8", 32, None),
    "MXFP4, e8m0": Kind("F8_E8M0", 32, None),
    "NVFP4, ModelOpt": Kind("F8_E4M3", 16, divides=False),
    "NVFP4, compressed-tensors": Kind("F8_E4M3", 16, divides=True),
}
VALUES = {None: 1.0, False: 0.37 / 2688, True: 2688 / 0.37}  # of factors of usual weights


class Case:
    """A packed weight with scales, and what the oracle makes of it."""

    def __init__(self, kind: Kind, shape: Shape, dtype: str, seed: int, value: float | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.grid = BlockGrid(shape, (1,) * (len(shape) - 1) + (kind.group,))
        self.dtype = dtype
        self.bytes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
        scales = rng.choice(kind.every_scale(), self.grid.shape)
        factor, arguments = kind.factor(VALUES[kind.divides] if value is None else value)
        weight, scale = Stored(F4, shape, self.bytes.tobytes()), Stored.codes(scales, kind.scale)
        expected = oracle.dequantize(weight, scale, self.grid.block_size, dtype, **arguments)
        self.expected = np.frombuffer(expected, bits_dtype(dtype)).reshape(shape)
        self.dequantizer = Dequantizer(self.grid, scales, kind.scale, F4, dtype, factor)

    def check_run(self, start: int, stop: int) -> None:
        out = np.full(2 * (stop - start), 0xABCD, bits_dtype(self.dtype))
        first, count = bytes_of_run(start, stop - start, 2)
        self.dequantizer.flat(self.bytes.reshape(-1)[first : first + count], start, out[::2])
        np.testing.assert_array_equal(out[::2], self.expected.reshape(-1)[start:stop])
        assert (out[1::2] == 0xABCD).all()

    def check_region(self, offsets: Shape, sizes: Shape) -> None:
        window, of_bytes = (
            tuple(slice(at, at + size) for at, size in zip(*region, strict=True))
            for region in ((offsets, sizes), bytes_of_region((offsets, sizes), 2))
        )
        for out in (np.empty(sizes, bits_dtype(self.dtype)), np.empty(sizes[::-1], bits_dtype(self.dtype)).T):
            self.dequantizer.region(np.ascontiguousarray(self.bytes[of_bytes]), offsets, out)
            np.testing.assert_array_equal(out, self.expected[window])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lead = draw(st.lists(st.integers(1, 4), max_size=2))
    shape = (*lead, 2 * draw(st.integers(1, 50)))  # the last group may be ragged
    return Case(
        draw(st.sampled_from(list(KINDS.values()))), shape, draw(st.sampled_from(TARGETS)), draw(st.integers(0))
    )


@examples(150)
@given(cases(), st.data())
def test_any_run_and_any_region_equal_the_oracle(case: Case, data: st.DataObject) -> None:
    """Begun and ended at any element, within bytes and groups; into views of any strides."""
    start = data.draw(st.integers(0, case.expected.size))
    case.check_run(start, data.draw(st.integers(start, case.expected.size)))
    offsets = tuple(data.draw(st.integers(0, dim)) for dim in case.expected.shape)
    case.check_region(
        offsets,
        tuple(data.draw(st.integers(0, dim - at)) for dim, at in zip(case.expected.shape, offsets, strict=True)),
    )


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_codes_with_all_scales(kind: str, dtype: str) -> None:
    """Each byte of two codes under each scale, products that overflow or are subnormal included."""
    of = KINDS[kind]
    scales = of.every_scale()
    codes = np.tile(np.arange(256, dtype=np.uint8), (scales.size, 1))
    grid = BlockGrid((scales.size, 512), (1, 512))
    factor, arguments = of.factor(VALUES[of.divides])
    out = np.empty(grid.weight_shape, bits_dtype(dtype))
    Dequantizer(grid, scales, of.scale, F4, dtype, factor).region(codes, (0, 0), out)
    weight, scale = Stored(F4, grid.weight_shape, codes.tobytes()), Stored.codes(scales[:, None], of.scale)
    assert out.tobytes() == oracle.dequantize(weight, scale, grid.block_size, dtype, **arguments)


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantized_weight_gets_its_own_bytes_back(kind: str, dtype: str) -> None:
    """All 16 codes, under all scales whose products the dtype holds; every block keeps its scale."""
    of = KINDS[kind]
    factor, _ = of.factor(VALUES[of.divides])
    scales = of.every_scale()
    values = scale_values(scales, of.scale, factor).astype(np.float64)
    info = ml_dtypes.finfo(NUMPY[dtype])
    # Half of a scale is a multiple of the least subnormal, as exponents' are, or a normal number.
    least = float(info.smallest_subnormal if of.divides is None else info.smallest_normal)
    scales = scales[(values / 2 >= least) & (values * 6 <= float(info.max))]
    assert scales.size > (30 if dtype == "F16" else 120)
    codes = np.tile(np.arange(16, dtype=np.uint8), (8, 1))
    codes[:] = np.where(codes & 7 > np.arange(8)[:, None], 8, codes)  # of each largest code
    packed = np.tile(pack(codes.reshape(-1)), scales.size)
    grid = BlockGrid((scales.size * 8, 16), (1, 16))
    stored = np.repeat(scales, 8)[:, None]
    out = np.empty(grid.weight_shape, bits_dtype(dtype))
    Dequantizer(grid, stored, of.scale, F4, dtype, factor).region(packed.reshape(-1, 8), (0, 0), out)
    given, parts = values_of(out.reshape(-1).view(np.uint8), dtype), parts_of_run(grid, 0, out.size)
    before = scale_values(stored, of.scale, factor)
    again, maxima = np.empty(out.size, np.uint8), block_array(grid, np.float32)
    raise_maxima(parts, given, maxima)
    encode(parts, given, before, again, E2M1)
    np.testing.assert_array_equal(pack(again), packed)
    exact = count_inexact(parts, given, again, before, E2M1) == 0
    assert exact.all()
    kept, keep = choose_scales(maxima, stored, of.scale, exact, coding=E2M1, factor=factor)
    assert keep.all()
    np.testing.assert_array_equal(kept, stored)
    assert (fits(maxima, before, E2M1) | may_fit(maxima, before, E2M1)).all()
    counted = tally(parts, given, again, before, before, E2M1)
    assert (counted.clipped, counted.outgrown) == (0, 0)


@examples(100)
@given(st.sampled_from(list(KINDS)), st.sampled_from(TARGETS), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_any_values_encode_as_the_oracle(kind: str, dtype: str, pairs: int, seed: int) -> None:
    """Rounded to nearest even, those beyond the largest code to it, zeros with their sign; tallied in float32."""
    of, rng = KINDS[kind], np.random.default_rng(seed)
    grid = BlockGrid((3, 2 * pairs), (1, of.group))
    factor, arguments = of.factor(VALUES[of.divides])
    scales = rng.choice(of.every_scale()[70:120], grid.shape)
    before = scale_values(scales, of.scale, factor)
    wide = oracle.spread(before, grid.weight_shape, grid.block_size).astype(np.float64)
    # Ties, codes, and what lies between and beyond.
    values = wide * np.where(
        rng.random(wide.shape) < 0.5, rng.integers(-30, 30, wide.shape) / 4, rng.normal(0, 4, wide.shape)
    )
    stored = Stored.of(np.nan_to_num(values.clip(-3e4, 3e4)).astype(np.float32), dtype)
    given, parts = values_of(np.frombuffer(bytearray(stored.data), np.uint8), dtype), parts_of_run(grid, 0, values.size)
    codes = np.empty(values.size, np.uint8)
    encode(parts, given, before, codes, E2M1)
    scale = Stored.codes(scales, of.scale)
    expected = oracle.quantize(stored, scale, grid.block_size, codes=F4, **arguments)
    assert pack(codes).tobytes() == expected
    np.testing.assert_array_equal(unpack(pack(codes)), codes)
    back = oracle.dequantize(Stored(F4, wide.shape, expected), scale, grid.block_size, "F32", **arguments)
    errors = np.abs(np.frombuffer(back, np.float32) - stored.array.astype(np.float32).reshape(-1))
    counted = tally(parts, given, codes, before, np.full_like(before, np.inf), E2M1)
    assert counted.largest_error == errors.max()
    assert counted.clipped == np.count_nonzero(
        np.abs(stored.array.astype(np.float32)) > wide.astype(np.float32) * E2M1.beyond
    )


# ---------------------------------------------------------------- the libraries


def test_mxfp4_equals_transformers() -> None:
    """`convert_moe_packed_tensors` gives the same bits of every byte under every exponent that bfloat16 has room for.

    (Beyond that it differs: it multiplies by a power of two that float32 does not hold.)
    """
    exponents = np.arange(3, 252, dtype=np.uint8)
    blocks = np.tile(np.arange(256, dtype=np.uint8), (exponents.size, 1)).reshape(exponents.size, 16, 16)
    scales = np.repeat(exponents[:, None], 16, 1)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None])
    grid = BlockGrid((exponents.size, 512), (1, 32))
    out = np.empty(grid.weight_shape, np.uint16)
    Dequantizer(grid, scales, "U8", F4, "BF16").region(blocks.reshape(exponents.size, 256), (0, 0), out)
    np.testing.assert_array_equal(theirs[0].T.contiguous().view(torch.uint16).numpy(), out)


def _weight(seed: int, shape: Shape = (48, 96)) -> torch.Tensor:
    """With groups of every magnitude, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.exp2(torch.randint(-9, 3, (shape[0], 1), generator=generator))
    weight[0, :32] = 0
    return weight.to(torch.bfloat16).float()


ARGUMENTS = {"num_bits": 4, "type": "float", "symmetric": True}


def _maxima(weight: torch.Tensor, group: int) -> np.ndarray:
    return weight.abs().reshape(weight.shape[0], -1, group).amax(-1).numpy()


def _codes_of(weight: torch.Tensor, group: int, scales: np.ndarray) -> np.ndarray:
    grid = BlockGrid(tuple(weight.shape), (1, group))
    codes = np.empty(weight.numel(), np.uint8)
    given = values_of(weight.numpy().reshape(-1).view(np.uint8), "F32")
    encode(parts_of_run(grid, 0, codes.size), given, scales, codes, E2M1)
    return pack(codes).reshape(weight.shape[0], -1)


def test_nvfp4_equals_compressed_tensors() -> None:
    """The factor, the scales, the codes, and what they are decompressed to, of a fresh weight."""
    weight = _weight(1)
    maxima = _maxima(weight, 16)
    theirs = generate_gparam(weight.min(), weight.max())
    factor = fresh_factor(maxima.max(), divides=True)
    assert theirs.item() == factor.value
    arguments = QuantizationArgs(
        **ARGUMENTS, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    groups = weight.reshape(48, -1, 16)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, theirs)
    ours = fresh_scales(maxima, "F8_E4M3", coding=E2M1, factor=factor)
    np.testing.assert_array_equal(scales.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), ours)
    packed = quantize_and_pack_fp4(weight, scales, global_scale=theirs, group_size=16)
    multipliers = scale_values(ours, "F8_E4M3", factor)
    np.testing.assert_array_equal(packed.numpy(), _codes_of(weight, 16, multipliers))
    out = np.empty((48, 96), np.uint16)
    Dequantizer(BlockGrid((48, 96), (1, 16)), ours, "F8_E4M3", F4, "BF16", factor).region(packed.numpy(), (0, 0), out)
    codes = unpack_fp4_from_uint8(packed, 48, 96).reshape(48, -1, 16)
    expected = (codes.float() * (scales / theirs)[..., None]).to(torch.bfloat16).reshape(48, 96)
    np.testing.assert_array_equal(out, expected.view(torch.uint16).numpy())


def test_mxfp4_equals_compressed_tensors_where_it_follows_the_ocp() -> None:
    """Its scales are those of the OCP but for groups whose largest magnitude begins with 1.75 or more: it rounds that
    up, and has them twice as large. Codes are equal under equal scales.
    """
    weight = _weight(2)
    maxima = _maxima(weight, 32)
    arguments = QuantizationArgs(
        **ARGUMENTS, strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
    )
    groups = weight.reshape(48, -1, 32)
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    ours = scale_values(fresh_scales(maxima, "U8", coding=E2M1), "U8")
    rounds_up = np.frexp(maxima)[0] >= 0.875
    assert 0 < rounds_up.sum() < rounds_up.size / 2
    some = maxima > 0
    np.testing.assert_array_equal(theirs.numpy()[some], np.where(rounds_up, 2 * ours, ours)[some])
    packed = quantize_and_pack_fp4(weight, torch.from_numpy(ours), group_size=32)
    np.testing.assert_array_equal(packed.numpy(), _codes_of(weight, 32, ours))


def test_pairs_lie_as_compressed_tensors_packs_them() -> None:
    """The first of two codes in the low half; all of them, negative zero too."""
    values = np.arange(16, dtype=np.uint8).view(NUMPY[F4]).astype(np.float32)
    theirs = pack_fp4_to_uint8(torch.from_numpy(values).reshape(2, 8).to(torch.bfloat16))
    np.testing.assert_array_equal(theirs.numpy().reshape(-1), pack(np.arange(16, dtype=np.uint8)))


# ---------------------------------------------------------------- fresh scales


def test_a_fresh_exponent_is_that_of_the_ocp() -> None:
    """``2 ** (floor(log2(amax)) - 2)``, no less than 2**-127; of zeros 1."""
    amax = np.float32([1, 1.999, 2, 6, 7.99, 8, 2.0**-126, 2.0**-124, 1e-45, 3.4e38])
    expected = np.maximum(np.floor(np.log2(amax.astype(np.float64))) - 2 + 127, 0)
    assert fresh_scales(amax, "U8", coding=E2M1).tolist() == expected.tolist()
    assert fresh_scales(np.zeros(1, np.float32), "F8_E8M0", coding=E2M1).tolist() == [127]


@pytest.mark.parametrize("divides", [False, True])
def test_fresh_scales_of_two_levels(*, divides: bool) -> None:
    """The group of the largest magnitude has 448, others the nearest; zeros have their library's."""
    factor = fresh_factor(np.float32(0.37), divides=divides)
    assert scale_values(np.uint8([0x7E]), "F8_E4M3", factor)[0] * 6 == pytest.approx(0.37)
    tiny = 0.37 * 2.0**-20
    amax = np.float32([0.37, 0.1, 0.37 * 1.03, 0.37 * 1.04, 0, tiny])
    stored = fresh_scales(amax, "F8_E4M3", coding=E2M1, factor=factor)
    values = scale_values(stored, "F8_E4M3")
    assert values[[0, 2]].tolist() == [448, 448]
    assert values[1] == np.float32(0.1 / 0.37 * 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.isnan(values[3])
    assert values[4:].tolist() == ([0.125, 0.125] if divides else [1, 2.0**-9])


@pytest.mark.parametrize("divides", [False, True])
def test_a_fresh_factor_is_always_one(*, divides: bool) -> None:
    """Of zeros, and where the quotient would be infinite or zero, it is 1."""
    for largest in (0.0, 1e-45):
        assert fresh_factor(np.float32(largest), divides=divides).value == 1
    assert 0 < fresh_factor(np.float32(3e38), divides=divides).value < np.inf


def test_what_grew_or_shrank_gets_a_fresh_scale() -> None:
    """Beyond six times its scale, or below four times and not given back exactly."""
    scale = np.uint8([127])
    for amax, exact, kept in ((6, False, True), (6.02, False, True), (7, False, True), (8, False, False),
                              (4, False, True), (3, True, True), (3.9, False, False), (0, False, True)):  # fmt: skip
        maxima = np.float32([amax])
        stored, _ = choose_scales(maxima, scale, "U8", np.array([exact]), coding=E2M1)
        assert (stored.tolist() == [127]) == kept, amax
