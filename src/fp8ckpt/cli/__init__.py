"""The command line: each command is one library call and printing.

Results go to stdout, progress and errors to stderr. Under torchrun only the first rank prints. Exit codes: 0 done, 1
refused or different, 2 usage, 130 interrupted. An error is one line; a traceback is a bug.

One file per command. `options` holds what several commands share, `printing` how results look, `progress` what is shown
while a command works. Help imports neither torch nor numpy: a command imports its job when it runs.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fp8ckpt.cli.convert import convert
from fp8ckpt.cli.inspect import inspect
from fp8ckpt.cli.merge import merge
from fp8ckpt.cli.plan import plan
from fp8ckpt.cli.printing import fail, refuse
from fp8ckpt.cli.report import report
from fp8ckpt.cli.sample import sample
from fp8ckpt.cli.verify import verify
from fp8ckpt.errors import Fp8CheckpointError
from fp8ckpt.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": str.lower},
    help="Take an FP8-released model into BF16 training, and back, losslessly.",
)

_COMMANDS: dict[
    Callable[..., None], tuple[str, str]
] = {  # in the order of the help: a line, and an example that a test runs
    inspect: ("What is FP8, with which scales; what is not; every defect.", "fp8ckpt inspect sample-fp8"),
    convert: ("FP8 to BF16, exactly; and back to FP8.", "fp8ckpt convert sample-fp8 sample-bf16 --to bf16"),
    merge: ("LoRA adapters into a release, in its own layout.", "fp8ckpt merge sample-fp8 sample-lora merged-fp8"),
    verify: ("Prove one sound, or two the same, bit for bit.", "fp8ckpt verify sample-fp8 sample-bf16"),
    plan: ("What each rank of a cluster will hold, read and take.", "fp8ckpt plan sample-fp8 --ranks 4 --tp 2 --pp 2"),
    report: ("Draw scales, codes, and what moved: one HTML page.", "fp8ckpt report sample-fp8 --output sample.html"),
    sample: ("Write a miniature FP8 checkpoint to try things on.", "fp8ckpt sample sample-fp8 --layers 2"),
}
for _command, (_line, _example) in _COMMANDS.items():
    app.command(short_help=_line, epilog=f"Example: {_example}")(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fp8ckpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line, and turn every named error into one line."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a name that is a text
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # None if the caller closed them
        for stream in (sys.stdout, sys.stderr):  # a name may hold characters that no encoding has
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                app()
            finally:
                sys.stdout.flush()  # or Python flushes when nothing can catch its error
                gc.freeze()  # the process ends: no garbage collection of all imported modules is needed
        except Fp8CheckpointError as error:
            refuse(error)
        except MemoryError:
            fail("there is not enough memory; --workers 1 takes the least, where there is that option")
        except OSError as error:
            sys.stdout = nowhere
            if isinstance(error, BrokenPipeError):  # the reader has closed the pipe
                sys.exit(1)
            no_place = isinstance(error, FileNotFoundError)  # from os.getcwd(), which names no file
            fail(f"{error.filename or ('the working directory' if no_place else 'standard output')}: {error.strerror}")
