"""Would a serving engine serve this directory, and serve what is in it?

`examine` checks what vLLM, SGLang and transformers need beyond sound tensors, each point learnt from a directory that
was served wrong without an error: the shapes of scales, activation scales for all or for none, the skip list, files
that are served instead, the index, tied heads. `serving_config` is the ``config.json`` in which none of it is wrong.
Headers and scales are read, and a head that is tied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from fp8ckpt.errors import ConfigError, Fp8CheckpointError, ServingError, shown
from fp8ckpt.families.names import NESTED
from fp8ckpt.families.roles import module_of
from fp8ckpt.families.siblings import sibling_units
from fp8ckpt.numerics.codes import CODE_FORMATS, SCALE_DTYPES, scale_values
from fp8ckpt.numerics.geometry import tiled
from fp8ckpt.output.like import with_needless_dimensions
from fp8ckpt.serving.skip_list import (
    Missing,
    SkipList,
    missing_in_both_forms,
    missing_in_patterns,
    unquantized_linears,
    unquantized_parts,
)
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.blocks import block_sizes
from fp8ckpt.tensors.checkpoint import Checkpoint, is_native
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG
from fp8ckpt.tensors.header import TensorSpan
from fp8ckpt.tensors.pairing import QuantizedTensor

#: Each known ``quant_method``, and the keys under which it keeps its skip list; a new list is written under the first.
_LIST_KEYS = {
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "compressed-tensors": ("ignore",),
    "modelopt": ("exclude_modules", "ignore"),
    "fbgemm_fp8": ("modules_to_not_convert",),
    "mxfp8": ("ignored_layers", "modules_to_not_convert"),
}
_SCHEMES = ("static", "dynamic")
_MISTRAL_STATIC = {"TENSOR": {True}, "NO_SCALES": {False}}  # qscheme_act in params.json
_WEIGHT_FILES = (".bin", ".pth", ".pt", ".gguf")
_TRAINER_FILES = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "random_states_0.pt",
)
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
_EMBEDDINGS = (
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.embed_tokens.weight",
)
_PIECE = 4 << 20  # bytes
_NOTHING = ""  # an entry that names no module
_NAMED = 3  # examples in a message


@dataclass(frozen=True)
class Servability:
    """What `examine` found: ``failures`` that an engine would trip over, and ``notes`` on what is served otherwise than
    expected.
    """

    failures: tuple[ServingError, ...]
    notes: tuple[str, ...]


_Finding = ServingError | str  # a failure, or a note


class _Stated(NamedTuple):
    """What is stated of quantization: in which file, and by which method (None where not stated).

    ``static``: whether activation scales are to be stored; both where modules differ in it, neither where nothing is
    stated.
    """

    file: str
    quantization: dict[str, Any]
    method: str | None
    static: set[bool]


def examine(checkpoint: Checkpoint) -> Servability:
    """Check a directory point by point; never raises. What `survey` has found already is not said again."""
    failures: list[ServingError] = []
    notes: list[str] = []
    fp8 = any(span.dtype in CODE_FORMATS for header in checkpoint.files for span in header.spans)
    # A configuration that cannot be understood is a defect, and everything that rests on it would be named after it.
    readable = not any(isinstance(defect, ConfigError) for defect in checkpoint.defects)
    if not readable:
        notes.append("the configuration cannot be understood, and was not checked")
    elif not fp8:
        notes.append("nothing is quantized")
    checks: list[Iterator[_Finding]] = [_leftovers(checkpoint, fp8, readable), _files(checkpoint)]
    if readable:
        checks = [
            *([_quantization(checkpoint)] if fp8 else []),
            *checks,
            _heads(checkpoint),
            _unequal_siblings(checkpoint),
        ]
    for check in checks:
        try:
            for found in check:
                if isinstance(found, ServingError):
                    failures.append(found)
                else:
                    notes.append(found)
        except Fp8CheckpointError as error:  # a file that cannot be read: no engine will read it either
            failures.append(
                ServingError(
                    error.found, tensor=error.tensor, file=error.file, expected=error.expected, remedy=error.remedy
                )
            )
    return Servability(tuple(failures), tuple(notes))


def serving_config(checkpoint: Checkpoint, *, static: bool) -> dict[str, Any]:
    """The checkpoint's ``config.json`` with what engines need of it, equal to the one there is if nothing is missing.

    ``static``: every FP8 tensor has its activation scale. Added are ``quant_method``, ``activation_scheme``, and what
    the skip list lacks, after the entries that it has; a checkpoint in FP8 that says nothing of it anywhere gets a
    ``quantization_config``.
    """
    config = copy.deepcopy(checkpoint.config)
    if not checkpoint.quantized or _is_native_only(checkpoint):
        return config
    quantization = configuration.quantization_config(config)
    if not quantization:
        if _modelopt(checkpoint):
            return config
        quantization = config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": None}
        quantization["weight_block_size"] = _common_block(checkpoint.quantized)
    if quantization.get("quant_method") is None:
        quantization["quant_method"] = _guessed_method(quantization)
    method = quantization["quant_method"]
    if method not in [*_LIST_KEYS]:  # a list, for it may be anything
        return config
    if method == "fp8":
        quantization["activation_scheme"] = "static" if static else "dynamic"
    for key, entries in _lists(quantization, method).items():
        missing = _missing(checkpoint, method, entries)
        if missing.names or missing.prefixes:
            if not entries:  # where there is a list, it also names what engines leave alone by themselves
                missing = _missing(checkpoint, method, [_NOTHING])
            present = value if isinstance(value := quantization.get(key), list) else []
            added = [*(_native(prefix) for prefix in missing.prefixes), *missing.names]
            quantization[key] = [*present, *dict.fromkeys(added)]
    return config


def _guessed_method(quantization: dict[str, Any]) -> str:
    return (
        "compressed-tensors"
        if "config_groups" in quantization
        else "modelopt"
        if "quant_algo" in quantization
        else "fp8"
    )


def _common_block(quantized: Sequence[QuantizedTensor]) -> list[int] | None:
    """The block size of all tensors that have more than one block in a matrix; None where there is none, or several."""
    blocks = {tensor.grid.block_size[-2:] for tensor in quantized if any(count > 1 for count in tensor.grid.shape[-2:])}
    block = blocks.pop() if len(blocks) == 1 else ()
    return list(block) if len(block) == 2 else None


def _is_native_only(checkpoint: Checkpoint) -> bool:
    """Whether this is Mistral's own layout alone, which has no ``config.json`` and no index. What is only planned has
    no files.
    """
    native = bool(checkpoint.files) and all(is_native(header.file.name) for header in checkpoint.files)
    return native and CONFIG not in checkpoint.store.files()


def _modelopt(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``quantization`` of ModelOpt's file; empty where there is none."""
    found = (configuration.load_json(checkpoint.store, MODELOPT_CONFIG) or {}).get("quantization")
    return found if isinstance(found, dict) else {}


