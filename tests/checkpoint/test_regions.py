"""What loading takes beyond the model, and how many threads a rank has."""

from __future__ import annotations

import os

import pytest
import torch

from fp8ckpt.checkpoint.regions import RegionLoader, dequantizers
from fp8ckpt.ranks import BEYOND, threads_of_this_rank


@pytest.mark.parametrize("threads", [1, 2, 16, 17, 192, 1000])
@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("meta", 10)])
def test_all_buffers_together_are_bounded(threads: int, device: str, times: int) -> None:
    """The buffers of all threads, and on a device what is made of them, stay within what the pre-flight line says."""
    loader = RegionLoader(dequantizers(threads), threads)
    size = loader._scratch(torch.device(device)).numel()
    assert size % 8 == 0
    assert 64 << 10 <= size <= 4 << 20
    assert size * threads * times <= BEYOND or size == 64 << 10


def test_a_rank_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores divided by the ranks that torchrun started here; never none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads_of_this_rank() == 12
    for ranks, threads in (("1", 12), ("5", 2), ("12", 1), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert threads_of_this_rank() == threads
