"""What is wrong with the files of a checkpoint: headers, the index, configurations.

A bad file may belong to a release or to the user. So no remedy fetches files into a directory of other weights, removes
any, or states what the weights were not made with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Named, Says, Stored, shown

COPY = "compare it with what it was copied from, or have it written anew"
_SAME_PLACE = "get it from where the other files came from, and from nowhere else"
_INDEX = "take the index that was written with these files; without any, all files are read"
_ANEW = "have it written anew"
_CHECK = "check the path"
_OF_SCALES = "state the one that the scales were made with"
_FOLLOW = "--follow-index (follow_index=True) reads what the index lists, and"


class CheckpointNotFoundError(Fp8CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path, and no cached one with that hub id."""

    of_empty = Says("there is no object below it", remedy="check the URL")
    of_page = Says("its page lists no files",
        remedy="give a directory whose index page lists its files; for a model of the Hub, hf://org/name")  # fmt: skip
    of_answer = Says("{who} answered {answer}", remedy="{remedy}")

    @classmethod
    def of_path(cls, path: object) -> Self:
        return cls("there is no such directory or file", file=str(path), remedy=_CHECK)

    @classmethod
    def of_hub_id(cls, path: object) -> Self:
        hub = f"; or, for a model of the hub, fetch it first: hf download {path}; or read it there: hf://{path}"
        found, remedy = "neither a path nor a model in huggingface_hub's local cache", _CHECK
        return cls(found, file=str(path), remedy=f"{remedy}{hub if '/' in str(path) else ''}")

    @classmethod
    def of_lacking(cls, where: str, lacks: str, pickled: str | None = None) -> Self:
        """A directory that ``lacks`` weights, except those of an adapter that are ``pickled``."""
        found = f"there is no {lacks} in it" + (f", only {pickled}" if pickled else "")
        newer = "save it once more with a newer PEFT: save_pretrained(..., safe_serialization=True)"
        return cls(found, file=where, remedy=newer if pickled else _CHECK)

    @classmethod
    def of_unconfigured(cls, where: str, config: str) -> Self:
        """A directory without the configuration of an adapter."""
        remedy = "give the directory that PEFT's save_pretrained wrote"
        return cls(f"there is no {config} in it", file=where, remedy=remedy)

    @classmethod
    def of_file(cls, path: object) -> Self:
        return cls("this is a file", file=str(path), expected="the directory of an adapter")

    @classmethod
    def of_part(cls, file: str, directory: str, count: int = 0) -> Self:
        """One of ``count`` files of a checkpoint; with 0, a file without weights."""
        found = f"this is 1 of {count} files of a checkpoint" if count else "this holds no weights"
        return cls(found, file=file, remedy=f"open the directory: {directory}")


class SourceChangedError(Fp8CheckpointError, RuntimeError):
    """A file of a checkpoint was written, replaced or removed after it was opened: what was read may be a mix."""

    expected = "the file as it was"
    remedy = "run it again once nothing writes to the file"

    @classmethod
    def of(cls, file: str) -> Self:
        return cls("it changed after it was opened", file=file)


class _JsonError(Fp8CheckpointError, ValueError):
    """JSON that is malformed or too large, in headers and in configurations."""

    @classmethod
    def of_text(cls, file: Named, error: object) -> Self:
        return cls(f"not valid JSON ({shown(error)})", file=file, expected="a JSON object", remedy=COPY)

    @classmethod
    def of_type(cls, file: Named, value: object) -> Self:
        return cls(f"the JSON is a {type(value).__name__}", file=file, expected="an object", remedy=COPY)

    @classmethod
    def of_size(cls, file: Named, size: int, values: int, most: tuple[int, int]) -> Self:
        """``values``: commas and brackets; ``most``: the limits on them and, unless all are ASCII, on bytes."""
        found = f"it holds {size} bytes with {values} commas and brackets"
        expected = "at most {} of them, and {} bytes where not all are ASCII".format(*most)
        return cls(found, file=file, expected=expected, remedy=COPY)

    @classmethod
    def of_key(cls, file: Named, key: str) -> Self:
        remedy = f"{_ANEW}: it does not say which of the two is meant"
        return cls("the name occurs twice", tensor=key, file=file, expected="each name once", remedy=remedy)


