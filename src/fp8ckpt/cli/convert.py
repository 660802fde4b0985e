"""``fp8ckpt convert``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8ckpt.cli.options import SOURCE_HELP, FollowIndex, Json, Plan, Quiet, Serving, Workers, target, word
from fp8ckpt.cli.printing import answer, answer_plan, job, print_nan_codes, print_scales, print_written, share, table
from fp8ckpt.cli.progress import progress

if TYPE_CHECKING:
    from fp8ckpt.encodings.results import ConvertResult, QuantizationReport

_MOST_MOVED = 10  # rows of the table
_SCHEMES = {
    **dict.fromkeys(("tensor", "pertensor", "tensorwise"), "per-tensor"),
    **dict.fromkeys(("per-block", "blocks", "blockwise"), "block"),
    **dict.fromkeys(("per-channel", "channels", "channelwise"), "channel"),
}

_Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="The directory to make, which must not exist; or s3://bucket/prefix.")
]
_To = Annotated[
    str | None,
    target(
        *("bf16", "fp16", "fp32", "fp8"),
        four_bits="leave out --to, and give --like BASE, whose four bits are written",
        help="What quantized weights become, bf16 if not said; or fp8, the way back.",
    ),
]
_Layout = Annotated[
    str,
    word("file", "model", help="Not for fp8: names and stackings of the file, or of its model in transformers."),
]
_Like = Annotated[
    str | None,
    typer.Option(metavar="BASE", help="The way back: the checkpoint, in FP8 or four bits, that SRC came from."),
]
_Scheme = Annotated[
    str | None,
    word("per-tensor", "block", "channel", also=_SCHEMES, help="Without a base: to FP8, and how to quantize."),
]
_Scales = Annotated[
    str, word("reuse", "fresh", help="With --like: keep the base's scale where values fit it, or make all new.")
]
_Carry = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="With --like: take from BASE what SRC lacks and has this in its name."),
]
_Report = Annotated[bool, typer.Option("--report/--no-report", help="Say what quantizing did; reads the base's codes.")]
_Page = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also draw the page of `fp8ckpt report SRC DST` (or BASE DST), counted in the same pass.",
    ),
]
_Only = Annotated[
    str | None, typer.Option(metavar="REGEX", help="With --scheme: quantize only weights with this in their names.")
]
_Skip = Annotated[
    str | None, typer.Option(metavar="REGEX", help="With --scheme: leave weights with this in their names.")
]


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=SOURCE_HELP)],
    destination: _Destination,
    to: _To = None,
    layout: _Layout = "file",
    like: _Like = None,
    scheme: _Scheme = None,
    scales: _Scales = "reuse",
    carry: _Carry = None,
    report: _Report = True,
    report_html: _Page = None,
    serving: Serving = False,
    only: _Only = None,
    skip: _Skip = None,
    follow_index: FollowIndex = False,
    plan: Plan = False,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Dequantize every weight, exactly, and write the directory that a trainer loads. Or quantize again.

    With --like BASE, the output has BASE's layout to the byte, FP8, MXFP4 or NVFP4, and SRC's values; weights that were
    not trained come back byte for byte.

    The output is in DST.partial until it is complete. The same command resumes an interrupted run. Under torchrun, the
    ranks share the work.
    """
    from fp8ckpt.convert import convert as run
    from fp8ckpt.convert import plan_convert

    arguments: dict[str, Any] = {
        "to": to, "layout": layout, "like": like, "scheme": scheme, "scales": scales, "carry": carry, "report": report,
        "serving": serving, "only": only, "skip": skip, "follow_index": follow_index,
    }  # fmt: skip
    if plan:
        answer_plan(lambda: plan_convert(source, destination, **arguments), as_json=as_json, quiet=quiet)
        return
    with job(destination), progress("converting", quiet=quiet) as reported:
        result = run(source, destination, **arguments, report_html=report_html, workers=workers, progress=reported)
    page = None if report_html is None else report_html.absolute()
    answer(result, lambda found: _print(found, page), as_json=as_json, quiet=quiet, page=page)


def _print(result: "ConvertResult", page: Path | None) -> None:
    from fp8ckpt.encodings.results import Fp8Result, PlainResult

    did = ""
    if isinstance(result, PlainResult):
        did = f"{result.dequantized} dequantized to {result.to}, {result.dropped_scales} scales dropped, "
    elif isinstance(result, Fp8Result):
        did = f"{result.quantized} quantized, "
    print_written(result, did)
    if isinstance(result, PlainResult):
        print_nan_codes(result.nan_codes)
    elif isinstance(result, Fp8Result) and result.report is not None:
        _print_report(result.report)
    if page is not None:
        print(f"{page}: a picture of it")


def _print_report(report: "QuantizationReport") -> None:
    total = report.total
    moved = "" if total.moved is None else f"{share(total.moved, total.elements)} codes moved, "
    print_scales(total, moved)
    errors = f"{total.mean_error:.3g} of the mean magnitude, at most {total.largest_error:.3g} of the largest"
    print(f"error against the source: {errors}")
    if total.outgrown:
        print(f"{total.outgrown:,} elements had outgrown the base's scales")
    if total.moved:
        print("most moved:")
        rows = sorted(report.weights, key=lambda row: -(row.moved or 0) / max(1, row.elements))[:_MOST_MOVED]
        table(
            ("weight", "moved", "share", "new scales", "of", "outgrown", "mean error", "largest"),
            [
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
            ],
        )
