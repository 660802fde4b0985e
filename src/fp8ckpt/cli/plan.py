"""``fp8ckpt plan``."""

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from fp8ckpt.cli.options import SOURCE_HELP, Json, Quiet
from fp8ckpt.cli.printing import answer, job, size, table
from fp8ckpt.errors import listed

if TYPE_CHECKING:
    from fp8ckpt.plan import Plan, RankPlan


def plan(
    path: Annotated[str, typer.Argument(metavar="DIR", help=SOURCE_HELP)],
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks in all, a GPU each.")],
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="Size of tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(min=1, metavar="N", help="Pipeline stages.")] = 1,
    ep: Annotated[int, typer.Option(min=1, metavar="N", help="Size of expert parallelism, of a stage's ranks.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What each rank of a cluster will hold as bfloat16, read, and take at its peak. Reads headers only.

    The ranks that tp and pp leave are data-parallel, and shard what they hold among them, as FSDP2 does. The names of
    tensors decide which are cut, and how; that is printed.
    """
    from fp8ckpt.plan import plan as run

    with job():
        found = run(path, ranks=ranks, tp=tp, pp=pp, ep=ep)
    answer(found, _print, as_json=as_json, quiet=quiet)


def _print(found: "Plan") -> None:
    mesh = f"{found.pp} stages x {found.dp} data-parallel x {found.tp} tensor-parallel"
    experts = f", {found.ep} expert-parallel" if found.ep > 1 else ""
    print(f"{found.path}: {size(found.stored)} for {len(found.ranks)} ranks: {mesh}{experts}")
    print("how tensors are shared out:")
    table(
        ("kind", "cut", "tensors", "size"), [(row.kind, row.rule, row.tensors, size(row.bytes)) for row in found.kinds]
    )
    print("a rank:")
    groups = [list(same) for _, same in groupby(found.ranks, key=_alike)]
    table(
        ("ranks", "stage", "tensors", "holds", "reads", "peak"),
        [
            (_numbers(ranks), f"{first.pp}", first.tensors, size(first.held), size(first.read), size(first.peak))
            for ranks in groups
            for first in ranks[:1]
        ],
    )
    again = f", {size(found.again)} of it again, by ranks that hold the same" if found.again else ""
    print(f"all together read {size(found.read)}{again}")
    if found.left_out:
        print(f"{size(found.left)} are left out, for which models have no place: {listed(found.left_out)}")


def _alike(rank: "RankPlan") -> tuple[int, ...]:
    return rank.pp, rank.tensors, rank.held, rank.read


def _numbers(ranks: "list[RankPlan]") -> str:
    first, last = ranks[0].rank, ranks[-1].rank
    return f"{first}" if first == last else f"{first} to {last}"
