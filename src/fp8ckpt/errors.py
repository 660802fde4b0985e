"""Every refusal has a name::

    Fp8CheckpointError
    ├── CheckpointNotFoundError   (FileNotFoundError)  no such directory, file or cached hub id
    ├── HeaderError               (ValueError)  a safetensors header that is malformed or lies
    │   └── TruncatedFileError                  the file holds fewer bytes than its header says
    ├── IndexMismatchError        (ValueError)  the index and the headers disagree
    ├── ConfigError               (ValueError)  config.json cannot be understood
    ├── MissingScaleError         (ValueError)  an FP8 weight without a scale
    ├── OrphanScaleError          (ValueError)  a scale without an FP8 weight
    ├── AmbiguousScaleError       (ValueError)  two scales for one weight
    ├── ScaleShapeError           (ValueError)  a scale that does not tile its weight
    ├── ScaleDtypeError           (ValueError)  a scale of a dtype that no FP8 family uses
    ├── ScaleValueError           (ValueError)  a scale that is NaN, infinite, zero or negative
    ├── WeightValueError          (ValueError)  a weight that cannot be quantized: it is not finite
    ├── UnsupportedFormatError    (ValueError)  packed or integer weights: recognised, not handled
    ├── UnknownTensorError        (KeyError)    no tensor of that name
    ├── RegionError               (IndexError)  offsets and sizes outside the tensor
    ├── RangeError                (OverflowError)  finite codes that the target dtype cannot hold
    ├── ModelMismatchError        (ValueError)  the model and the checkpoint do not hold the same tensors
    ├── ServingError              (ValueError)  a serving engine would refuse the directory, or serve something else
    ├── OutputExistsError         (FileExistsError)  the destination is there already
    ├── OutputBusyError           (RuntimeError)  another process is writing the destination
    ├── RankLostError             (RuntimeError)  another rank ended, or did not answer
    ├── RanksDifferError          (ValueError)  ranks that load or write together were not given the same
    ├── ResumeMismatchError       (RuntimeError)  a partial output of some other conversion
    ├── UnsupportedSystemError    (ImportError) Windows, or another system without what POSIX promises of files
    ├── MissingPackageError       (ImportError) a package is needed that only an extra brings
    ├── SourceChangedError        (RuntimeError)  a file that is read was written to meanwhile
    ├── UnsupportedStoreError     (ValueError)  the URL of a store that cannot be read, or written
    └── StorageError              (OSError)     the disk refused a read or a write, or what should be a file is none
        └── NoRoomError                         the disk has less room than the output needs

Each message has the form *tensor, file, found, expected, what to do*, on one line. Names that come from a file are
shown with control characters escaped and shortened, so that no input can break the line.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol, Self

_MOST_NAMES = 10  # in one message
_LONGEST_NAME = 200  # characters; a header may hold names of megabytes


# What to do about a file that is not what it should be. It may be of a release or the user's own: nothing is fetched
# into a directory of other weights, nothing is removed, and nothing is stated that the weights were not made with.
_COPY = "compare it with what it was copied from, or have it written anew"
_INDEX = "take the index that was written with these files; without any, all files are read"
SAME_PLACE = "get it from where the other files came from, and from nowhere else"

# What helps, by what the operating system says: anywhere, where something is read, and where it is written. None of it
# can lose anything.
_UNREACHABLE = "see that the file server answers, and run it again"
_ANYWHERE = {
    errno.EIO: "check the disk",
    errno.ESTALE: "the file server has something else there by now: run it again",
    **dict.fromkeys((errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN), _UNREACHABLE),
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the limit on open files",
    errno.ELOOP: "mend the links",
}
_READING = dict.fromkeys((errno.EACCES, errno.EPERM), "get the permission to read it")
_WRITING = {
    errno.ENOSPC: "free some space (or inodes, if there is space)",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EACCES: "get the permission, or choose another place",
    errno.EPERM: "get the permission, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a place below a directory",
    errno.ELOOP: "mend the links, or choose another place",
    errno.EFBIG: "raise the limit on the size of files, or choose a file system that takes larger ones",
}


def remedy_for(error: OSError, otherwise: str, *, writing: bool) -> str:
    """What to do about an error of the operating system."""
    return {**_ANYWHERE, **(_WRITING if writing else _READING)}.get(error.errno or 0, otherwise)


def shown(text: object) -> str:
    """``text`` as it may appear inside a one-line message."""
    clean = str(text)[: _LONGEST_NAME + 1]
    if not clean.isprintable():
        escaped = (c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in clean)
        clean = "".join(escaped)
    return clean if len(clean) <= _LONGEST_NAME else clean[:_LONGEST_NAME] + "..."


def listed(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(shown(name) for name in names[:_MOST_NAMES]) + more


class Fp8CheckpointError(Exception):
    """Base of all errors raised by fp8ckpt.

    Attributes: ``tensor`` and ``file`` (names, or None), ``found``, ``expected``, ``remedy`` (texts, or None). A tensor
    of a checkpoint may be given itself, which says its file, too.

    >>> try:
    ...     fp8ckpt.open_checkpoint("nowhere/at/all")
    ... except fp8ckpt.Fp8CheckpointError as error:
    ...     print(type(error).__name__, error.remedy)
    CheckpointNotFoundError check the path
    """

    def __init__(
        self,
        found: str,
        *,
        tensor: str | Readable | None = None,
        file: object = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if tensor is not None and not isinstance(tensor, str):
            file, tensor = tensor.span.file, tensor.name
        self.tensor = tensor
        self.file = None if file is None else str(getattr(file, "name", file))
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(found)

    @property
    def message(self) -> str:
        """The one line that says it all. Composed when it is asked for: a hostile file has 200,000 defects."""
        subject = " in ".join(shown(part) for part in (self.tensor, self.file) if part is not None)
        message = f"{subject}: {self.found}" if subject else self.found
        if self.expected is not None:
            message += f"; expected {self.expected}"
        return message if self.remedy is None else f"{message}; {self.remedy}"

    @property
    def facts(self) -> dict[str, str | None]:
        """What it says besides ``found``, by the names of the arguments."""
        return {"tensor": self.tensor, "file": self.file, "expected": self.expected, "remedy": self.remedy}

    def but(self, **other: str | None) -> Self:
        """The same error with some of its `facts` replaced."""
        return type(self)(self.found, **{**self.facts, **other})

    def advising(self, more: str) -> Self:
        """The same error, with more that can be done about it."""
        return self.but(remedy=more if self.remedy is None else f"{self.remedy}; {more}")

    def __str__(self) -> str:  # KeyError would print the repr, OSError its errno
        return self.message

    def __reduce__(self) -> tuple[object, ...]:  # survives the pickling that ranks and processes need
        return partial(type(self), self.found, **self.facts), ()


class Named(Protocol):
    """What has a name: a file of a store, or a path."""

    @property
    def name(self) -> str:
        """As a message shows it."""


class Stored(Protocol):
    """What a message says of a stored tensor: its key, where it lies, dtype and shape as the header has them."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Named: ...

    @property
    def span(self) -> Stored: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Readable(Protocol):
    """A tensor of a checkpoint: what is stored of it, whole or in codes, is its ``span``."""

    @property
    def name(self) -> str: ...

    @property
    def span(self) -> Stored: ...


