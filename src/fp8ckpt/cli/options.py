"""Arguments, options, and words with several spellings that commands share."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.targets import SPELLINGS

SOURCE_HELP = "A directory, a safetensors file, a hub id in the local cache, or the URL of a store (s3://, hf://, ...)."

_DTYPES = {prefix + name: target for name, target in SPELLINGS.items() for prefix in ("", "torch.")}

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only, and no progress; the exit code says the rest.")
]
FollowIndex = Annotated[
    bool, typer.Option("--follow-index", help="Read what an index lists, and leave alone what it does not.")
]
Plan = Annotated[
    bool, typer.Option("--plan", help="Say what would be read and written, and whether there is room. Writes nothing.")
]
Serving = Annotated[bool, typer.Option("--serving", help="Put right what engines trip over in BASE's own files.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker threads (default: the cores). Changes speed, never output.")
]


def word(*names: str, also: dict[str, str] | None = None, instead: dict[str, str] | None = None, help: str) -> Any:
    """Return an option whose value is one of ``names``, in any case. ``also``: other spellings, with the name that each
    stands for; ``instead``: words that are not values, with the advice that is printed for each.
    """
    known = {name: name for name in names} | {other: name for other, name in (also or {}).items() if name in names}

    def parse(given: str) -> str:
        spelling = given.lower().replace("_", "-")
        if spelling in known:
            return known[spelling]
        if instead and spelling in instead:
            raise typer.BadParameter(f"{given!r}: {instead[spelling]}")
        near = difflib.get_close_matches(spelling, known, 1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise typer.BadParameter(f"{given!r}: {hint}expected one of {', '.join(names)}")

    return typer.Option(
        parser=parse,
        metavar=f"[{'|'.join(names)}]",
        autocompletion=lambda incomplete: [name for name in names if name.startswith(incomplete.lower())],
        help=help,
    )


def target(*names: str, four_bits: str, help: str) -> Any:
    """A `word` for what tensors become; ``four_bits``: the advice if a format of four bits is given."""
    return word(*names, also=_DTYPES, instead=dict.fromkeys(("fp4", "mxfp4", "nvfp4"), four_bits), help=help)


@contextmanager
def usage() -> Iterator[None]:
    """Raise a `ValueError` about arguments as wrong usage, except a named error of a checkpoint."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, Fp8CheckpointError):
            raise
        raise typer.BadParameter(str(error)) from error
