"""Formats that are recognised and not handled: of weights, of tensors to be quantized, of models, of adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Named, Readable, Stored, listed, shown
from fp8ckpt.errors.scales import SAME_TOOL

_FILES = "look whether files of the checkpoint are missing"
_MERGED_THERE = "merge it with PEFT (merge_and_unload) into the model in BF16, and convert that with --like"
_WRITTEN = "F8_E4M3, the one FP8 dtype that releases use and fp8ckpt writes"
FACTORS = "matrices [rank, in] and [out, rank]"


class UnsupportedFormatError(Fp8CheckpointError, ValueError):
    """Packed or integer quantization: recognised, and not handled."""

    @classmethod
    def of_packed(cls, weight: Stored) -> Self:
        found = f"{weight.dtype} {weight.shape} is packed or integer (INT8, INT4, FP6), which fp8ckpt does not read"
        return cls(found, tensor=weight, expected="FP8, MXFP4 or NVFP4", remedy=SAME_TOOL)

    @classmethod
    def of_factor(cls, weight: Stored, second: str) -> Self:
        """``second``: the name of the tensor that scales the codes besides their scale."""
        found = f"{shown(second)} is a second factor or a zero point, which fp8ckpt does not apply"
        return cls(found, tensor=weight, expected="one scale", remedy=SAME_TOOL)

    @classmethod
    def of_order(cls, weight: Stored, scale: Stored) -> Self:
        """``scale``: exponents of blocks that may be stored in a kernel's order."""
        found = f"the {scale.dtype} scales {shown(scale.name)} may be in the order of a kernel, not that of the blocks"
        return cls(found, tensor=weight, expected="float scales, or one", remedy=SAME_TOOL)

    @classmethod
    def of_dtype(cls, tensor: str, file: object, what: str, known: Iterable[str], remedy: str | None = None) -> Self:
        """``what`` has a dtype that no values of this kind have."""
        return cls(what, tensor=tensor, file=file, expected=f"one of {', '.join(known)}", remedy=remedy)

    @classmethod
    def of_codes(cls, tensor: Readable, dtype: str) -> Self:
        """A weight of a base whose codes are never written."""
        expected, remedy = _WRITTEN, "write bf16, and give that a --scheme"
        return cls(f"{dtype} codes in the base", tensor=tensor, expected=expected, remedy=remedy)

    @classmethod
    def of_rows(cls, tensor: Readable, size: int, most: int) -> Self:
        """A weight with a factor whose rows are longer than a working step."""
        found = f"rows of {size} elements, of which the last group is not whole"
        return cls(found, tensor=tensor, expected=f"rows of at most {most} elements, or of whole groups")

    @classmethod
    def of_native(cls, path: object) -> Self:
        found = "Mistral's own layout, which states quantization in another way than a scheme does"
        return cls(found, file=str(path), remedy="give the base that it came from: --like BASE")

    @classmethod
    def of_scheme(cls, path: object, left: Iterable[str]) -> Self:
        """A source of which nothing is quantized; ``left``: the reasons."""
        found = "none of its tensors is quantized by this scheme"
        expected = "Linears of a language model's layers, or stacks of experts"
        remedy = f"choose other weights or another --scheme, or --like BASE ({'; '.join(left) or 'it has no weights'})"
        return cls(found, file=str(path), expected=expected, remedy=remedy)

    @classmethod
    def of_quantized(cls, tensor: Readable) -> Self:
        """A quantized tensor in a source that is to be quantized."""
        remedy = "convert it first: --to bf16"
        return cls("it is quantized already", tensor=tensor, expected="BF16, F16 or F32", remedy=remedy)

    @classmethod
    def of_assembly(cls, tensor: str, defect: str, file: object = None) -> Self:
        return cls(f"its assembly has {defect}", tensor=tensor, file=file)

    @classmethod
    def of_layout(cls, path: object) -> Self:
        found = "the model's own layout is asked for, and transformers, which knows it, is not installed"
        return cls(found, file=str(path), remedy="pip install 'fp8ckpt[hf]'")

    @classmethod
    def of_model(cls, config: str, named: object) -> Self:
        found = f"its configuration names {named or 'no model'}"
        return cls(found, file=config, expected="a model that transformers knows")

    @classmethod
    def of_pieces(cls, tensor: str, dtypes: Iterable[str]) -> Self:
        return cls(f"its pieces are of {' and '.join(sorted(dtypes))}", tensor=tensor, expected="one dtype")

    @classmethod
    def of_gaps(cls, stack: str, last: int, absent: Iterable[int]) -> Self:
        found = f"its experts go up to number {last}, and {listed(map(str, absent))} are not there"
        remedy = f"{_FILES}; or number experts anew, with the rows of their router"
        return cls(found, tensor=stack, expected="experts without gaps", remedy=remedy)

    @classmethod
    def of_sources(cls, tensor: str, sources: Iterable[str], error: Exception) -> Self:
        first, *others = sorted(sources)
        return cls(f"{1 + len(others)} tensors, {first} first, do not make it: {error}", tensor=tensor, remedy=_FILES)

    @classmethod
    def of_square_stack(cls, tensor: str, kind: str, shape: tuple[int, ...]) -> Self:
        """Experts of a class (``kind``) that does not say which of the two equal sizes is the rows."""
        found = f"experts of {kind} of shape {shape} may be transposed or not"
        return cls(found, tensor=tensor, remedy="give the model a state_dict_adapter with its assemblies")

    @classmethod
    def of_interleaved(cls, tensor: str, kind: str) -> Self:
        found = f"experts of {kind} hold rows of gate and up in turn, and in the file they are apart"
        return cls(found, tensor=tensor, remedy="take a checkpoint whose experts are stacked")

    @classmethod
    def of_conversion(cls, function: str) -> Self:
        found = f"transformers makes it with {function}, which is not known to rearrange"
        expected = "a conversion that stacks, concatenates, cuts, permutes or reshapes"
        remedy = "load it with from_pretrained, or give the model a state_dict_adapter"
        return cls(found, expected=expected, remedy=remedy)

    # ---------------------------------------------------------------- adapters

    @classmethod
    def of_kind(cls, file: Named, kind: object) -> Self:
        """The ``peft_type`` of an adapter that is not a LoRA."""
        return cls(f"peft_type is {shown(kind)}", file=file, expected="LORA", remedy=_MERGED_THERE)

    @classmethod
    def of_setting(cls, file: Named, key: str, why: str, *, mergeable: bool) -> Self:
        """A setting of an adapter, and ``why`` it is not merged; ``mergeable``: PEFT may merge it."""
        remedy = _MERGED_THERE if mergeable else None
        return cls(f"{key} is set: {why}", file=file, expected=f"{key} null", remedy=remedy)

    @classmethod
    def of_unknown_setting(cls, file: Named, key: str, stated: object) -> Self:
        found = f"{shown(key)} is {shown(stated)}, which is not known here"
        return cls(found, file=file, expected="plain LoRA", remedy=_MERGED_THERE)

    @classmethod
    def of_start(cls, file: Named, how: str) -> Self:
        found = f"init_lora_weights is {shown(how)}: its start was taken out of the base"
        remedy = "save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        return cls(found, file=file, expected="true", remedy=remedy)

    @classmethod
    def of_unknown(cls, tensor: Stored) -> Self:
        expected = "lora_A and lora_B of a module, or a whole tensor"
        return cls("fp8ckpt does not know what it is", tensor=tensor, expected=expected)

    @classmethod
    def of_convolution(cls, a: Stored, b: Stored) -> Self:
        return cls(f"factors of shapes {a.shape} and {b.shape}: a convolution", tensor=a, expected=FACTORS)

    @classmethod
    def of_dimensions(cls, factor: Stored, shape: tuple[int, ...]) -> Self:
        return cls(f"it is of a tensor of shape {shape}", tensor=factor, expected="2-D or 3-D")

    @classmethod
    def of_square(cls, factor: Stored) -> Self:
        found = "fan_in_fan_out is set, of a matrix of as many rows as columns: PEFT goes by the module's class"
        remedy = "set it to false in adapter_config.json if the module is a Linear"
        return cls(found, tensor=factor, expected="a Conv1D that is known", remedy=remedy)

    @classmethod
    def of_several(cls, factor: Stored) -> Self:
        found = "several adapters on a tensor, of which one is DoRA: norms are of one"
        return cls(found, tensor=factor, expected="one adapter")

    @classmethod
    def of_magnitude(cls, magnitude: Stored) -> Self:
        return cls("DoRA of this", tensor=magnitude, expected="a matrix that is one tensor of the base, and weight 1")

    @classmethod
    def of_wrapping(cls, module: str, parameters: Iterable[str], known: Iterable[str]) -> Self:
        """Several targeted parameters of one module; only for the ``known`` ones is it known which PEFT wraps first."""
        found = f"target_parameters {listed(parameters)}: which was wrapped first is not known"
        return cls(found, tensor=module, expected=f"at most one of a module, or {' and '.join(known)}")

    @classmethod
    def of_parts(cls, factor: Stored, shape: tuple[int, ...]) -> Self:
        return cls(f"it is of {shape}, of which the base holds other parts than rows and columns", tensor=factor)

    @classmethod
    def of_square_experts(cls, factor: Stored) -> Self:
        found = "stacked experts of as many rows as columns: which are the rows of the factors is not recorded"
        expected = "both stacks adapted, or a base with a matrix an expert and peft_version 0.19.1 or newer"
        return cls(found, tensor=factor, expected=expected, remedy=_MERGED_THERE)

    @classmethod
    def of_trained(cls, tensor: Stored, shape: tuple[int, ...]) -> Self:
        """A whole tensor of an adapter; the base has a part of it, of this ``shape``, as a tensor."""
        found = f"a tensor of shape {tensor.shape} was trained whole, of which {shape} is a part in the base"
        return cls(found, tensor=tensor, expected="one tensor", remedy=_MERGED_THERE)

    @classmethod
    def of_untied(cls, tensor: Stored, others: Iterable[str]) -> Self:
        """A whole tensor of an adapter that the base ties to ``others``."""
        found = f"it was trained whole, and apart from what it is tied to in the base: {listed(others)}"
        remedy = (
            "train it with ensure_weight_tying=True; or merge it with PEFT (merge_and_unload), which unties them, "
            "state tie_word_embeddings false there, and quantize that by a --scheme"
        )
        return cls(found, tensor=tensor, expected="the same values for all", remedy=remedy)

    @classmethod
    def of_tied_factors(cls, factor: Stored, key: str, stored: str) -> Self:
        """Factors of ``key``, which the base ties to other names and stores as ``stored``."""
        found = f"factors of a part of what is tied in the base: {shown(key)} is {shown(stored)} there, which would "
        found += "change with it, and was trained without"
        expected = "the same factors for all, or those of the embeddings alone"
        remedy = (
            "train the embeddings with ensure_weight_tying=True; or serve the adapter beside the base, which parts the "
            "two; or untie them before training, and merge into that"
        )
        return cls(found, tensor=factor, expected=expected, remedy=remedy)
