"""How much of a product of cases is tested: a cover of it by `make test`, all of it by `make campaign`.

What the code does depends on one axis at a time (`each`), or on two of them (`pairs`): the cover has every value of
every axis, or every two values of two axes. That nothing depends on more is what the campaign looks for, with
FP8CKPT_TESTS=all in its environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fp8ckpt.output import extents

ALL = os.environ.get("FP8CKPT_TESTS") == "all"


def each(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases that have every value of every axis: as many as the longest axis has."""
    lists = [list(axis) for axis in axes]
    if ALL:
        return list(product(*lists))
    return [tuple(axis[i % len(axis)] for axis in lists) for i in range(max(map(len, lists)))]


def cut(patch: pytest.MonkeyPatch, chunk: int = 4096, chunks: int = 4) -> None:
    """Make the pieces of an output small: chunks of at most so many bytes, extents of so many chunks."""
    patch.setattr(extents, "CHUNK", chunk)
    patch.setattr(extents, "EXTENT", chunk * chunks)


def pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases that have every two values of every two axes: time and again the case with most that is new."""
    cases = list(product(*axes))
    if ALL:
        return cases
    of = {case: set(combinations(enumerate(case), 2)) for case in cases}
    missing, found = set().union(*of.values()), []
    while missing:
        found.append(max(cases, key=lambda case: len(of[case] & missing)))
        missing -= of[found[-1]]
    return found


def examples(count: int) -> Any:
    """hypothesis' settings: ``count`` examples in the campaign, a third of them otherwise, and others at every run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    some = count if ALL else min(count, max(20, count // 3))
    return settings(max_examples=some, deadline=None, suppress_health_check=checks)
