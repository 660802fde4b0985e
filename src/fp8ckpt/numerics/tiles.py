"""The innermost part of a product: a tile of sums that stays in registers during the loop over the rank.

It is written in LLVM vectors, because numba would store each sum after every addition. A product and an addition are
two roundings, as in plain float32, for any vector width of the machine.
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator"
# (numba and llvmlite ship no type information.)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

ROWS, COLS = 4, 32  # sums of a tile: eight vectors of AVX-512, or all sixteen of AVX2


@intrinsic
def _add_tile(_context: Any, left: Any, panel: Any, first: Any, last: Any, scaling: Any, values: Any, col: Any) -> Any:
    """``values[:, col : col + COLS] += scaling * (left[:, first:last] @ panel[first:last])``: left f32 [ROWS, K], panel
    f32 [K, COLS], values f32 [ROWS, C], all in C order. A sum adds its products one after the other, from zero.
    """
    signature = types.void(left, panel, types.int64, types.int64, types.float32, values, types.int64)
    return signature, _build


add_tile: Any = _add_tile  # callers do not pass the context


def _build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    index, scalar = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(scalar, COLS)
    left, panel, values = (context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 1, 5))
    (_, rank), (_, cols) = (cgutils.unpack_tuple(builder, array.shape) for array in (left, values))
    first, last, scaling, col = given[2], given[3], given[4], given[6]

    def spread(value: Any) -> Any:
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), COLS), None)
        return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)

    def at(array: Any, row: Any, width: Any, place: Any) -> Any:
        return builder.gep(array.data, [builder.add(builder.mul(row, width), place)])

    def vector_at(*place: Any) -> Any:
        return builder.bitcast(at(*place), vector.as_pointer())

    before, head = builder.block, builder.append_basic_block("rank")
    body, after = builder.append_basic_block("step"), builder.append_basic_block("sums")
    builder.branch(head)
    builder.position_at_end(head)
    step, sums = builder.phi(index), [builder.phi(vector) for _ in range(ROWS)]
    builder.cbranch(builder.icmp_signed("<", step, last), body, after)
    builder.position_at_end(body)
    right = builder.load(vector_at(panel, step, index(COLS), index(0)), align=4)
    added = [
        builder.fadd(total, builder.fmul(spread(builder.load(at(left, index(row), rank, step))), right))
        for row, total in enumerate(sums)
    ]
    step.add_incoming(first, before)
    step.add_incoming(builder.add(step, index(1)), body)
    for total, more in zip(sums, added, strict=True):
        total.add_incoming(ir.Constant(vector, None), before)
        total.add_incoming(more, body)
    builder.branch(head)
    builder.position_at_end(after)
    for row, total in enumerate(sums):
        place = vector_at(values, index(row), cols, col)
        old = builder.load(place, align=4)
        builder.store(builder.fadd(old, builder.fmul(spread(scaling), total)), place, align=4)
    return context.get_dummy_value()