def _stated(checkpoint: Checkpoint) -> _Stated | None:
    if _is_native_only(checkpoint):
        params = configuration.load_json(checkpoint.store, MISTRAL_CONFIG) or {}
        quantization = params.get("quantization")
        if not isinstance(quantization, dict):
            return None
        return _Stated(
            MISTRAL_CONFIG, quantization, "mistral", _MISTRAL_STATIC.get(str(quantization.get("qscheme_act")), set())
        )
    if quantization := configuration.quantization_config(checkpoint.config):
        method = quantization.get("quant_method")
        method = method if isinstance(method, str) else None
        return _Stated(CONFIG, quantization, method, _static(method or _guessed_method(quantization), quantization))
    if quantization := _modelopt(checkpoint):
        return _Stated(MODELOPT_CONFIG, quantization, "modelopt", set())
    return None


def _static(method: str, quantization: dict[str, Any]) -> set[bool]:
    if method == "fp8":
        scheme = quantization.get("activation_scheme")
        return {scheme == "static"} if scheme in _SCHEMES else set()
    if method == "compressed-tensors":
        groups = quantization.get("config_groups")
        inputs = (
            [group.get("input_activations") for group in groups.values() if isinstance(group, dict)]
            if isinstance(groups, dict)
            else []
        )
        return {isinstance(activations, dict) and activations.get("dynamic") is False for activations in inputs}
    return {False} if method in ("fbgemm_fp8", "mxfp8") else set()


