"""What a conversion was asked for, in one form that planning takes as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint


@dataclass(frozen=True)
class Asked:
    """The arguments of `fp8ckpt.convert` that decide what is written. ``see``: what a page shows is counted, too."""

    source: CheckpointLike
    to: str
    layout: str
    like: CheckpointLike | None
    scheme: str | None
    scales: str
    carry: str | None
    report: bool
    see: bool
    serving: bool
    only: str | None
    skip: str | None
    follow_index: bool

    def opened(self, path: CheckpointLike) -> Checkpoint:
        """The source or the base, with its index followed if that was asked for."""
        return open_checkpoint(path, follow_index=self.follow_index)

    def arguments(self, **job: Any) -> dict[str, Any]:
        """What a partial output must have been asked for to be taken up: of this ``job``, and whether to see."""
        return {**job, **({"see": True} if self.see else {})}
