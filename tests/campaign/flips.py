"""Single bits that flip: every one of a partial output's state, of headers and of scales."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fp8ckpt import open_checkpoint
from fp8ckpt.errors import Fp8CheckpointError, ResumeMismatchError
from fp8ckpt.output.partial import PartialOutput
from tests.campaign.kills import jobs, killed
from tests.campaign.trial import Count, digests
from tests.miniatures import families


def flipped(data: bytes, stride: int = 1) -> Iterator[tuple[str, bytes]]:
    """The data with each of its bits flipped, one at a time (or every ``stride``-th of them), and which it was."""
    raw = bytearray(data)
    for bit in range(0, 8 * len(raw), stride):
        raw[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} of {8 * len(raw)}", bytes(raw)
        raw[bit // 8] ^= 1 << bit % 8


def flip_state(folder: Path, source: Path, plain: Path, ends: int, seed: int, stride: int = 1) -> Count:
    """Every bit of the plan is noticed, and no bit of the records makes one be believed that was not written. ``ends``:
    so many flips, of any of these bits, are carried to the end of a run.
    """
    rng, count = random.Random(seed), Count("flips of state")
    for name, job in jobs(source, plain).items():
        if name == "sample":  # which writes all again
            continue
        assert killed(job, folder / "out", 0).kind == "done"
        expected = digests(folder / "out")
        shutil.rmtree(folder / "out")
        output, true = PartialOutput(folder / "out"), dict[int, object]()
        for step in range(45, 1000, 5):  # at which an extent was recorded: workers take their steps in no order
            cut = killed(job, folder / "out", step)
            assert cut.kind == "killed", cut
            if true := {**output.records()}:
                break
            shutil.rmtree(output.partial)
        plan, state = output._recorded_plan(), output.partial / ".fp8ckpt"
        shutil.copytree(output.partial, folder / "kept")
        names = {
            file.relative_to(output.directory).as_posix() for file in output.directory.rglob("*") if file.is_file()
        }
        files = {file: file.read_bytes() for file in state.iterdir() if file.name != "lock"}
        for file, data in files.items():
            for which, raw in flipped(data, stride):
                count.trials += 1
                count.faults += 1
                file.write_bytes(raw)
                trial = f"{name}, {file.name}, {which}"
                if file.name == "plan.json":
                    try:
                        output.look(plan, names)
                        count.silent.append(trial)
                    except ResumeMismatchError:
                        count.refused += 1
                elif not output.records().items() <= true.items():
                    count.silent.append(trial)
            file.write_bytes(data)
        for _ in range(ends):
            shutil.rmtree(folder / "out.partial", ignore_errors=True)
            shutil.copytree(folder / "kept", folder / "out.partial")
            file = rng.choice(list(files))
            raw = bytearray(files[file])
            at = rng.randrange(8 * len(raw))
            raw[at // 8] ^= 1 << at % 8
            file.write_bytes(raw)
            trial = f"{name}, {file.name}, bit {at}, to the end"
            outcome = killed(job, folder / "out", 0)
            count.see(outcome, trial)
            if outcome.kind == "done" and digests(folder / "out") != expected:
                count.silent.append(trial)
            if outcome.kind == "named" and (folder / "out").exists():
                count.lost.append(trial)
            shutil.rmtree(folder / "out", ignore_errors=True)
        for path in folder.iterdir():
            shutil.rmtree(path)
    return count


def flip_scales(folder: Path, most: int) -> Count:
    """Every bit of the first ``most`` bytes of every family's scales: refused, or the values are those that the oracle
    makes of what is there.
    """
    count = Count("flips of scales")
    for name, family in families().items():
        source = family.write(folder / "fp8", files=1)
        file, spans = source / "model.safetensors", open_checkpoint(source).files[0].spans
        whole = file.read_bytes()
        for codes, (scale, _) in family.blocks.items():
            start = next(span.start for span in spans if span.name == scale)
            stored = family.tensors[scale]
            for which, raw in flipped(stored.data[:most]):
                file.write_bytes(whole[:start] + raw + whole[start + len(raw) :])
                count.trials += 1
                count.faults += 1
                try:
                    values = open_checkpoint(source).read(family.name(codes))
                except Fp8CheckpointError:
                    count.refused += 1
                    continue
                there = stored._replace(data=raw + stored.data[len(raw) :])
                expected = replace(family, tensors={**family.tensors, scale: there}).expected()[family.name(codes)]
                if values.contiguous().view(torch.uint8).numpy().tobytes() != expected.data:
                    count.silent.append(f"{name}, {which}")
        shutil.rmtree(source)
    return count
