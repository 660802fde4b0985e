"""``fp8ckpt inspect``."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fp8ckpt.cli.options import SOURCE_HELP, FollowIndex, Json, Quiet
from fp8ckpt.cli.printing import answer, job, print_defects, print_notes, size, styled, table
from fp8ckpt.errors import shown

if TYPE_CHECKING:
    from fp8ckpt.inspect import Inspection, KindOfScales

_MOST_OUTLIERS = 20


def inspect(
    path: Annotated[str, typer.Argument(metavar="DIR", help=SOURCE_HELP)],
    tensor: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="List the tensors in whose names this is found, with their scales."),
    ] = None,
    scales: Annotated[
        bool, typer.Option("--scales", help="Also: the scales of each kind of module, and which of them stand out.")
    ] = False,
    follow_index: FollowIndex = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What is FP8, with which scales; what is not, and why; what BF16 will take; every defect. Exit 1 if any."""
    from fp8ckpt.inspect import inspect as run

    listed = "" if as_json and tensor is None else tensor  # JSON has all tensors
    with job():
        found = run(path, follow_index=follow_index, tensor=listed, scales=scales or as_json)
    answer(found, _print if tensor is None else _print_listed, as_json=as_json, quiet=quiet)
    if found.defects:
        sys.exit(1)


def _print(found: "Inspection") -> None:
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
    if found.scales:
        _print_scales(found.scales)
    print_notes(found.notes)
    print_defects(found.defects)


def _print_listed(found: "Inspection") -> None:
    table(
        ("tensor", "dtype", "shape", "block", "scales", "from", "to", "activation scale", "file"),
        [
            (
                row.name,
                row.dtype,
                list(row.shape),
                row.block or "",
                row.scale_dtype or "",
                f"{row.scales.least:.6g}" if row.scales else "",
                f"{row.scales.greatest:.6g}" if row.scales else "",
                f"{row.activation_scales.greatest:.6g}" if row.activation_scales else "",
                row.file,
            )
            for row in found.listed
        ],
    )
    if found.scales:
        _print_scales(found.scales)
    print_defects(found.defects)


def _print_scales(kinds: "Sequence[KindOfScales]") -> None:
    print("scales by kind:")
    table(
        ("kind", "weights", "scales", "min", "median", "max", "stand out"),
        [
            (
                row.kind,
                row.weights,
                row.scales.count,
                f"{row.scales.least:.4g}",
                f"{row.scales.median:.4g}",
                f"{row.scales.greatest:.4g}",
                len(row.outliers),
            )
            for row in kinds
        ],
    )
    far = [(name, factor) for row in kinds for name, factor in row.outliers.items()]
    far.sort(key=lambda outlier: -max(outlier[1], 1 / outlier[1]))
    for name, factor in far[:_MOST_OUTLIERS]:
        print(f"  {styled('stands out:', 'yellow')} {shown(name)}, {factor:.3g} times the others of its kind")
    if len(far) > _MOST_OUTLIERS:
        print(f"  and {len(far) - _MOST_OUTLIERS:,} more")
