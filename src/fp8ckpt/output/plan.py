"""What every job plans before the first byte of an output: its files, and what a partial output must match."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path, PurePosixPath
from typing import Any
from zlib import crc32

import numpy as np

from fp8ckpt.errors import OutputExistsError, RanksDifferError, StorageError
from fp8ckpt.output import extents
from fp8ckpt.output.extents import Extent
from fp8ckpt.output.files import copy_whole, create, write_whole, writing_to
from fp8ckpt.output.forecast import Forecast, Room, bytes_read_for, measured_rate, refuse_unwritable, room_for
from fp8ckpt.output.layout import FileLayout
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.output.standing import identities, refuse_foreign
from fp8ckpt.output.state import Facts
from fp8ckpt.stores.store import ByteRange, File
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG
from fp8ckpt.version import __version__
from fp8ckpt.workers import share

_COPIED_AT_ONCE = 8  # files of a remote store; each takes a buffer

_SAMPLES = 512  # tensors that contents_of() reads bytes of
_SAMPLE = 4096  # bytes


@dataclass(frozen=True)
class OutputPlan:
    """The files of an output: weight files by their layouts, ``texts`` that are written anew, and ``copies`` of other
    files.

    ``inputs``: the checkpoints that are read; ``arguments``: what else decides the bytes. ``holes``: bytes of the
    weight files that are never written.
    """

    inputs: tuple[Checkpoint, ...]
    arguments: Mapping[str, Any]
    layouts: tuple[FileLayout, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    copies: Mapping[str, File] = field(default_factory=dict)
    holes: int = 0

    def __post_init__(self) -> None:
        for name, times in Counter([*(layout.name for layout in self.layouts), *self.texts, *self.copies]).items():
            path = PurePosixPath(name)
            if times > 1 or path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"{name!r}: expected the path of one file below the directory")

    @property
    def names(self) -> Set[str]:
        """Every file of the finished directory, by its path in it."""
        return self._sizes().keys()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(layout.size for layout in self.layouts)

    def begin(self, output: PartialOutput, written: Collection[Extent] = ()) -> dict[int, Facts]:
        """Create the directory, its empty weight files, and the small files; one process does this for all. Returns the
        records of earlier runs. Creates nothing if the output is refused or does not fit on the disk. ``written``: the
        extents in which the weight files are made, if any.
        """
        self._look(output, written).refuse_too_little()
        output.begin(self._fingerprint(output), self.names, [layout.name for layout in self.layouts])
        if not self._is_laid_out(output):
            output.state.forget()
        for layout in self.layouts:
            create(output.directory / layout.name, layout.size)
        for name, text in self.texts.items():
            write_whole(output.directory / name, text)
        at_once = max((file.store.at_once for file in self.copies.values()), default=1)
        copy = [lambda copied: copy_whole(copied[1], output.directory / copied[0])] * min(at_once, _COPIED_AT_ONCE)
        share(self.copies.items(), copy)
        return output.records()

    def forecast(
        self,
        output: PartialOutput,
        extents: Mapping[int, Extent],
        made_of: Mapping[str, int],
        notes: tuple[str, ...] = (),
    ) -> Forecast:
        """What would be done, as far as it is known in advance; raises what `begin` would raise, except `NoRoomError`.

        ``extents`` by their numbers; ``made_of``: the number of source bytes of each tensor of the output.
        """
        room = self._look(output, extents.values())
        refuse_unwritable(room.where)
        done = output.records() if self._is_laid_out(output) else {}
        resumed = sum(extent.nbytes for i, extent in extents.items() if i in done)
        read = bytes_read_for((extent for i, extent in extents.items() if i not in done), made_of)
        write = sum(self._sizes().values()) - self.holes - resumed
        rate = measured_rate(room.where, write) if room.fits and not output.goal.in_parts else None
        return Forecast(
            destination=output.destination,
            files=len(self.names),
            bytes_to_read=read + sum(file.stat.size for file in self.copies.values()),
            bytes_to_write=write,
            bytes_to_upload=write if output.goal.in_parts else 0,
            bytes_resumed=resumed,
            where=room.where,
            bytes_needed=room.needs,
            bytes_free=room.free,
            fits=room.fits,
            bytes_per_second=rate,
            seconds=None if rate is None else write / rate,
            notes=notes,
        )

    def _look(self, output: PartialOutput, written: Iterable[Extent]) -> Room:
        """Refuse what `begin` would refuse, and return the disk space. Creates and changes nothing."""
        paths = [(file.store.path, file.name) for file in self.copies.values()]
        refuse_written(output, [path / name for path, name in paths if path is not None])
        output.look(self._fingerprint(output), self.names)
        sizes = {output.directory / name: size for name, size in self._sizes().items()}
        sent = sum(extent.nbytes for extent in written if extent.whole) if output.goal.in_parts else 0
        return room_for(sizes, self.holes + sent)

    def _sizes(self) -> dict[str, int]:
        """The size in bytes of every file of the finished directory, by its path in it."""
        return {
            **{layout.name: layout.size for layout in self.layouts},
            **{name: len(text) for name, text in self.texts.items()},
            **{name: file.stat.size for name, file in self.copies.items()},
        }

    def _is_laid_out(self, output: PartialOutput) -> bool:
        """Whether all weight files exist, with their final sizes."""
        try:
            return all((output.directory / layout.name).stat().st_size == layout.size for layout in self.layouts)
        except FileNotFoundError:
            return False

    def refuse_changes(self) -> None:
        """Raise `SourceChangedError` if a file that is read has changed since it was opened."""
        stores = [*(checkpoint.store for checkpoint in self.inputs), *(file.store for file in self.copies.values())]
        for store in {id(store): store for store in stores}.values():
            store.refuse_changes()

    def publish(self, output: PartialOutput) -> None:
        """Make the finished directory appear, unless one of its sources has changed, or one of its files."""
        self.refuse_changes()
        refuse_foreign(output.partial, self.names)
        for name, size in self._sizes().items():
            with writing_to(output.directory / name):
                if (output.directory / name).stat().st_size != size:
                    raise StorageError.of_another_hand(file=str(output.directory / name), size=size)
        output.publish()

    def said(self, output: PartialOutput) -> dict[str, Any]:
        """What every rank that writes this output must state of it; see `refuse_unlike`."""
        read = [contents_of(checkpoint) for checkpoint in self.inputs]
        return {**said_of(output), **self.arguments, "what is read": read, "what is planned": self._digest()}

    def _fingerprint(self, output: PartialOutput) -> dict[str, Any]:
        """What must be equal to resume a partial output: the files that are read, and all bytes that are planned."""
        sources = [_versions(checkpoint) for checkpoint in self.inputs]
        sources.append({name: [*file.stat] for name, file in sorted(self.copies.items())})
        return {
            "format": 8,
            **self.arguments,
            "chunk": extents.CHUNK,
            "extent": output.goal.extent,
            "sources": sources,
            "planned": self._digest(),
        }

    def _digest(self) -> str:
        """A digest of all bytes that are known before the first is written."""
        digest = hashlib.sha256()
        for layout in self.layouts:
            digest.update(layout.head)
        for name, text in sorted(self.texts.items()):
            digest.update(name.encode() + b"\0" + text)
        return digest.hexdigest()


def _versions(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """The size, version, and digest of the header of a checkpoint's files that decide what is read from it."""
    files = checkpoint.store.files()
    others = [checkpoint.index_name, CONFIG, MODELOPT_CONFIG, MISTRAL_CONFIG]
    texts = {header.file.name: hashlib.sha256(header.text).hexdigest() for header in checkpoint.files}
    names = sorted([*texts, *(name for name in others if name and name in files)])
    return {name: [*files[name], texts.get(name)] for name in names}