def _quantization(checkpoint: Checkpoint) -> Iterator[_Finding]:
    """What the configuration says of quantization, against the FP8 tensors there are."""
    stated = _stated(checkpoint)
    file = MISTRAL_CONFIG if _is_native_only(checkpoint) else CONFIG
    if stated is None:
        found = "the weights are FP8, and no configuration says so"
        expected = (
            '"quantization"'
            if file == MISTRAL_CONFIG
            else '"quantization_config" with quant_method, activation_scheme and the skip list'
        )
        yield ServingError(found, file=file, expected=expected, remedy="take the configuration of the release")
    elif stated.method not in (*_LIST_KEYS, "mistral"):
        found = "quant_method is missing" if stated.method is None else f"quant_method is {shown(stated.method)}"
        yield ServingError(
            found,
            file=stated.file,
            expected=f"one of {', '.join(_LIST_KEYS)}",
            remedy="state the method of these weights",
        )
    if stated is not None and stated.method == "fp8":
        yield from _fp8_configuration(stated, checkpoint.quantized)
    yield from _scale_shapes(checkpoint)
    yield from _activation_scales(
        checkpoint.quantized, stated.static if stated else set(), stated.file if stated else file
    )
    if stated is not None and stated.method != "mistral":
        yield from _skip_list(checkpoint, stated)


def _fp8_configuration(stated: _Stated, quantized: Sequence[QuantizedTensor]) -> Iterator[_Finding]:
    scheme = stated.quantization.get("activation_scheme")
    if scheme not in _SCHEMES:
        found = "activation_scheme is missing" if scheme is None else f"activation_scheme is {shown(scheme)}"
        remedy = "state static if every FP8 tensor has its activation scale, else dynamic"
        yield ServingError(found, file=stated.file, expected="static or dynamic", remedy=remedy)
    block = stated.quantization.get("weight_block_size")
    if "weight_block_size" not in stated.quantization:
        yield (
            "weight_block_size is absent: vLLM takes that for one scale a tensor, transformers for blocks of 128 x 128"
        )
    size = tuple(block) if block else None
    # The last two dimensions are the matrix; those before them are experts, with a scale each or one for all.
    others = [
        tensor
        for tensor in quantized
        if (
            any(n > 1 for n in tensor.grid.shape[-2:])
            if size is None
            else (fit := tiled(tensor.shape, size)) is None or fit.shape != tensor.grid.shape
        )
    ]
    if others:
        first = others[0]
        found = (
            f"weight_block_size is {shown(block)}, "
            f"and {len(others)} of {len(quantized)} FP8 tensors are scaled otherwise"
        )
        expected = f"the block size of scales {list(first.scale.shape)} for weights {list(first.shape)}"
        remedy = "state the block size of the file, or null for one scale a tensor; engines take one for all"
        yield ServingError(found, tensor=first.name, file=stated.file, expected=expected, remedy=remedy)


def _scale_shapes(checkpoint: Checkpoint) -> Iterator[_Finding]:
    quantized = checkpoint.quantized
    wrong: list[TensorSpan] = [tensor.scale for tensor in with_needless_dimensions(checkpoint)]
    if wrong:
        found = (
            f"the scale of a whole tensor has shape {list(wrong[0].shape)}, "
            f"in {len(wrong)} of {len(quantized)} FP8 tensors"
        )
        remedy = "store it without dimensions: vLLM's loader fails on this one"
        yield ServingError(found, tensor=wrong[0].name, file=wrong[0].file, expected="[] or [1]", remedy=remedy)
    wrong = [span for t in quantized for span in t.activation_scales if not _is_activation_shape(span.shape, t.shape)]
    if wrong:
        found = (
            f"the activation scale has shape {list(wrong[0].shape)}, "
            f"and is one of {len(wrong)} that engines cannot load"
        )
        remedy = "store one value"
        yield ServingError(
            found, tensor=wrong[0].name, file=wrong[0].file, expected="[] or [1], or [experts]", remedy=remedy
        )


