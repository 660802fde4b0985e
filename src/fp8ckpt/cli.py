"""The command line: each command is one library call and printing.

Results go to stdout, progress to stderr (and only to a terminal). Exit codes: 0 done, 1 refused or different, 2 usage,
130 interrupted. An error is one line; a traceback is a bug.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fp8ckpt.errors import Fp8CheckpointError, shown

if TYPE_CHECKING:
    from fp8ckpt.encodings.run_fp8 import QuantizationReport
    from fp8ckpt.inspect import Inspection
    from fp8ckpt.verify import VerifyResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Take an FP8-released model into BF16 training, and back, losslessly.",
)

_MOST_MOVED = 10  # rows of the table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker threads (default: the cores). Changes speed, never output.")
]


class Target(StrEnum):
    """Dtypes to convert to."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp8 = "fp8"


class Scheme(StrEnum):
    """How to quantize without a base."""

    per_tensor = "per-tensor"
    block = "block"
    channel = "channel"


class Scales(StrEnum):
    """Which scales to quantize with."""

    reuse = "reuse"
    fresh = "fresh"


class KeyLayout(StrEnum):
    """Key layouts of Mistral3 models on disk."""

    identity = "identity"
    nested = "nested"


class SampleScheme(StrEnum):
    """What `sample` can write."""

    per_tensor = "per-tensor"
    block = "block"


def main() -> None:
    """Run the command line, and turn every named error into one line."""
    try:
        app()
    except Fp8CheckpointError as error:
        _fail(error.message)


def _fail(message: str) -> NoReturn:
    if _speaks():  # under torchrun every rank meets the same error
        print(f"fp8ckpt: {message}", file=sys.stderr)
    sys.exit(1)


def _speaks() -> bool:
    """Whether this process prints: under torchrun, the first rank does for all."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK") == "0"


@app.command(epilog="Example: fp8ckpt inspect sample-fp8")
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="DIR", help="A directory, a safetensors file, or a hub id in the local cache.")
    ],
    as_json: Json = False,
) -> None:
    """What is FP8, with which scales; what is not, and why; what BF16 will take; and every defect. Exit 1 if there is
    one.
    """
    from fp8ckpt.inspect import inspect as run

    found = run(path)
    if as_json:
        _print_json(found)
    else:
        _print_inspection(found)
    if found.defects:
        sys.exit(1)


@app.command(epilog="Example: fp8ckpt convert sample-fp8 sample-bf16 --to bf16")
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory, a safetensors file, or a hub id in the local cache.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make; it must not exist.")],
    to: Annotated[Target, typer.Option("--to", help="What FP8 weights become; or fp8, the way back.")] = Target.bf16,
    like: Annotated[
        str | None, typer.Option(metavar="BASE", help="With --to fp8: the FP8 checkpoint that SRC came from.")
    ] = None,
    scheme: Annotated[Scheme | None, typer.Option(help="With --to fp8, without a base: how to quantize.")] = None,
    scales: Annotated[
        Scales, typer.Option(help="With --like: keep the base's scale where values fit it, or make all new.")
    ] = Scales.reuse,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Say what quantizing did; reads the base's codes.")
    ] = True,
    serving: Annotated[
        bool, typer.Option("--serving", help="With --like: put right what engines trip over in the base's own files.")
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Dequantize every FP8 weight, exactly, and write the directory that a trainer loads. Or, --to fp8, quantize again.

    With --like BASE, what goes out has BASE's layout to the byte, and SRC's values; what was not trained comes back as
    it was.

    What is written is in DST.partial until it is whole. A run that was cut off is resumed by the same command.
    Under torchrun, the ranks share the work.
    """
    from fp8ckpt.convert import convert as run

    try:
        with _progress("converting") as progress:
            result = run(
                source,
                destination,
                to=to.value,
                like=like,
                scheme=None if scheme is None else scheme.value,
                scales=scales.value,
                report=report,
                serving=serving,
                workers=workers,
                progress=progress,
            )
    except ValueError as error:
        if isinstance(error, Fp8CheckpointError):
            raise
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        kept = f"; what was written is in {shown(destination)}.partial, and the same command goes on from there"
        print(f"fp8ckpt: interrupted{kept if Path(f'{destination}.partial').exists() else ''}", file=sys.stderr)
        sys.exit(130)
    if not _speaks():
        return
    if as_json:
        _print_json(result)
        return
    done = f"{result.destination}: {result.tensors} tensors in {_size(result.bytes_written)}"
    if result.to == Target.fp8.value:
        print(f"{done}, {result.quantized} quantized, {result.seconds:.1f} s")
    else:
        print(
            f"{done}, {result.dequantized} dequantized to {result.to}, "
            f"{result.dropped_scales} scales dropped, {result.seconds:.1f} s"
        )
    if result.bytes_resumed:
        print(f"{_size(result.bytes_resumed)} were there from an earlier run")
    for note in result.notes:
        print(f"note: {note}")
    if result.report is not None:
        _print_report(result.report)
    if result.to != Target.fp8.value:
        _print_nan_codes(result.nan_codes)


