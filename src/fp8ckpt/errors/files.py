"""What is wrong with the files of a checkpoint: headers, the index, configurations.

A bad file may belong to a release or to the user. So no remedy fetches files into a directory of other weights, removes
any, or states what the weights were not made with.
"""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Named, Says, Stored, shown

COPY = "compare it with the file that it was copied from, or have it written again"
_SAME_PLACE = "get it from where the other files came from, and from nowhere else"
_INDEX = "use the index that was written with these files; without an index, all files are read"
_ANEW = "have the file written again"
_CHECK = "check the path"
_OF_SCALES = "state the block size that the scales were made with"
_FOLLOW = "--follow-index (follow_index=True) reads only what the index lists, and"


class CheckpointNotFoundError(Fp8CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path, and no cached one with that hub id."""

    # fmt: off
    of_empty = Says("there are no objects below this URL", remedy="check the URL")
    of_page = Says("its index page lists no files",
        remedy="give a directory whose index page lists its files; for a model of the Hub, hf://org/name")
    of_answer = Says("the server answered {status}", remedy="check the URL")
    of_hub = Says("the Hub answered {status} ({kind})", remedy="{store.permission}")
    of_store = Says("the store answered {answer}", remedy="{remedy}")
    of_path = Says("there is no such directory or file", remedy=_CHECK)
    # A directory without the configuration of an adapter.
    of_unconfigured = Says("there is no {config} in it", remedy="give the directory that PEFT's save_pretrained wrote")
    of_file = Says("this is a file", "the directory of an adapter")
    # fmt: on

    @classmethod
    def of_hub_id(cls, path: object) -> Self:
        hub = f"; or, for a model of the hub, fetch it first: hf download {path}; or read it there: hf://{path}"
        found, remedy = "neither a path nor a model in huggingface_hub's local cache", _CHECK
        return cls(found, file=str(path), remedy=f"{remedy}{hub if '/' in str(path) else ''}")

    @classmethod
    def of_lacking(cls, where: str, lacks: str, pickled: str | None = None) -> Self:
        """A directory that ``lacks`` weights, except those of an adapter that are ``pickled``."""
        found = f"there is no {lacks} in it" + (f", only {pickled}" if pickled else "")
        newer = "save it again with a newer PEFT: save_pretrained(..., safe_serialization=True)"
        return cls(found, file=where, remedy=newer if pickled else _CHECK)

    @classmethod
    def of_part(cls, file: str, directory: str, count: int = 0) -> Self:
        """One of ``count`` files of a checkpoint; with 0, a file without weights."""
        found = f"this is 1 of {count} files of a checkpoint" if count else "this file holds no weights"
        return cls(found, file=file, remedy=f"open the directory: {directory}")


class SourceChangedError(Fp8CheckpointError, RuntimeError):
    """A file of a checkpoint was written, replaced or removed after it was opened: what was read may be a mix."""

    expected = "an unchanged file"
    remedy = "run it again when nothing writes to the file any more"

    of = Says("it changed after it was opened")


class _JsonError(Fp8CheckpointError, ValueError):
    """JSON that is malformed or too large, in headers and in configurations."""

    of_text = Says("not valid JSON ({error:shown})", "a JSON object", COPY)
    of_type = Says("the JSON is a {value.__class__.__name__}", "an object", COPY)
    of_key = Says(
        "the name occurs twice", "each name once", f"{_ANEW} with only the one that is meant: fp8ckpt cannot know which"
    )

    @classmethod
    def of_size(cls, file: Named, size: int, values: int, most: tuple[int, int]) -> Self:
        """``values``: commas and brackets; ``most``: the limits on them and, unless all are ASCII, on bytes."""
        found = f"it holds {size} bytes with {values} commas and brackets"
        expected = "at most {} commas and brackets, and {} bytes unless all are ASCII".format(*most)
        return cls(found, file=file, expected=expected, remedy=COPY)


class ConfigError(_JsonError):
    """``config.json`` (or ``hf_quant_config.json``, ``params.json``) cannot be understood."""

    # fmt: off
    of_buffer = Says("no checkpoint holds this buffer, and {owner} does not create it",
        remedy="register it after the model is loaded")
    of_architecture = Says("architectures is {given!r}", "a class of transformers",
        "build the model yourself, and call load_model")
    # A ``key`` of PEFT's whose value is not valid.
    of_adapter = Says("{key} is {stated:shown}", "{expected}", "use the file that PEFT wrote")
    # A statement of quantization that is not an object.
    of_quantization = Says("its quantization configuration is {stated!r:shown}", "an object",
        "use the file that came with these weights")
    of_block_size = Says("the block size is {stated!r:shown}", "positive whole numbers, such as [128, 128]", _OF_SCALES)
    of_long = Says("the file is too long for a configuration", "at most {most} bytes", COPY)
    # The ``model`` that the configuration names cannot be made from it.
    of_model = Says("{model} cannot be built from it: {error:shown}", "a configuration that transformers reads",
        "use the configuration that was written with these weights, or the transformers version it was written for")
    # fmt: on

    @classmethod
    def of_block_sizes(cls, file: str, modules: str, sizes: tuple[object, object]) -> Self:
        """Two block sizes for the same modules."""
        found = f"the configuration states several block sizes for {shown(modules)}: {sizes[0]} and {sizes[1]}"
        return cls(found, file=file, expected="one block size", remedy=_OF_SCALES)


class HeaderError(_JsonError):
    """A safetensors header is malformed, or states what cannot be."""

    remedy = COPY

    # fmt: off
    of_length = Says("the header claims {length} bytes", "at most {most}",
        f"if it is meant to be a safetensors file, {COPY}")
    of_metadata = Says("__metadata__ is not a map of strings", "a map of strings to strings", _ANEW)
    # ``entry``: the tensor's entry, as JSON.
    of_entry = Says("the entry {entry:shown} is malformed", "a dtype, a shape of whole numbers and two data offsets",
        _ANEW)
    of_dtype = Says("unknown dtype {dtype:shown}", "one of {known:joined}",
        "read it with the tool that wrote it, or with a newer version of fp8ckpt")
    # Bytes that belong to no tensor; the data ends at ``end``.
    of_rest = Says("{rest} bytes follow the last tensor", "a file of {end} bytes")
    of_many = Says("more than {most} defects; the rest of the file was not checked")
    # The tensor ``stored`` is also in the file, or under the key, ``other``.
    of_two = Says("it is also in {other:shown}", "each name once",
        "open only the file that is meant, or write an index that names the model's files")
    of_parts = Says("only {there} of {count} parts exist", remedy=_SAME_PLACE)
    of_halves = Says("the rows of four-bit {tensor.dtype} {tensor.shape} do not fill whole bytes",
        "rows of an even number of elements")
    # fmt: on

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
    def of_index(cls, index: Named, absent: str | None) -> Self:
        """An index of an adapter that names no file, or an ``absent`` one."""
        found = "it names no file" if absent is None else f"it names {shown(absent)}, which does not exist"
        return cls(found, file=index, remedy=_SAME_PLACE)


class TruncatedFileError(HeaderError):
    """A file holds fewer bytes than its header describes."""

    of_end = Says(
        "the file ends at byte {end}",
        "at least {least} bytes",
        "restore the file, or run it again once nothing writes to it",
    )
    of_listed_end = Says("the file ends at byte {end}", "at least {least} bytes", "get a complete copy")

    @classmethod
    def of(cls, file: Named, size: int, end: int | None = None) -> Self:
        """A file of ``size`` bytes, whose header gives its ``end``; None if it has no header."""
        least = "at least the 8 bytes of a header's length" if end is None else f"{end} bytes, as the header says"
        return cls(f"the file holds {size} bytes", file=file, expected=least)

    @classmethod
    def of_header(cls, file: Named, size: int, length: int) -> Self:
        found = f"the header claims {length} bytes and the file holds {size}"
        return cls(found, file=file, expected=f"at least {length + 8} bytes")


class IndexMismatchError(Fp8CheckpointError, ValueError):
    """The index and the files' own headers disagree, or the index names a file outside the directory."""

    # fmt: off
    of_unnamed = Says("the index {index} does not name this file", "an index that names every file",
        f"{_FOLLOW} copies this file unchanged")
    of_kind = Says("it has no weight_map from tensor names to file names", '{{"weight_map": {{tensor: file}}}}', _INDEX)
    of_path = Says("it names the file {name:shown}", "the name of a file in the directory",
        "do not use this checkpoint unless you trust its source")
    # The index names a file that does not exist, for the tensor among others.
    of_absent = Says("the file {name:shown} does not exist", "{name:shown} in {where}", f"{_SAME_PLACE}; or {_INDEX}")
    # One of ``count`` parts does not exist, as the name of another part shows.
    of_part = Says("the part {part:shown} does not exist", "all of the {count} parts", _SAME_PLACE)
    # A ``total_size`` that differs from the tensors' bytes.
    of_size = Says("metadata.total_size is {stated:shown}; the tensors take {actual} bytes",
        remedy="no tensor is read wrongly because of it; convert writes a correct index")
    # fmt: on

    @classmethod
    def of_place(cls, tensor: str, index: str, listed: str | None, actual: str | None) -> Self:
        """A tensor that the index has as ``listed`` in one file and is in the ``actual`` one; either may be None."""
        remedy = _INDEX
        if listed is None:
            found = f"{shown(actual)} holds a tensor that the index {index} does not list"
            remedy = f"{_FOLLOW} leaves this tensor out"
        elif actual is None:
            found = f"{shown(listed)} does not hold this tensor, but the index {index} says that it does"
        else:
            found = f"the index {index} says that it is in {shown(listed)}, but it is in {shown(actual)}"
        return cls(found, tensor=tensor, file=index, expected="the index and the headers to agree", remedy=remedy)

    @classmethod
    def of_json(cls, index: str, error: Fp8CheckpointError) -> Self:
        return cls(error.found, **{**error.facts, "file": index})