class ConfigError(_JsonError):
    """``config.json`` (or ``hf_quant_config.json``, ``params.json``) cannot be understood."""

    @classmethod
    def of_adapter(cls, file: Named, key: str, stated: object, expected: str) -> Self:
        """A ``key`` of PEFT's whose value is not valid."""
        return cls(f"{key} is {shown(stated)}", file=file, expected=expected, remedy="take the file PEFT wrote")

    @classmethod
    def of_quantization(cls, file: str, stated: object) -> Self:
        """A statement of quantization that is not an object."""
        found = f"what it states of quantization is {shown(repr(stated))}"
        remedy = "state what the file that came with these weights states"
        return cls(found, file=file, expected="an object", remedy=remedy)

    @classmethod
    def of_block_size(cls, file: str, stated: object) -> Self:
        found, expected = f"the block size is {shown(repr(stated))}", "positive whole numbers, such as [128, 128]"
        return cls(found, file=file, expected=expected, remedy=_OF_SCALES)

    @classmethod
    def of_block_sizes(cls, file: str, modules: str, sizes: tuple[object, object]) -> Self:
        """Two block sizes for the same modules."""
        found = f"the configuration states several block sizes for {shown(modules)}: {sizes[0]} and {sizes[1]}"
        return cls(found, file=file, expected="one", remedy=_OF_SCALES)

    @classmethod
    def of_long(cls, file: Named, most: int) -> Self:
        found, expected = "the file is longer than any configuration", f"at most {most} bytes"
        return cls(found, file=file, expected=expected, remedy=COPY)

    @classmethod
    def of_model(cls, config: str, model: str, error: Exception) -> Self:
        """The ``model`` that the configuration names cannot be made from it."""
        found = f"{model} cannot be made of it: {shown(str(error))}"
        remedy = (
            "take the configuration that was written with these weights, or the transformers that it was written for"
        )
        return cls(found, file=config, expected="one that transformers reads", remedy=remedy)


class HeaderError(_JsonError):
    """A safetensors header is malformed, or states what cannot be."""

    remedy = COPY

    @classmethod
    def of_length(cls, file: Named, length: int, most: int) -> Self:
        remedy = f"if it is meant to be a safetensors file, {COPY}"
        return cls(f"the header claims {length} bytes", file=file, expected=f"at most {most}", remedy=remedy)

    @classmethod
    def of_metadata(cls, file: Named) -> Self:
        return cls("__metadata__ is something else", file=file, expected="a map of text to text", remedy=_ANEW)

    @classmethod
    def of_entry(cls, file: Named, tensor: str, entry: str) -> Self:
        """``entry``: the tensor's entry, as JSON."""
        found = f"the entry {shown(entry)} is malformed"
        expected = "a dtype, a shape of whole numbers and two data offsets"
        return cls(found, tensor=tensor, file=file, expected=expected, remedy=_ANEW)

    @classmethod
    def of_dtype(cls, file: Named, tensor: str, dtype: str, known: Iterable[str]) -> Self:
        found, expected = f"unknown dtype {shown(dtype)}", f"one of {', '.join(known)}"
        remedy = "use the tool that wrote it, or a newer version of fp8ckpt"
        return cls(found, tensor=tensor, file=file, expected=expected, remedy=remedy)

    @classmethod
    def of_offsets(
        cls, file: Named, tensor: str, offsets: tuple[int, int], bits: int, kind: tuple[str, object]
    ) -> Self:
        """``offsets`` of the data; ``bits`` that they should hold; ``kind``: dtype and shape."""
        begin, end = offsets
        found = f"data_offsets [{begin}, {end}] hold {end - begin} bytes"
        needed = (
            f"{shown(bits / 8 if bits < 2**200 else 'an impossible number of')} bytes for {kind[0]} {shown(kind[1])}"
        )
        return cls(found, tensor=tensor, file=file, expected=needed)

    @classmethod
    def of_place(cls, stored: Stored, start: int, end: int, previous: str) -> Self:
        """``start``: where the tensor's data begins; ``end``: where it should begin, after ``previous``."""
        what = "overlaps" if start < end else f"leaves a hole of {start - end} bytes after"
        found = f"its data begins at byte {start} and {what} {shown(previous)}"
        return cls(found, tensor=stored, expected=f"byte {end}")

    @classmethod
    def of_rest(cls, file: Named, rest: int, end: int) -> Self:
        """Bytes that belong to no tensor; the data ends at ``end``."""
        return cls(f"{rest} bytes follow the last tensor", file=file, expected=f"a file of {end} bytes")

    @classmethod
    def of_many(cls, file: Named, most: int) -> Self:
        return cls(f"more than {most} defects; the rest was not looked at", file=file)

    @classmethod
    def of_two(cls, stored: Stored, other: str) -> Self:
        """The tensor ``stored`` is also in the file, or under the key, ``other``."""
        remedy = "open the one file that is meant, or write an index that names the model's files"
        return cls(f"it is in {shown(other)} as well", tensor=stored, expected="each name once", remedy=remedy)

    @classmethod
    def of_index(cls, index: Named, absent: str | None) -> Self:
        """An index of an adapter that names no file, or an ``absent`` one."""
        found = "it names no file" if absent is None else f"it names {shown(absent)}, which is not there"
        return cls(found, file=index, remedy=_SAME_PLACE)

    @classmethod
    def of_parts(cls, where: str, there: int, count: int) -> Self:
        return cls(f"{there} of {count} parts are there", file=where, remedy=_SAME_PLACE)

    @classmethod
    def of_halves(cls, stored: Stored) -> Self:
        found = f"{stored.dtype} {stored.shape} in four bits has rows that are no whole bytes"
        return cls(found, tensor=stored, expected="rows of an even number of elements")