def _is_activation_shape(shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> bool:
    return shape in ((), (1,)) or (len(weight_shape) == 3 and shape == weight_shape[:1])


def _activation_scales(quantized: Sequence[QuantizedTensor], static: set[bool], file: str) -> Iterator[_Finding]:
    having = [tensor for tensor in quantized if tensor.activation_scales]
    lacking = [tensor for tensor in quantized if not tensor.activation_scales]
    if static == {True, False}:  # which module is which, the engine finds out by itself
        return
    if static != {False} and lacking and (having or static):
        found = f"{len(lacking)} of {len(quantized)} FP8 tensors have no activation scale"
        expected = f"one for each, as {file} says static" if static else "one for each, or for none"
        remedy = (
            "restore them; or remove them all and state dynamic: "
            "an engine takes a missing one for a number that makes garbage"
        )
        yield ServingError(found, tensor=lacking[0].name, file=lacking[0].weight.file, expected=expected, remedy=remedy)
    if static == {False} and having:
        found = f"{len(having)} of {len(quantized)} FP8 tensors have an activation scale"
        expected, remedy = f"none, as {file} says dynamic", "remove them; or state static if every FP8 tensor has one"
        yield ServingError(
            found, tensor=having[0].name, file=having[0].activation_scales[0].file, expected=expected, remedy=remedy
        )


def _skip_list(checkpoint: Checkpoint, stated: _Stated) -> Iterator[_Finding]:
    method = stated.method or _guessed_method(stated.quantization)
    for key, entries in _lists(stated.quantization, method).items():
        missing = _missing(checkpoint, method, entries)
        remedy = "list them: an engine makes FP8 of what it is not told to skip"
        if missing.names:
            found = f"{len(missing.names)} unquantized Linears are not in {key}: {_some(missing.names)}"
            expected = (
                "each by its full name: vLLM skips no module that a prefix stands for"
                if method == "fp8"
                else "a name or a pattern for each"
            )
            yield ServingError(found, tensor=missing.names[0], file=stated.file, expected=expected, remedy=remedy)
        if missing.prefixes:
            found = (
                f"{len(missing.prefixes)} parts of the model that hold nothing FP8 are not in {key}: "
                f"{_some(missing.prefixes)}"
            )
            expected = "each by its prefix, as transformers and SGLang read the list"
            yield ServingError(found, tensor=missing.prefixes[0], file=stated.file, expected=expected, remedy=remedy)
        skip_list = SkipList.of(entries)
        modules = [module_of(tensor.name) for tensor in checkpoint.quantized]
        skipped = [module for module in modules if skip_list.reaches(module) or skip_list.reaches(_native(module))]
        if skipped:
            found = f"{len(skipped)} FP8 tensors are in {key}: {_some(skipped)}"
            remedy = "take them off the list: an engine would read codes as weights"
            yield ServingError(found, tensor=skipped[0], file=stated.file, expected="none that is FP8", remedy=remedy)


def _lists(quantization: dict[str, Any], method: str) -> dict[str, list[str]]:
    """The skip lists that are stated, by key: an engine reads one of them. An empty one where there is none."""
    keys = _LIST_KEYS.get(method, _LIST_KEYS["fp8"])
    stated = {key: value for key in keys if isinstance(value := quantization.get(key), list) and value}
    return {key: [entry for entry in value if isinstance(entry, str)] for key, value in stated.items()} or {keys[0]: []}


def _missing(checkpoint: Checkpoint, method: str, entries: Sequence[str]) -> Missing:
    linears = unquantized_linears(checkpoint.tensors)
    if method == "fp8":
        return missing_in_both_forms(entries, linears, _parts(checkpoint), _native)
    # ModelOpt may state its list in a file of its own, too.
    return missing_in_patterns([*configuration.skip_patterns(checkpoint.store, checkpoint.config), *entries], linears)


def _parts(checkpoint: Checkpoint) -> list[str]:
    return unquantized_parts(
        unquantized_linears(checkpoint.tensors), (module_of(tensor.name) for tensor in checkpoint.quantized)
    )


def _native(module: str) -> str:
    """The model's own name of a module, where the layout on disk is the nested one."""
    return NESTED.hf_to_native(f"{module}.").removesuffix(".")


def _leftovers(checkpoint: Checkpoint, fp8: bool, readable: bool) -> Iterator[_Finding]:
    """Files that an engine would take for the model, or for what it says of quantization, instead of what is there."""
    names = sorted(name for name in checkpoint.store.files() if "/" not in name)
    if any(not is_native(header.file.name) for header in checkpoint.files):
        if second := [name for name in names if is_native(name)]:
            found = f"Mistral's own copy of the weights stands beside the others: {_some(second)}"
            yield ServingError(
                found, file=second[0], expected="one copy", remedy="move it away: vLLM serves it instead of the others"
            )
        if MISTRAL_CONFIG in names:
            found = "Mistral's own configuration stands beside weights that it does not speak of"
            remedy = "move it away: vLLM reads it, and looks for consolidated*.safetensors"
            yield ServingError(found, file=MISTRAL_CONFIG, expected=f"{CONFIG} alone", remedy=remedy)
    if others := [name for name in names if PurePath(name).suffix in _WEIGHT_FILES and name not in _TRAINER_FILES]:
        found = f"weights of another kind stand beside the safetensors files: {_some(others)}"
        yield ServingError(
            found, file=others[0], expected="one copy", remedy="move them away: an engine may load them instead"
        )
    if not readable:
        return
    quantization, modelopt = configuration.quantization_config(checkpoint.config), _modelopt(checkpoint)
    method = quantization.get("quant_method")
    if modelopt and quantization and method != "modelopt":
        found = f"it states quantization by ModelOpt, and {CONFIG} states {shown(method)}"
        yield ServingError(
            found,
            file=MODELOPT_CONFIG,
            expected="one method",
            remedy="remove the file that does not speak of these weights",
        )
    if not fp8 and not checkpoint.defects:
        for file, stated in ((CONFIG, quantization), (MODELOPT_CONFIG, modelopt)):
            if stated:
                found = "it states that the weights are quantized, and none is"
                remedy = "remove it: an engine would look for scales, or quantize the weights"
                yield ServingError(found, file=file, expected="no quantization", remedy=remedy)


def _files(checkpoint: Checkpoint) -> Iterator[_Finding]:
    """The index, and the metadata of each file."""
    files = [header.file for header in checkpoint.files]
    if len(files) > 1 and checkpoint.index_name is None and not _is_native_only(checkpoint):
        found = f"{len(files)} safetensors files without an index"
        yield ServingError(
            found, file=files[0], expected="model.safetensors.index.json", remedy="write the index, or fetch it"
        )
    unmarked = [header for header in checkpoint.files if header.metadata.get("format") != "pt"]
    if unmarked:
        found = f"the metadata does not say what wrote it, in {len(unmarked)} of {len(files)} files"
        remedy = "write the file anew: loaders that serve several frameworks refuse it, or guess"
        yield ServingError(found, file=unmarked[0].file, expected='{"format": "pt"}', remedy=remedy)


def _heads(checkpoint: Checkpoint) -> Iterator[_Finding]:
    """A head that is tied to the embeddings is not stored, or is the same; one that is not tied is stored."""
    sections = [checkpoint.config, checkpoint.config.get("text_config")]
    stated = [
        section["tie_word_embeddings"]
        for section in sections
        if isinstance(section, dict) and "tie_word_embeddings" in section
    ]
    name = next((name for name in _HEADS if name in checkpoint.tensors), None)
    embeddings = next((tensor for name in _EMBEDDINGS if (tensor := checkpoint.tensors.get(name)) is not None), None)
    if embeddings is None:  # not a language model, or one file of several
        return
    if True in stated and name is not None:
        head = checkpoint.tensors[name]
        if (
            isinstance(head, QuantizedTensor)
            or isinstance(embeddings, QuantizedTensor)
            or not _is_same(head, embeddings)
        ):
            found = f"the head is not {shown(embeddings.name)}, and {CONFIG} says tie_word_embeddings"
            file = head.weight.file if isinstance(head, QuantizedTensor) else head.file
            remedy = "state false if the head is its own; an engine would serve the embeddings in its place"
            yield ServingError(found, tensor=name, file=file, expected="the same bytes, or no head", remedy=remedy)
    if False in stated and True not in stated and name is None and not checkpoint.defects:
        found = "tie_word_embeddings is false, and no head is stored"
        yield ServingError(
            found,
            file=CONFIG,
            expected=f"a tensor {_HEADS[0]}",
            remedy="restore the head; or state true if it is the embeddings",
        )


def _is_same(a: TensorSpan, b: TensorSpan) -> bool:
    """Whether two tensors are the same, bit for bit; memory is two pieces."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    buffers = np.empty((2, _PIECE), np.uint8)
    for start in range(0, a.nbytes, _PIECE):
        left, right = buffers[:, : min(_PIECE, a.nbytes - start)]
        a.read(left, start)
        b.read(right, start)
        if not np.array_equal(left, right):
            return False
    return True


def _unequal_siblings(checkpoint: Checkpoint) -> Iterator[_Finding]:
    if block_sizes(checkpoint.store, checkpoint.config).stated:
        return  # grids are joined as they are, those of a single block too
    single = {
        t.name: t.scale for t in checkpoint.quantized if t.grid.per_tensor and t.scale.numel == 1 and len(t.shape) == 2
    }
    units = sibling_units(single)
    values: dict[str, float] = {}
    members = [(name, single[name]) for unit in units for name in unit]
    for name, span in sorted(members, key=lambda member: (member[1].file.name, member[1].start)):
        stored = np.empty(span.nbytes, np.uint8)
        span.read(stored)
        values[name] = float(scale_values(stored.view(SCALE_DTYPES[span.dtype]), span.dtype)[0])
    unequal = [unit for unit in units if len({values[name] for name in unit}) > 1]
    if unequal:
        yield (
            f"{len(unequal)} of {len(units)} groups of weights that are served as one have unequal scales, "
            f"and are served through a requantization to the largest scale; "
            f"the first is {', '.join(shown(name) for name in unequal[0])}"
        )


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(shown(name) for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