class CheckpointNotFoundError(Fp8CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path, nor a cached one of that hub id."""


class _JsonError(Fp8CheckpointError, ValueError):
    """JSON that is none, or is more than it may be: the part that headers and configurations have in common."""

    @classmethod
    def of_text(cls, file: Named, found: str, expected: str) -> Self:
        return cls(found, file=file, expected=expected, remedy=_COPY)

    @classmethod
    def of_key(cls, file: Named, key: str) -> Self:
        remedy = "have it written anew: it does not say which of the two is meant"
        return cls("the name occurs twice", tensor=key, file=file, expected="each name once", remedy=remedy)


class HeaderError(_JsonError):
    """A safetensors header is malformed, or claims what cannot be."""

    @classmethod
    def of_length(cls, file: Named, length: int, most: int) -> HeaderError:
        found = f"the header claims {length} bytes"
        remedy = f"if it is meant to be a safetensors file, {_COPY}"
        return cls(found, file=file, expected=f"at most {most}", remedy=remedy)

    @classmethod
    def of_metadata(cls, file: Named) -> HeaderError:
        found = "__metadata__ is something else"
        return cls(found, file=file, expected="a map of text to text", remedy="have it written anew")

    @classmethod
    def of_entry(cls, file: Named, tensor: str, entry: str) -> HeaderError:
        """``entry``: what stands for the tensor, as JSON."""
        found = f"the entry {shown(entry)} is malformed"
        expected = "a dtype, a shape of whole numbers and two data offsets"
        return cls(found, tensor=tensor, file=file, expected=expected, remedy="have it written anew")

    @classmethod
    def of_dtype(cls, file: Named, tensor: str, dtype: str, known: Iterable[str]) -> HeaderError:
        found, expected = f"unknown dtype {shown(dtype)}", f"one of {', '.join(known)}"
        remedy = "use the tool that wrote it, or a newer version of fp8ckpt"
        return cls(found, tensor=tensor, file=file, expected=expected, remedy=remedy)

    @classmethod
    def of_offsets(cls, file: Named, tensor: str, offsets: tuple[int, int], needed: str) -> HeaderError:
        """``offsets`` of the data; ``needed``: what they should hold."""
        begin, end = offsets
        found = f"data_offsets [{begin}, {end}] hold {end - begin} bytes"
        return cls(found, tensor=tensor, file=file, expected=needed, remedy=_COPY)

    @classmethod
    def of_place(cls, stored: Stored, start: int, end: int, previous: str) -> HeaderError:
        """``start``: where the tensor's data begins; ``end``: where it should, after ``previous``."""
        what = "overlaps" if start < end else f"leaves a hole of {start - end} bytes after"
        found = f"its data begins at byte {start} and {what} {shown(previous)}"
        return cls(found, tensor=stored, expected=f"byte {end}", remedy=_COPY)

    @classmethod
    def of_rest(cls, file: Named, rest: int, end: int) -> HeaderError:
        """Bytes that belong to no tensor; the data ends at ``end``."""
        found = f"{rest} bytes follow the last tensor"
        return cls(found, file=file, expected=f"a file of {end} bytes", remedy=_COPY)

    @classmethod
    def of_many(cls, file: Named, most: int) -> HeaderError:
        return cls(f"more than {most} defects; the rest was not looked at", file=file, remedy=_COPY)

    @classmethod
    def of_two(cls, stored: Stored, other: str) -> HeaderError:
        """The tensor ``stored`` is in the file or under the key ``other`` as well."""
        remedy = "open the one file that is meant, or write an index that names the model's files"
        return cls(f"it is in {shown(other)} as well", tensor=stored, expected="each name once", remedy=remedy)

    @classmethod
    def of_halves(cls, stored: Stored) -> HeaderError:
        return cls(
            f"{stored.dtype} {stored.shape} in four bits has rows that are no whole bytes",
            tensor=stored,
            expected="rows of an even number of elements",
            remedy=_COPY,
        )


class TruncatedFileError(HeaderError):
    """A file holds fewer bytes than its header describes."""

    @classmethod
    def of(cls, file: Named, found: str, least: str) -> TruncatedFileError:
        return cls(found, file=file, expected=least, remedy=_COPY)


class IndexMismatchError(Fp8CheckpointError, ValueError):
    """The index and the files' own headers disagree, or the index names a file outside the directory."""

    @classmethod
    def of_unnamed(cls, file: str, index: str) -> IndexMismatchError:
        found = f"the index {index} does not name this file"
        remedy = "--follow-index (follow_index=True) reads what the index lists, and copies this file as it is"
        return cls(found, file=file, expected="every file in it", remedy=remedy)

    @classmethod
    def of_place(cls, tensor: str, index: str, listed: str | None, actual: str | None) -> IndexMismatchError:
        """A tensor that is ``listed`` for another file than the ``actual`` one; either may be none."""
        expected, remedy = "the index and the headers to agree", _INDEX
        if listed is None:
            found = f"{shown(actual)} holds a tensor that the index {index} does not list"
            remedy = "--follow-index (follow_index=True) reads what the index lists, and leaves this tensor out"
        elif actual is None:
            found = f"{shown(listed)} does not hold this tensor, and the index {index} says that it does"
        else:
            found = f"the index {index} says {shown(listed)}, and it is in {shown(actual)}"
        return cls(found, tensor=tensor, file=index, expected=expected, remedy=remedy)

    @classmethod
    def of_json(cls, index: str, error: Fp8CheckpointError) -> IndexMismatchError:
        return cls(error.found, **{**error.facts, "file": index})

    @classmethod
    def of_kind(cls, index: str) -> IndexMismatchError:
        expected = '{"weight_map": {tensor: file}}'
        return cls("it has no weight_map of names to files", file=index, expected=expected, remedy=_INDEX)

    @classmethod
    def of_path(cls, index: str, name: str) -> IndexMismatchError:
        remedy = "do not use this checkpoint unless you know who wrote it"
        expected = "the name of a file in the directory"
        return cls(f"it names the file {shown(name)}", file=index, expected=expected, remedy=remedy)

    @classmethod
    def of_absent(cls, index: str, tensor: str, name: str, where: str) -> IndexMismatchError:
        """It names a file that is not there, for the tensor among others."""
        found, expected = f"the file {shown(name)} is not there", f"{shown(name)} in {where}"
        return cls(found, tensor=tensor, file=index, expected=expected, remedy=f"{SAME_PLACE}; or {_INDEX}")

    @classmethod
    def of_part(cls, file: str, part: str, count: int) -> IndexMismatchError:
        """One of ``count`` parts is not there, by the name of another."""
        found, expected = f"the part {shown(part)} is not there", f"all of the {count} parts"
        return cls(found, file=file, expected=expected, remedy=SAME_PLACE)

    @classmethod
    def of_size(cls, index: str, stated: object, actual: int) -> IndexMismatchError:
        """A ``total_size`` that is not the tensors' own, in bytes."""
        found = f"metadata.total_size is {shown(stated)}; the tensors take {actual} bytes"
        return cls(found, file=index, remedy="nothing reads it wrong; convert writes the index anew")


class ConfigError(_JsonError):
    """``config.json`` (or ``hf_quant_config.json``, ``params.json``) cannot be understood."""

    @classmethod
    def of_quantization(cls, file: str, stated: object) -> ConfigError:
        """A statement of quantization that is no object."""
        remedy = "state what the file that came with these weights states"
        return cls(
            f"what it states of quantization is {shown(repr(stated))}", file=file, expected="an object", remedy=remedy
        )

    @classmethod
    def of_block_size(cls, file: str, found: str, expected: str) -> ConfigError:
        """A block size that is none, or one of several for the same modules."""
        return cls(found, file=file, expected=expected, remedy="state the one that the scales were made with")


class MissingScaleError(Fp8CheckpointError, ValueError):
    """An FP8 weight has no scale: its codes are not its values."""

    @classmethod
    def of(cls, weight: Stored, expected: str, near: str | None) -> MissingScaleError:
        """``expected``: the name that its scale could have; ``near``: what may be it under another name."""
        found = f"{weight.dtype} weight without a scale"
        if near is not None:
            found += f" (is {shown(near)} its scale, misnamed?)"
        remedy = "look for it in the other files that belong to this one, or under another name"
        remedy += "; if the weights were only cast to FP8, without any, use the tool that did: fp8ckpt cannot know"
        return cls(found, tensor=weight, expected=shown(expected), remedy=remedy)


class OrphanScaleError(Fp8CheckpointError, ValueError):
    """A scale belongs to no FP8 weight."""

    @classmethod
    def of(cls, scale: Stored, weight: str, stored: Stored | None) -> OrphanScaleError:
        """``weight``: the name of the weight that it could scale; ``stored``: what is there instead of FP8."""
        found = "a scale without a weight"
        if stored is not None:
            found = f"the scale of a weight of dtype {stored.dtype}, which is not FP8"
        remedy = "look for the weight in the other files that belong to this one, or ask who wrote it what became of it"
        return cls(found, tensor=scale, expected=f"an FP8 tensor {shown(weight)}", remedy=remedy)


class AmbiguousScaleError(Fp8CheckpointError, ValueError):
    """More than one tensor could be the scale of one weight."""

    @classmethod
    def of(cls, weight: Stored, scales: Sequence[str]) -> AmbiguousScaleError:
        found = f"its scale could be any of {', '.join(shown(key) for key in scales)}"
        remedy = "ask who wrote the file which of them the codes were made with"
        return cls(found, tensor=weight, expected="one scale", remedy=remedy)


class ScaleShapeError(Fp8CheckpointError, ValueError):
    """A scale does not tile its weight."""

    @classmethod
    def of(
        cls, weight: Stored, scale: Stored, block_size: tuple[int, ...] | None, fit: tuple[int, ...] | None
    ) -> ScaleShapeError:
        """``block_size``: the module's, as the configuration states it; ``fit``: the scales' shape that it asks for."""
        found = f"scale shape {scale.shape} in {shown(scale.file.name)} does not fit weight {weight.shape}"
        if fit is None:
            expected = "one element, or one a row"
            remedy = "if they are of blocks, state the size that they were made with (weight_block_size in config.json)"
            if scale.dtype in ("U8", "F8_E8M0"):
                remedy += "; ComfyUI's exponents are in another order, and not read"
        else:
            found += f" with block size {block_size}"
            expected = str(fit)
            remedy = "see whether the configuration is that of these weights; if it is, the scales are not"
        return cls(found, tensor=weight, expected=expected, remedy=remedy)

    @classmethod
    def of_group(cls, weight: Stored, scale: Stored, stated: int, group: int) -> ScaleShapeError:
        """``stated``: how many codes of four bits the configuration has share a scale; ``group``: how many do."""
        found = f"scale shape {scale.shape} in {shown(scale.file.name)} is of groups of {group}, group_size is {stated}"
        remedy = "state the group_size of the scales, wherever a configuration file has one: engines size them by it"
        expected = f"group_size {group}, by the scales' dtype {scale.dtype}"
        return cls(found, tensor=weight, expected=expected, remedy=remedy)


class ScaleDtypeError(Fp8CheckpointError, ValueError):
    """A scale has a dtype that no FP8 family uses."""

    @classmethod
    def of(cls, weight: Stored, scale: Stored, known: Iterable[str]) -> ScaleDtypeError:
        found = f"its scale {shown(scale.name)} in {shown(scale.file.name)} has dtype {scale.dtype}"
        expected = f"one of {', '.join(known)}"
        return cls(found, tensor=weight, expected=expected, remedy="use the tool that wrote it")


class ScaleValueError(Fp8CheckpointError, ValueError):
    """A scale is NaN, infinite, zero or negative."""

    @classmethod
    def of(cls, scale: Stored, found: str) -> ScaleValueError:
        """``found``: how many cannot be scales, and the first of them."""
        return cls(found, tensor=scale, expected="finite and positive", remedy=_COPY)


class WeightValueError(Fp8CheckpointError, ValueError):
    """A weight holds NaN or infinity, and has no FP8 code."""

    @classmethod
    def of(cls, tensor: str, file: object, found: str) -> WeightValueError:
        """``found``: how many elements are no numbers; ``file``: where they are read, None for those of a model."""
        remedy = (
            "find out where they come from: training that diverged, or NaN codes of an FP8 source (verify counts them)"
        )
        return cls(found, tensor=tensor, file=file, expected="finite weights", remedy=remedy)

    @classmethod
    def of_nonfinite(cls, tensor: str, file: object, count: int, numel: int) -> WeightValueError:
        return cls.of(tensor, file, f"{count} of {numel} elements are NaN or infinite, and have no code")


class UnsupportedFormatError(Fp8CheckpointError, ValueError):
    """Packed or integer quantization: recognised, and not handled."""

    @classmethod
    def of_packed(cls, weight: Stored) -> UnsupportedFormatError:
        found = f"{weight.dtype} {weight.shape} is packed or integer (INT8, INT4, FP6), which fp8ckpt does not read"
        expected = "FP8, MXFP4 or NVFP4"
        return cls(found, tensor=weight, expected=expected, remedy="use the tool that wrote it")

    @classmethod
    def of_factor(cls, weight: Stored, second: str) -> UnsupportedFormatError:
        """``second``: the name of what scales the codes besides their scale."""
        found = f"{shown(second)} is a second factor or a zero point, which fp8ckpt does not apply"
        remedy = "use the tool that wrote it"
        return cls(found, tensor=weight, expected="one scale", remedy=remedy)

    @classmethod
    def of_order(cls, weight: Stored, scale: Stored) -> UnsupportedFormatError:
        """``scale``: exponents of blocks that may be stored in a kernel's order."""
        found = f"the {scale.dtype} scales {shown(scale.name)} may be in the order of a kernel, not that of the blocks"
        remedy = "use the tool that wrote it"
        return cls(found, tensor=weight, expected="float scales, or one", remedy=remedy)


class UnknownTensorError(Fp8CheckpointError, KeyError):
    """The checkpoint has no tensor of that name."""

    @classmethod
    def of(cls, name: str, where: object, count: int) -> UnknownTensorError:
        expected, remedy = f"one of its {count} logical tensors", "fp8ckpt inspect --tensor REGEX lists them"
        return cls("the checkpoint has no such tensor", tensor=name, file=where, expected=expected, remedy=remedy)


class RegionError(Fp8CheckpointError, IndexError):
    """Offsets and sizes reach outside the tensor."""


class RangeError(Fp8CheckpointError, OverflowError):
    """Finite values do not fit the range of the target dtype."""

    @classmethod
    def of_codes(cls, tensor: str | Readable, count: int, dtype: str) -> RangeError:
        """Finite codes whose scales take them beyond ``dtype``."""
        remedy = "compare its scale with where it came from" if dtype == "F32" else "take fp32"
        return cls(f"{count} elements of finite codes go beyond the largest {dtype}", tensor=tensor, remedy=remedy)

    @classmethod
    def of_merged(cls, tensor: str | Readable, file: object, count: int, dtype: str) -> RangeError:
        """Sums of a base and its adapters that ``dtype`` cannot hold."""
        remedy = "see that the adapter was trained on this base, and by what lora_alpha and =WEIGHT multiply it"
        found = f"{count} merged values do not fit {dtype}"
        return cls(found, tensor=tensor, file=file, expected="an adapter of this base", remedy=remedy)

    @classmethod
    def of_scale(cls, dtype: str, tensor: str, file: object, remedy: str | None, *, factor: bool) -> RangeError:
        """A new scale that ``dtype`` cannot hold, under the weight's ``factor`` or alone."""
        under = " under the weight's factor" if factor else ""
        found = f"its values need a scale beyond the range of {dtype}{under}"
        expected = "values that the base's scale dtype can scale"
        return cls(found, tensor=tensor, file=file, expected=expected, remedy=remedy)


class ModelMismatchError(Fp8CheckpointError, ValueError):
    """The model lacks tensors of the checkpoint, or the checkpoint lacks tensors of the model, or they are of other
    shapes.
    """

    @classmethod
    def of_shape(
        cls, tensor: str, file: object, found: tuple[int, ...], base: tuple[int, ...], what: str
    ) -> ModelMismatchError:
        """A tensor of ``what`` (the "source", the "model") that is of another shape than the base's."""
        remedy = "give its own base"
        if len(found) == 2 and found[1:] == base[1:]:
            instead = (
                "quantize the source with --scheme, which keeps its own configuration and tokenizer"
                if what == "source"
                else "save it in bf16 without like, put the tokenizer beside it, and convert that with --scheme"
            )
            remedy += "; for a vocabulary that was resized, which the base's configuration and tokenizer are not of: "
            remedy += f"{instead}; or resize it back: model.resize_token_embeddings({base[0]})"
        expected = f"{base}, as in the base"
        return cls(f"shape {found} in the {what}", tensor=tensor, file=file, expected=expected, remedy=remedy)


class ServingError(Fp8CheckpointError, ValueError):
    """A serving engine would refuse the directory, or serve something else than what is in it."""


class OutputExistsError(Fp8CheckpointError, FileExistsError):
    """The destination exists, and is never overwritten."""

    @classmethod
    def of_destination(cls, destination: object) -> OutputExistsError:
        remedy = "choose another one, or move it away"
        return cls("the destination exists", file=str(destination), expected="no such path", remedy=remedy)

    @classmethod
    def of_foreign(cls, partial: object, found: str) -> OutputExistsError:
        """``found``: what stands where the output would be written, and is not ours."""
        expected = "a path that is free, to write to until the output is whole"
        remedy = "move it away, or choose another destination"
        return cls(found, file=str(partial), expected=expected, remedy=remedy)


class OutputBusyError(Fp8CheckpointError, RuntimeError):
    """Another process is writing the same destination."""

    @classmethod
    def of(cls, partial: object) -> OutputBusyError:
        return cls("another process is writing it", file=str(partial), remedy="wait for it to end")


class RankLostError(Fp8CheckpointError, RuntimeError):
    """Another rank ended, or did not answer."""

    @classmethod
    def of(cls, error: RuntimeError) -> RankLostError:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "what is on disk is kept: look why it ended, and run the same again"
        return cls(f"another rank ended, or did not answer ({shown(said)})", remedy=remedy)


class RanksDifferError(Fp8CheckpointError, ValueError):
    """Ranks that make one thing together were not asked for the same, read different checkpoints, or run different
    versions.
    """

    @classmethod
    def of(cls, what: str, rank: int, other: object, first: object) -> RanksDifferError:
        """``what`` differs: it is ``other`` on a ``rank`` and ``first`` on rank 0."""
        found = f"{what} is {shown(other)} on rank {rank}, and {shown(first)} on rank 0"
        remedy = "call it with the same arguments and files on all ranks, by one version of fp8ckpt"
        return cls(found, expected="the same on all ranks", remedy=remedy)


class ResumeMismatchError(Fp8CheckpointError, RuntimeError):
    """A partial output is there, and belongs to another conversion."""

    @classmethod
    def of_other(cls, partial: object, begun: str, found: str) -> ResumeMismatchError:
        """``begun``: all that the other run left, which may be deleted."""
        remedy = f"choose another destination, or delete {begun} to begin anew, without what that run had done"
        return cls(found, file=str(partial), remedy=remedy)

    @classmethod
    def of_elsewhere(cls, partial: object, where: str) -> ResumeMismatchError:
        """A run that goes elsewhere has a destination of the same last name: no reason to delete anything."""
        remedy = "run this in another directory, or choose a destination of another last name"
        return cls(f"it is of a run that goes to {where}", file=str(partial), remedy=remedy)

    @classmethod
    def of_strange(cls, partial: object, found: str) -> ResumeMismatchError:
        """``found``: what is in a partial output, and no run of ours left it so."""
        return cls(found, file=str(partial), remedy="move it away, or choose another destination")

    @classmethod
    def of_other_weights(cls, file: str, where: str, partial: object) -> ResumeMismatchError:
        """A run was cut off in completing the parts of ``file``, and these are others."""
        found = f"a run before was cut off while its files appeared in {where}: other weights, by their MD5s"
        remedy = f"choose another destination, or save the weights of that run, which {partial} is of"
        return cls(found, file=file, remedy=remedy)


class UnsupportedSystemError(Fp8CheckpointError, ImportError):
    """The operating system does not promise of files what is needed."""

    @classmethod
    def of(cls, system: str) -> UnsupportedSystemError:
        found = f"fp8ckpt does not run on {system}"
        remedy = "on Windows, run it in WSL, the Windows Subsystem for Linux"
        return cls(found, expected="Linux or macOS", remedy=remedy)


class MissingPackageError(Fp8CheckpointError, ImportError):
    """A package is needed that only an extra of this one brings."""


class SourceChangedError(Fp8CheckpointError, RuntimeError):
    """A file of a checkpoint was written to, replaced or removed after it was opened: what was read may be a mix."""

    @classmethod
    def of(cls, file: str) -> SourceChangedError:
        remedy = "run it again once nothing writes to the file"
        return cls("it changed after it was opened", file=file, expected="the file as it was", remedy=remedy)


class UnsupportedStoreError(Fp8CheckpointError, ValueError):
    """The URL of a store that is not known, or that cannot do what is asked of it."""


class StorageError(Fp8CheckpointError, OSError):
    """The disk refused a read or a write, and the message has the operating system's reason; or there is a FIFO, a
    device, a folder, or a link that leads away, where a file should be.
    """

    @classmethod
    def of_reading(cls, error: OSError, file: object, failed: str = "cannot be opened") -> StorageError:
        remedy = remedy_for(error, "restore the file", writing=False)
        return cls(f"{failed}: {error.strerror}", file=file, remedy=remedy)

    @classmethod
    def of_writing(cls, error: OSError, file: object) -> StorageError:
        """The message has all of the path: its last part may be ours, and unknown to the user."""
        otherwise = "see that files can be made there and that nothing else changes them, and run it again"
        remedy = remedy_for(error, otherwise, writing=True)
        return cls(f"writing failed: {error.strerror}", file=str(file), remedy=remedy)


class NoRoomError(StorageError):
    """The disk has less room than the output needs. Nothing was written."""

    @classmethod
    def of(cls, where: str, needed: int, free: int) -> NoRoomError:
        """``where``: a directory of the file system; it needs so many bytes, and so many are free."""
        found = f"the output needs {needed:,} bytes more, and {free:,} are free in its file system"
        return cls(found, file=where, remedy="free some space, or choose another destination")