@app.command(epilog="Example: fp8ckpt verify sample-fp8 sample-bf16")
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="Another, to compare with it.")] = None,
    serving: Annotated[
        bool,
        typer.Option(
            "--serving", help="Also check what vLLM, SGLang and transformers need to serve the last one right."
        ),
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Check one checkpoint, or compare two: the same tensors bit for bit, configuration and side files.
    Exit 1 if not.
    """
    from fp8ckpt.verify import verify as run

    with _progress("verifying") as progress:
        result = run(a, b, serving=serving, workers=workers, progress=progress)
    if as_json:
        _print_json(result, ok=result.ok)
    else:
        _print_verification(result)
    if not result.ok:
        sys.exit(1)


@app.command(epilog="Example: fp8ckpt sample sample-fp8 --layers 2")
def sample(
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make; it must not exist.")],
    scheme: Annotated[
        SampleScheme, typer.Option(help="per-tensor: a Mistral3 model; block: a DeepSeek-V3-shaped one.")
    ] = SampleScheme.per_tensor,
    layout: Annotated[
        KeyLayout, typer.Option(help="Names as in Mistral Medium 3.5 (identity) or Ministral 3 (nested).")
    ] = KeyLayout.identity,
    layers: Annotated[int | None, typer.Option(min=1, help="Text layers.")] = None,
    hidden: Annotated[int | None, typer.Option(min=16, help="Hidden size of the text model.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=16, help="Intermediate size of the text model.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key-value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=2, help="Size of a head.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=320, help="Vocabulary size.")] = None,
    vision_layers: Annotated[int | None, typer.Option(min=1, help="Vision layers.")] = None,
    experts: Annotated[int | None, typer.Option(min=2, help="Experts a layer (block scheme).")] = None,
    files: Annotated[int, typer.Option(min=1, help="Safetensors files.")] = 3,
    true_shape: Annotated[
        bool, typer.Option(help="The released model's own sizes; with --sparse, in no space.")
    ] = False,
    sparse: Annotated[bool, typer.Option(help="True headers and scales, and holes for weights.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a miniature, valid FP8 checkpoint in the released layout, which a model can be made of."""
    from fp8ckpt.sample import DeepseekSizes, Mistral3Sizes
    from fp8ckpt.sample import sample as run

    given = {
        "layers": layers, "hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "vocabulary": vocabulary, "vision_layers": vision_layers, "experts": experts,
    }  # fmt: skip
    family: type[Any] = Mistral3Sizes if scheme is SampleScheme.per_tensor else DeepseekSizes
    known = {field.name for field in dataclasses.fields(family)}
    changed = {name: size for name, size in given.items() if size is not None}
    if foreign := sorted(changed.keys() - known):
        raise typer.BadParameter(f"--{foreign[0].replace('_', '-')} does not go with --scheme {scheme.value}")
    try:
        sizes = dataclasses.replace(family.true_shape() if true_shape else family(), **changed)
        print(run(destination, sizes, layout=layout.value, files=files, sparse=sparse, seed=seed))
    except ValueError as error:
        if isinstance(error, Fp8CheckpointError):
            raise
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, rate and time left, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(result: Any, **more: Any) -> None:
    print(json.dumps({**more, **dataclasses.asdict(result)}, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Fp8CheckpointError):
        facts = {name: getattr(value, name) for name in ("tensor", "file", "found", "expected", "remedy", "message")}
        return {"kind": type(value).__name__, **facts}
    return str(value)


def _size(count: int) -> str:
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.{0 if units[0] == 'B' else 1}f} {units[0]}"


def _print_nan_codes(nan_codes: dict[str, int], where: str = "") -> None:
    if nan_codes:
        name = next(iter(nan_codes))
        print(
            f"{sum(nan_codes.values())} NaN codes{where}, in {len(nan_codes)} tensors, "
            f"the first {shown(name)}: carried over as NaN"
        )
    else:
        print(f"0 NaN codes{where}")


def _print_report(report: QuantizationReport) -> None:
    total = report.total
    moved = "" if total.moved is None else f"{_share(total.moved, total.elements)} codes moved, "
    print(
        f"{moved}{total.clipped:,} elements clipped, "
        f"{_share(total.scales - total.fresh, total.scales)} scales kept, {total.fresh:,} new"
    )
    print(
        f"error against the source: {total.mean_error:.3g} of the mean magnitude, "
        f"at most {total.largest_error:.3g} of the largest"
    )
    if total.outgrown:
        print(f"{total.outgrown:,} elements had outgrown the base's scales")
    if total.moved:
        print("most moved:")
        rows = sorted(report.weights, key=lambda row: -(row.moved or 0) / max(1, row.elements))[:_MOST_MOVED]
        head = ("weight", "moved", "share", "new scales", "of", "outgrown", "mean error", "largest")
        cells: list[tuple[object, ...]] = [
            (
                row.name,
                row.moved,
                f"{100 * row.moved / row.elements:.3g} %",
                row.fresh,
                row.scales,
                row.outgrown,
                f"{row.mean_error:.3g}",
                f"{row.largest_error:.3g}",
            )
            for row in rows
            if row.moved
        ]
        _table(head, cells)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f" ({100 * part / whole:.3g} %)" if whole else "")


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Columns of text; numbers to the right."""
    cells = [head, *(tuple(f"{cell:,}" if isinstance(cell, int) else shown(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [isinstance(cell, int) for cell in rows[0]]
    for row in cells:
        print(
            "  "
            + "  ".join(
                cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
            ).rstrip()
        )


def _print_inspection(found: Inspection) -> None:
    print(
        f"{found.path}: {found.tensors:,} tensors, {found.elements:,} elements, "
        f"{_size(found.stored_bytes)} in {found.files} files"
    )
    if found.schemes:
        print("FP8:")
        fp8_head = ("codes", "block", "scales", "scale shape", "tensors", "elements", "size")
        _table(
            fp8_head,
            [
                (s.dtype, s.block, s.scale_dtype, s.scale_shape, s.tensors, s.elements, _size(s.bytes))
                for s in found.schemes
            ],
        )
    if found.unquantized:
        print("not FP8:")
        head = ("dtype", "why", "tensors", "elements", "size", "such as")
        _table(
            head,
            [
                (u.dtype, u.reason, u.tensors, u.elements, _size(u.bytes), ", ".join(u.modules))
                for u in found.unquantized
            ],
        )
    print(f"activation scales: {f'{found.activation_scales:,}' if found.activation_scales else 'none'}", end="")
    print(f", {found.cache_scales:,} of the key-value cache" if found.cache_scales else "")
    print(f"in bf16: {_size(found.bf16_bytes)}")
    for note in found.notes:
        print(f"note: {note}")
    _print_defects(found.defects)


def _print_defects(defects: Sequence[Fp8CheckpointError], kind: str = "defects") -> None:
    print(f"{kind}: {len(defects) or 'none'}")
    for defect in defects:
        print(f"  {type(defect).__name__}: {defect.message}")


def _print_verification(result: VerifyResult) -> None:
    _print_defects(result.defects)
    for difference in result.tensor_differences:
        line = f"  {shown(difference.name)}: {difference.reason}"
        if difference.elements is not None and difference.numel is not None:
            line += f" in {difference.elements:,} of {difference.numel:,} elements"
        if difference.largest is not None and difference.largest_relative is not None:
            line += f", by up to {difference.largest:.6g} ({100 * difference.largest_relative:.3g} %)"
        print(line)
    for text in result.file_differences:
        print(f"  {shown(text)}")
    for path, nan_codes in zip(result.paths, result.nan_codes, strict=False):
        _print_nan_codes(nan_codes, f" in {path}")
    paths = " and ".join(str(path) for path in result.paths)
    if result.defects:
        print(f"{paths}: defective")
    elif len(result.paths) == 1:
        print(f"{paths}: sound, {result.tensors:,} tensors")
    elif not (result.tensor_differences or result.file_differences):
        print(f"{paths}: the same, {result.tensors:,} tensors bit for bit, configuration and side files")
    else:
        tensors = f"{len(result.tensor_differences)} of {result.tensors:,} tensors"
        print(f"{paths}: different, {tensors}, {len(result.file_differences)} other differences")
    if result.serving is not None:
        _print_defects(result.serving.failures, "failures in serving")
        for note in result.serving.notes:
            print(f"note: {note}")
        print(f"{result.paths[-1]}: {'not ' if result.serving.failures or result.defects else ''}fit to be served")
