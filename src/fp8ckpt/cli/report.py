"""``fp8ckpt report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8ckpt.cli.options import SOURCE_HELP, Json, Quiet, Workers
from fp8ckpt.cli.printing import answer, job, share, size
from fp8ckpt.cli.progress import progress

if TYPE_CHECKING:
    from fp8ckpt.report import Report


def report(
    a: Annotated[str, typer.Argument(metavar="A", help=SOURCE_HELP)],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="What became of it, or its base: to see what moved.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write; it must not exist.")
    ] = Path("report.html"),
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a page, in one HTML file: sizes, scales by layer, which codes are in use; and with B, what moved.

    Needs the extra: pip install 'fp8ckpt[report]'. Reads all of A, and of B, once.
    """
    from fp8ckpt.report import report as run

    with job(), progress("reading", quiet=quiet) as reported:
        found = run(a, b, output=output, workers=workers, progress=reported)

    def show(found: "Report") -> None:
        print(f"{output}: {size(output.stat().st_size)}, of {size(found.bytes_read)} that were read")
        if found.changes is not None:
            moved = sum(change.moved for change in found.changes)
            apart = f"; {len(found.apart)} tensors have no counterpart" if found.apart else ""
            print(f"{share(moved, sum(change.elements for change in found.changes))} elements moved{apart}")

    answer(found, show, as_json=as_json, quiet=quiet, page=str(output))
