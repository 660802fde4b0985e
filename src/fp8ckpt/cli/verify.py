"""``fp8ckpt verify``."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fp8ckpt.cli.options import SOURCE_HELP, FollowIndex, Json, Quiet, Workers
from fp8ckpt.cli.printing import answer, job, print_defects, print_first, print_nan_codes, print_notes, styled
from fp8ckpt.cli.progress import progress
from fp8ckpt.errors import shown

if TYPE_CHECKING:
    from fp8ckpt.verify import TensorDifference, VerifyResult


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help=SOURCE_HELP)],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="Another, to compare with it.")] = None,
    serving: Annotated[
        bool,
        typer.Option(
            "--serving", help="Also check what vLLM, SGLang and transformers need to serve the last one right."
        ),
    ] = False,
    follow_index: FollowIndex = False,
    tp: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --serving: on N GPUs, tensor-parallel; one if not given."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that one checkpoint is sound, or that two are the same: tensors bit for bit, configuration and side files.
    Exit 1 if not.
    """
    from fp8ckpt.verify import verify as run

    with job(), progress("verifying", quiet=quiet) as reported:
        result = run(
            a, b, serving=serving, tensor_parallel=tp, follow_index=follow_index, workers=workers, progress=reported
        )
    answer(result, _print, as_json=as_json, quiet=quiet, ok=result.ok)
    if not result.ok:
        sys.exit(1)


def _print(result: "VerifyResult") -> None:
    print_defects(result.defects)
    print_first((_kind(difference), f"  {_described(difference)}") for difference in result.tensor_differences)
    print_first(("other differences", f"  {shown(text)}") for text in result.file_differences)
    for path, nan_codes in zip(result.paths, result.nan_codes, strict=False):
        print_nan_codes(nan_codes, f" in {path}")
    print_notes(result.notes)
    print(f"{' and '.join(str(path) for path in result.paths)}: {_verdict(result)}")
    if result.serving is not None:
        print_defects(result.serving.failures, "failures in serving")
        print_notes(result.serving.notes)
        if (able := result.serving.tensor_parallel) is not None:
            print(f"tensor parallelism: up to {able.largest}{f'; {able.reason}' if able.reason else ' or more'}")
        fit = not result.serving.failures
        print(f"{result.paths[-1]}: {styled('fit', 'green') if fit else styled('not fit', 'red')} to be served")


def _kind(difference: "TensorDifference") -> str:
    if difference.reason.startswith("only in"):
        return f"tensors that are {difference.reason}"
    return "tensors whose values differ" if difference.elements is not None else "tensors that cannot be compared"


def _described(difference: "TensorDifference") -> str:
    line = f"{shown(difference.name)}: {difference.reason}"
    if difference.elements is not None and difference.numel is not None:
        line += f" in {difference.elements:,} of {difference.numel:,} elements"
    if difference.largest is not None and difference.largest_relative is not None:
        line += f", by up to {difference.largest:.6g} ({100 * difference.largest_relative:.3g} %)"
    return line


def _verdict(result: "VerifyResult") -> str:
    if result.defects:
        return styled("defective", "red")
    if len(result.paths) == 1:
        return f"{styled('sound', 'green')}, {result.tensors:,} tensors"
    if not (result.tensor_differences or result.file_differences):
        return f"{styled('the same', 'green')}, {result.tensors:,} tensors bit for bit, configuration and side files"
    tensors = f"{len(result.tensor_differences)} of {result.tensors:,} tensors"
    return f"{styled('different', 'red')}, {tensors}, {len(result.file_differences)} other differences"
