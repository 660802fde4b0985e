"""A conversion, a sample, a save: killed before any one change to the disk, again and again, and finished by the next
run.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

import fp8ckpt.output.extents as cutting
from fp8ckpt import convert, merge, sample
from tests.adapters import PREFIX, factors, write_adapter
from tests.campaign.trial import Count, Outcome, Trial, apart, at_step, die, digests
from tests.distributed import rewrite
from tests.families.releases import RELEASES, experts_apart

_MODULE = "model.language_model.layers.0.self_attn.q_proj"  # of the sample: a new scale for it, and its siblings

Job = Callable[[Path], object]


def jobs(source: Path, plain: Path) -> dict[str, Job]:
    """What is killed, each by its name."""
    adapter = plain.with_name("adapter")
    if not adapter.exists():
        write_adapter(adapter, factors(PREFIX + _MODULE, cols=128, rows=128), lora_alpha=1)
    return {
        "to bf16": lambda out: convert(source, out, workers=2),
        "to fp8 like": lambda out: convert(plain, out, to="fp8", like=source, workers=2),
        "to fp8, fresh": lambda out: convert(plain, out, to="fp8", like=source, scales="fresh", workers=1),
        "to fp8 by a scheme": lambda out: convert(plain, out, to="fp8", scheme="per-tensor", workers=2),
        "merge": lambda out: merge(source, adapter, out, workers=2),
        "sample": lambda out: sample(out),
    }


def joined_jobs(folder: Path) -> dict[str, Job]:
    """Of sources that are stacked where the output is not, and the reverse; they are made in the folder."""
    deepseek, mistral = (RELEASES[name].write(folder / name) for name in ("DeepSeek-V3", "Mistral4"))
    convert(deepseek, folder / "stacked", layout="model")
    convert(mistral, folder / "plain")
    unstacked = rewrite(folder / "plain", folder / "unstacked", experts_apart)
    return {
        "to the model's layout": lambda out: convert(deepseek, out, layout="model", workers=2),
        "stacked to fp8": lambda out: convert(folder / "stacked", out, to="fp8", like=deepseek, workers=2),
        "stacked to fp8, fresh": lambda out: convert(
            folder / "stacked", out, to="fp8", like=deepseek, scales="fresh", workers=1
        ),
        "to stacked fp8": lambda out: convert(unstacked, out, to="fp8", like=mistral, workers=2),
    }


def cut_small(patch: Callable[..., None] = setattr) -> None:
    """So that a miniature has many extents."""
    patch(cutting, "CHUNK", 32 << 10)
    patch(cutting, "EXTENT", 64 << 10)


def killed(job: Job, out: Path, step: int) -> Outcome:
    """Do a job that dies at a step, unless that is 0."""

    def run() -> None:
        cut_small()
        at_step(step, die)
        job(out)

    return apart(run)


def kill(folder: Path, given: dict[str, Job], read: list[Path], kills: int, seed: int) -> Count:
    """Kill until so many kills were met; each job is finished in between, after one kill or several. ``read``: what the
    jobs read.
    """
    rng, count = random.Random(seed), Count("kills")
    steps: dict[str, int] = {}
    expected: dict[str, dict[str, str]] = {}
    before = [digests(path) for path in read]
    for name, job in given.items():
        with pytest.MonkeyPatch.context() as patch:  # here, so that what is loaded at a first call is so in each trial
            cut_small(patch.setattr)
            calls = at_step(0, die, patch=patch.setattr)
            job(folder / "whole")
            steps[name] = calls()
        expected[name] = digests(folder / "whole")
        shutil.rmtree(folder / "whole")
    out = folder / "out"
    while count.faults < kills:
        name = rng.choice(list(given))
        while True:
            step = rng.choice([rng.randrange(1, steps[name] + 1), steps[name] - rng.randrange(8), 10**9])
            outcome = killed(given[name], out, step)
            trial = f"{name}, step {step} of {steps[name]}"
            if outcome.kind == "named" and out.exists() and "OutputExistsError" in outcome.text:
                outcome = Outcome("done")  # it died between the rename and its end
            elif outcome.kind == "named":
                count.lost.append(f"{trial}: {outcome.text}")
            count.see(outcome, trial)
            if out.exists() and digests(out) != expected[name]:
                count.silent.append(trial)
            if outcome.kind != "killed":
                break
        if not out.exists() or os.listdir(folder) != ["out"]:
            count.lost.append(f"{name}: there is {os.listdir(folder)}")
        for path in folder.iterdir():
            shutil.rmtree(path)
    if [digests(path) for path in read] != before:
        count.lost.append("what was read has changed")
    return count


def kill_joined(folder: Path, kills: int, seed: int) -> Count:
    """As `kill`, where tensors are joined on their way."""
    sources, work = folder / "sources", folder / "work"
    sources.mkdir()
    work.mkdir()
    count = kill(work, joined_jobs(sources), [sources], kills, seed)
    count.what = "kills, of joined tensors"
    return count


def kill_ranks(folder: Path, source: Path, plain: Path, kills: int, seed: int) -> Count:
    """Kill one of two ranks that share a job: the other ends by itself, with a named error, and a run finishes it."""
    rng, count, given = random.Random(seed), Count("kills of ranks"), jobs(source, plain)
    names = [name for name in given if name != "sample"]
    expected = {}
    for name in names:
        given[name](folder / "whole")
        expected[name] = digests(folder / "whole")
        shutil.rmtree(folder / "whole")
    out = folder / "out"
    while count.faults < kills:
        name, victim, step = rng.choice(names), rng.randrange(2), rng.randrange(1, 40)
        trial = f"{name}, rank {victim}, step {step}"
        ranks = [
            Trial(partial(_rank, number, given[name], out, folder / "meet", step * (number == victim)))
            for number in range(2)
        ]
        for outcome in [rank.outcome() for rank in ranks]:
            count.see(outcome, trial)
        if not out.exists():
            count.see(killed(given[name], out, 0), f"{trial}, finished")
        if not out.exists() or digests(out) != expected[name]:
            count.silent.append(trial)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return count


def _rank(number: int, job: Job, out: Path, meet: Path, step: int) -> None:
    """One of two ranks, which dies at a step, unless that is 0."""
    import torch.distributed as dist

    cut_small()
    dist.init_process_group("gloo", f"file://{meet}", timeout=timedelta(seconds=30), rank=number, world_size=2)
    at_step(step, die)
    job(out)
