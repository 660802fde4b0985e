"""``fp8ckpt merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8ckpt.cli.options import SOURCE_HELP, FollowIndex, Json, Plan, Quiet, Serving, Workers, target, word
from fp8ckpt.cli.printing import answer, answer_plan, job, print_nan_codes, print_scales, print_written, share, table
from fp8ckpt.cli.progress import progress

if TYPE_CHECKING:
    from fp8ckpt.merge import MergeReport, MergeResult

_LEAST_ARRIVED = 10  # rows of the table


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help=SOURCE_HELP)],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The directory that PEFT wrote, or PATH=WEIGHT.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make; it must not exist.")],
    more: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="PATH=WEIGHT", help="Another adapter, added too, WEIGHT times; repeatable."),
    ] = None,
    to: Annotated[
        str | None,
        target(
            *("fp8", "bf16"),
            four_bits="leave out --to: BASE's own layout is written, its four bits too",
            help="BASE's own layout (where it is FP8), or its weights dequantized.",
        ),
    ] = None,
    scales: Annotated[
        str,
        word(
            "reuse", "fresh", help="Keep BASE's scale where merged values fit it, or make those of merged weights new."
        ),
    ] = "reuse",
    serving: Serving = False,
    follow_index: FollowIndex = False,
    plan: Plan = False,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a LoRA into a release, and write it in the release's own layout; the model is never held in BF16.

    Tensors that ADAPTER does not touch are unchanged, byte for byte. The report says how much of ADAPTER arrived.

    The output is in DST.partial until it is complete. The same command resumes an interrupted run. Under torchrun, the
    ranks share the work.
    """
    from fp8ckpt.merge import merge as run
    from fp8ckpt.merge import plan_merge

    adapters = [_weighted(one) for one in (adapter, *(more or ()))]
    how: dict[str, Any] = {"to": to, "scales": scales, "serving": serving, "follow_index": follow_index}
    if plan:
        answer_plan(lambda: plan_merge(base, adapters, destination, **how), as_json=as_json, quiet=quiet)
        return
    with job(destination), progress("merging", quiet=quiet) as reported:
        result = run(base, adapters, destination, **how, workers=workers, progress=reported)
    answer(result, _print, as_json=as_json, quiet=quiet)


def _weighted(text: str) -> tuple[str, float]:
    """A path with its weight; 1 if none is given."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight.replace("_", "?"))  # Python reads 1_0 as ten
    except ValueError:
        return text, 1.0


def _print(result: MergeResult) -> None:
    print_written(result, f"{result.merged} merged, to {result.to}, ")
    if result.nan_codes:
        print_nan_codes(result.nan_codes)
    _print_report(result.report)


def _print_report(report: MergeReport) -> None:
    total = report.total
    print(f"{share(total.changed, total.elements)} elements changed, by {_percent(total.delta)} of the weights' norm")
    if total.arrived is not None:
        print(f"{_percent(total.arrived)} of what was to be added arrived, and {_percent(total.error)} beside it")
    if total.scales:
        print_scales(total)
    rows = sorted((row for row in report.weights if row.arrived is not None), key=lambda row: row.arrived or 0.0)
    if rows:
        print("least arrived:")
        table(
            ("weight", "arrived", "beside", "to be added", "changed", "clipped", "new scales", "of"),
            [
                (
                    row.name,
                    _percent(row.arrived or 0.0),
                    _percent(row.error),
                    _percent(row.delta),
                    row.changed,
                    row.clipped,
                    row.fresh,
                    row.scales,
                )
                for row in rows[:_LEAST_ARRIVED]
            ],
        )


def _percent(part: float) -> str:
    return f"{100 * part:.3g} %"
