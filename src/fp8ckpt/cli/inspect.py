"""``fp8ckpt inspect``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fp8ckpt.cli.options import SOURCE_HELP, FollowIndex, Json, Quiet
from fp8ckpt.cli.printing import answer, print_defects, print_notes, size, table

if TYPE_CHECKING:
    from fp8ckpt.inspect import Inspection


def inspect(
    path: Annotated[str, typer.Argument(metavar="DIR", help=SOURCE_HELP)],
    follow_index: FollowIndex = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What is FP8, with which scales; what is not, and why; what BF16 will take; and every defect. Exit 1 if there is
    one.
    """
    from fp8ckpt.inspect import inspect as run

    found = run(path, follow_index=follow_index)
    answer(found, _print, as_json=as_json, quiet=quiet)
    if found.defects:
        sys.exit(1)


def _print(found: Inspection) -> None:
    counts = (
        f"{found.tensors:,} tensors, {found.elements:,} elements, {size(found.stored_bytes)} in {found.files} files"
    )
    print(f"{found.path}: {counts}")
    if found.schemes:
        print("FP8:")
        table(
            ("codes", "block", "scales", "scale shape", "tensors", "elements", "size"),
            [
                (s.dtype, s.block, s.scale_dtype, s.scale_shape, s.tensors, s.elements, size(s.bytes))
                for s in found.schemes
            ],
        )
    if found.unquantized:
        print("not FP8:")
        table(
            ("dtype", "why", "tensors", "elements", "size", "such as"),
            [
                (u.dtype, u.reason, u.tensors, u.elements, size(u.bytes), ", ".join(u.modules))
                for u in found.unquantized
            ],
        )
    cache = f", {found.cache_scales:,} of the key-value cache" if found.cache_scales else ""
    print(f"activation scales: {f'{found.activation_scales:,}' if found.activation_scales else 'none'}{cache}")
    print(f"in bf16: {size(found.bf16_bytes)}")
    print_notes(found.notes)
    print_defects(found.defects)
