"""The arguments of a conversion, in the one form that planning takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.plan import refuse_shared
from fp8ckpt.tensors.checkpoint import Checkpoint, CheckpointLike, open_checkpoint


@dataclass(frozen=True)
class Asked:
    """The arguments of `fp8ckpt.convert` that decide the output. ``see``: also count what the report's page shows."""

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
        """Return the open source or base, with its index followed if that was asked for."""
        return open_checkpoint(path, follow_index=self.follow_index)

    def opened_source(self, output: PartialOutput) -> Checkpoint:
        """Open the source. Raise if the output exists, or shares files with it."""
        output.goal.refuse_existing()
        given = self.opened(self.source)
        refuse_shared(output, given, "source")
        return given

    def arguments(self, **job: Any) -> dict[str, Any]:
        """Return the arguments that a partial output must match to be resumed: those of ``job``, and whether to see."""
        return {**job, **({"see": True} if self.see else {})}