class TruncatedFileError(HeaderError):
    """A file holds fewer bytes than its header describes."""

    @classmethod
    def of(cls, file: Named, size: int, end: int | None = None) -> Self:
        """A file of ``size`` bytes, whose header gives its ``end``; None if it has no header."""
        least = "at least the 8 bytes of a header's length" if end is None else f"{end} bytes, as the header says"
        return cls(f"the file holds {size} bytes", file=file, expected=least)

    @classmethod
    def of_header(cls, file: Named, size: int, length: int) -> Self:
        found = f"the header claims {length} bytes and the file holds {size}"
        return cls(found, file=file, expected=f"at least {length + 8} bytes")

    @classmethod
    def of_end(cls, file: str, end: int, least: int, remedy: str) -> Self:
        return cls(f"the file ends at byte {end}", file=file, expected=f"at least {least} bytes", remedy=remedy)


class IndexMismatchError(Fp8CheckpointError, ValueError):
    """The index and the files' own headers disagree, or the index names a file outside the directory."""

    @classmethod
    def of_unnamed(cls, file: str, index: str) -> Self:
        remedy = f"{_FOLLOW} copies this file as it is"
        return cls(f"the index {index} does not name this file", file=file, expected="every file in it", remedy=remedy)

    @classmethod
    def of_place(cls, tensor: str, index: str, listed: str | None, actual: str | None) -> Self:
        """A tensor that the index has as ``listed`` in one file and is in the ``actual`` one; either may be None."""
        remedy = _INDEX
        if listed is None:
            found = f"{shown(actual)} holds a tensor that the index {index} does not list"
            remedy = f"{_FOLLOW} leaves this tensor out"
        elif actual is None:
            found = f"{shown(listed)} does not hold this tensor, and the index {index} says that it does"
        else:
            found = f"the index {index} says {shown(listed)}, and it is in {shown(actual)}"
        return cls(found, tensor=tensor, file=index, expected="the index and the headers to agree", remedy=remedy)

    @classmethod
    def of_json(cls, index: str, error: Fp8CheckpointError) -> Self:
        return cls(error.found, **{**error.facts, "file": index})

    @classmethod
    def of_kind(cls, index: str) -> Self:
        expected = '{"weight_map": {tensor: file}}'
        return cls("it has no weight_map of names to files", file=index, expected=expected, remedy=_INDEX)

    @classmethod
    def of_path(cls, index: str, name: str) -> Self:
        remedy = "do not use this checkpoint unless you know who wrote it"
        expected = "the name of a file in the directory"
        return cls(f"it names the file {shown(name)}", file=index, expected=expected, remedy=remedy)

    @classmethod
    def of_absent(cls, index: str, tensor: str, name: str, where: str) -> Self:
        """The index names a file that does not exist, for the tensor among others."""
        found, expected = f"the file {shown(name)} is not there", f"{shown(name)} in {where}"
        return cls(found, tensor=tensor, file=index, expected=expected, remedy=f"{_SAME_PLACE}; or {_INDEX}")

    @classmethod
    def of_part(cls, file: str, part: str, count: int) -> Self:
        """One of ``count`` parts does not exist, as the name of another part shows."""
        found, expected = f"the part {shown(part)} is not there", f"all of the {count} parts"
        return cls(found, file=file, expected=expected, remedy=_SAME_PLACE)

    @classmethod
    def of_size(cls, index: str, stated: object, actual: int) -> Self:
        """A ``total_size`` that differs from the tensors' bytes."""
        found = f"metadata.total_size is {shown(stated)}; the tensors take {actual} bytes"
        return cls(found, file=index, remedy="nothing reads it wrong; convert writes the index anew")
