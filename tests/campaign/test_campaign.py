"""The small version of the campaign: a few trials of every kind of fault."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tests.campaign.__main__ import parts

SIZES = {
    "kills": 6, "joined_kills": 3, "rank_kills": 1, "disks": 4, "flips": 2, "stride": 211, "scale_bytes": 1,
    "headers": 2000, "directories": 5, "changes": 8, "modes": 6, "seed": 1,
}  # fmt: skip
KINDS = ("kills", "joined", "ranks", "disks", "state", "scales", "headers", "hostile", "changes", "permissions")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_silent_or_hung(kind: str, sample_fp8: Path, sample_bf16: Path, tmp_path: Path) -> None:
    """And every error has a name."""
    found = dict(parts(sample_fp8, sample_bf16, Namespace(**SIZES)))
    assert tuple(found) == KINDS
    count = found[kind](tmp_path)
    assert count.trials or "cannot be mounted" in count.what or "only root" in count.what
    assert count.wrong == []