def contents_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What ranks can compare that read copies of a checkpoint on their own disks: digests of the configuration, of the
    headers with names and sizes of files, and of bytes from the middle of up to some hundreds of tensors. For a remote
    store, the versions of its files instead of bytes.
    """
    names = [[[header.file.name, header.size] for header in checkpoint.files], sorted(checkpoint.tensors)]
    said = {
        "headers": _digest_of([json.dumps(names).encode(), *(header.text for header in checkpoint.files)]),
        "configuration": _digest_of([json.dumps(checkpoint.config, sort_keys=True).encode()]),
    }
    if checkpoint.store.path is None:
        return {**said, "versions": _digest_of([header.file.stat.version.encode() for header in checkpoint.files])}
    spans = [span for header in checkpoint.files for span in header.spans if span.nbytes]
    spans = sorted(
        nsmallest(_SAMPLES, spans, key=lambda span: crc32(span.name.encode(errors="replace"))),
        key=lambda span: span.whole,
    )
    sizes = [min(_SAMPLE, span.nbytes) for span in spans]
    starts = [span.start + (span.nbytes - size) // 2 for span, size in zip(spans, sizes, strict=True)]
    found = np.empty(sum(sizes), np.uint8)
    parts = np.split(found, np.cumsum(sizes)[:-1])
    wanted = [ByteRange(span.file.name, at, at + n) for span, at, n in zip(spans, starts, sizes, strict=True)]
    checkpoint.store.read(wanted, parts)
    return {**said, "bytes": _digest_of([found.tobytes()])}


def _digest_of(texts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def said_of(output: PartialOutput) -> dict[str, Any]:
    """What ranks that write together state of any output."""
    return {"the version of fp8ckpt": __version__, "the destination": str(output.destination)}


def refuse_unlike(said: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RanksDifferError` unless all ranks, given in their order, state the same of what they make together."""
    for rank, other in enumerate(said):
        for what in {**said[0], **other}:
            if other.get(what) != said[0].get(what):
                raise RanksDifferError.of(what=what, rank=rank, other=other.get(what), first=said[0].get(what))


def refuse_shared(output: PartialOutput, checkpoint: Checkpoint, what: str) -> None:
    """Raise if the output would be written into a checkpoint that is read (``what`` it is), or if the checkpoint lies
    in the output's place; by whatever paths the two are given.
    """
    if (path := checkpoint.store.path) is None:
        inside = f"{output.destination}/".startswith(checkpoint.store.where.rstrip("/") + "/")
    else:
        refuse_written(output, [path, *(path / header.file.name for header in checkpoint.files)])
        read, places = _identity(path), (Path(output.destination), output.partial)
        inside = any(read in map(_identity, _with_parents(place)) for place in places)
    if inside:
        where = path or checkpoint.store.where
        raise OutputExistsError.of_inside(file=str(output.destination), what=what, where=where)


def refuse_written(output: PartialOutput, read: Iterable[Path]) -> None:
    """Raise if one of these files or directories is ``DST.partial``, or in it, or linked to something in it."""
    written = identities(output.partial)
    if not written:
        return
    for path in read:
        if not written.isdisjoint(map(_identity, _with_parents(path))):
            raise OutputExistsError.of_read(file=str(output.partial), path=path)


def _with_parents(path: Path) -> tuple[Path, ...]:
    """A path without links, and every directory above it."""
    resolved = Path(os.path.realpath(path))  # Path.resolve() raises for cyclic links
    return resolved, *resolved.parents


def _identity(path: Path) -> tuple[int, int] | None:
    """The device and inode numbers of what a path leads to, if anything: the same by every name."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
