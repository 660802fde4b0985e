"""What every job plans before the first byte of an output: its files, and what a partial output must match to be taken
up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fp8ckpt.engine as writing
from fp8ckpt.engine import Facts
from fp8ckpt.errors import OutputExistsError
from fp8ckpt.output.files import copy_whole, create, write_whole
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.tensors.checkpoint import Checkpoint


@dataclass(frozen=True)
class OutputPlan:
    """The files of an output: those of weights by their layouts, ``texts`` to be written anew, and ``copies`` of
    others.

    ``inputs``: the checkpoints that are read; ``arguments``: what else decides the bytes.
    """

    inputs: tuple[Checkpoint, ...]
    arguments: Mapping[str, Any]
    layouts: tuple[FileLayout, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every file of the finished directory, by its path in it."""
        return {layout.name for layout in self.layouts} | set(self.texts) | set(self.copies)

    @property
    def nbytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(layout.size for layout in self.layouts)

    def begin(self, output: PartialOutput) -> dict[int, Facts]:
        """What one process does for all: the directory, its empty files, and the small files. Returns what was done
        before.
        """
        output.begin(self._fingerprint(), self.names)
        for layout in self.layouts:
            create(output.directory / layout.name, layout.size)
        for name, text in self.texts.items():
            write_whole(output.directory / name, text)
        for name, file in self.copies.items():
            copy_whole(file, output.directory / name)
        return output.records()

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a partial output to be taken up: the files that are read, and every byte that is
        planned.
        """
        digest = hashlib.sha256()
        for layout in self.layouts:
            digest.update(layout.head)
        for name, text in sorted(self.texts.items()):
            digest.update(name.encode() + b"\0" + text)
        sources = [
            {
                header.file.name: [header.size, header.file.stat().st_mtime_ns, hashlib.sha256(header.text).hexdigest()]
                for header in checkpoint.files
            }
            for checkpoint in self.inputs
        ]
        return {
            "format": 2,
            **self.arguments,
            "extent": writing.EXTENT,
            "sources": sources,
            "planned": digest.hexdigest(),
        }


def refuse_inside(output: PartialOutput, checkpoint: Checkpoint, what: str) -> None:
    """A destination inside what is read would be read as part of it."""
    if output.destination.resolve().is_relative_to(checkpoint.path.resolve()):
        found = f"the destination lies inside the {what} {checkpoint.path}"
        raise OutputExistsError(
            found, file=str(output.destination), expected="a path outside it", remedy="choose another one"
        )
