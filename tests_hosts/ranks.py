"""Processes that form one gloo group and stay: importing torch, transformers and a host costs each of them seconds."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

_LIMIT = 240  # seconds for one job; the first has the imports to do


class Ranks:
    """``size`` processes, started by the first job, and anew by the next one after a job that failed; they meet in
    ``folder``.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder = folder
        self._starts = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``job(*arguments)`` returns on each rank; any rank's error fails the test, with its traceback."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((job, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, _LIMIT)
            if not ready:
                self.stop()
                raise TimeoutError(
                    f"rank {[rank for rank in range(self.size) if rank not in results]} gave no answer in {_LIMIT} s"
                )
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    done, result = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    done, result = False, "it died"
                if not done:
                    self.stop()  # the others may wait for it in a collective, for ever
                    raise AssertionError(f"on rank {rank}: {result}")
                results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._starts += 1
        meeting = self._folder / f"meeting-{self._starts}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, meeting: Path, pipe: Connection) -> None:
    # As torchrun sets them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=size)
    with suppress(EOFError):  # the parent is gone
        while True:
            try:
                job, arguments = pipe.recv()
                answer = True, job(*arguments)
            except (EOFError, KeyboardInterrupt):
                raise
            except BaseException:  # DCP's errors are no Exceptions
                answer = False, traceback.format_exc()
            pipe.send(answer)
