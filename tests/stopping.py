"""The command line in a process that stops itself: at a point of the run, never at a time.

Its pieces are small, so that a run of a miniature has many points. SIGINT has its usual meaning in that process, also
where whoever started the tests ignores it, as a shell does for what it runs in the background.
"""

from __future__ import annotations

import signal
import subprocess
import sys

CHUNK, CHUNKS = 4096, 4  # bytes; chunks of an extent

_SCRIPT = """
import os, signal, sys, threading
import fp8ckpt.output.extents as extents
from fp8ckpt.cli import main
from fp8ckpt.output.partial import PartialOutput

extents.CHUNK, extents.EXTENT = {chunk}, {chunk} * {chunks}
handled, lock, left = threading.Event(), threading.Lock(), {count}

def interrupted(number, frame):
    handled.set()
    signal.default_int_handler(number, frame)

signal.signal(signal.SIGINT, interrupted)

def counted(*arguments):
    global left
    result = step(*arguments)
    with lock:
        left -= 1
        stop = left == 0
    if stop:
        os.kill(os.getpid(), {how:d})
        handled.wait()
    return result

owner = os if "{name}" == "pwrite" else PartialOutput
step = getattr(owner, "{name}")
setattr(owner, "{name}", counted)
main()
"""


def run_until(
    name: str, count: int, how: signal.Signals, *arguments: object, chunk: int = CHUNK
) -> subprocess.CompletedProcess[str]:
    """Run a command that sends itself the signal ``how`` after its step ``name`` for the ``count``-th time.

    ``name``: "pwrite", bytes that are written to a file; or "record", an extent that is on disk, and known to be. A
    command that ends before that is not stopped.
    """
    script = _SCRIPT.format(name=name, count=count, how=how, chunk=chunk, chunks=CHUNKS)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
