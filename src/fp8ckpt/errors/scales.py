"""What is wrong with the scales of a weight, and formats that are recognised and not read.

Whoever knows with which scales the codes were made is who wrote the file: no remedy guesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Named, Readable, Stored, listed, shown
from fp8ckpt.errors.files import COPY

_SAME_TOOL = "use the tool that wrote it"
FACTORS = "matrices [rank, in] and [out, rank]"
MERGED_THERE = "merge it with PEFT (merge_and_unload) into the model in BF16, and convert that with --like"


class MissingScaleError(Fp8CheckpointError, ValueError):
    """An FP8 weight has no scale: its codes are not its values."""

    remedy = (
        "look for it in the other files that belong to this one, or under another name; "
        "if the weights were only cast to FP8, without any, use the tool that did: fp8ckpt cannot know"
    )

    @classmethod
    def of(cls, weight: Stored, expected: str, near: str | None) -> Self:
        """``expected``: the name that its scale could have; ``near``: what may be it under another name."""
        misnamed = "" if near is None else f" (is {shown(near)} its scale, misnamed?)"
        return cls(f"{weight.dtype} weight without a scale{misnamed}", tensor=weight, expected=shown(expected))


class OrphanScaleError(Fp8CheckpointError, ValueError):
    """A scale belongs to no FP8 weight."""

    remedy = "look for the weight in the other files that belong to this one, or ask who wrote it what became of it"

    @classmethod
    def of(cls, scale: Stored, weight: str, stored: Stored | None) -> Self:
        """``weight``: the name of the weight that it could scale; ``stored``: what is there instead of FP8."""
        found = "a scale without a weight"
        if stored is not None:
            found = f"the scale of a weight of dtype {stored.dtype}, which is not FP8"
        return cls(found, tensor=scale, expected=f"an FP8 tensor {shown(weight)}")


class AmbiguousScaleError(Fp8CheckpointError, ValueError):
    """More than one tensor could be the scale of one weight."""

    expected = "one scale"
    remedy = "ask who wrote the file which of them the codes were made with"

    @classmethod
    def of(cls, weight: Stored, scales: Sequence[str]) -> Self:
        return cls(f"its scale could be any of {', '.join(shown(key) for key in scales)}", tensor=weight)


class ScaleShapeError(Fp8CheckpointError, ValueError):
    """A scale does not tile its weight."""

    @classmethod
    def of(cls, weight: Stored, scale: Stored, block_size: tuple[int, ...] | None, fit: tuple[int, ...] | None) -> Self:
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
    def of_group(cls, weight: Stored, scale: Stored, stated: int, group: int) -> Self:
        """``stated``: how many codes of four bits the configuration has share a scale; ``group``: how many do."""
        found = f"scale shape {scale.shape} in {shown(scale.file.name)} is of groups of {group}, group_size is {stated}"
        remedy = "state the group_size of the scales, wherever a configuration file has one: engines size them by it"
        expected = f"group_size {group}, by the scales' dtype {scale.dtype}"
        return cls(found, tensor=weight, expected=expected, remedy=remedy)


class ScaleDtypeError(Fp8CheckpointError, ValueError):
    """A scale has a dtype that no FP8 family uses."""

    remedy = _SAME_TOOL

    @classmethod
    def of(cls, weight: Stored, scale: Stored, known: Iterable[str]) -> Self:
        found = f"its scale {shown(scale.name)} in {shown(scale.file.name)} has dtype {scale.dtype}"
        return cls(found, tensor=weight, expected=f"one of {', '.join(known)}")


class ScaleValueError(Fp8CheckpointError, ValueError):
    """A scale is NaN, infinite, zero or negative."""

    @classmethod
    def of(cls, scale: Stored, found: str) -> Self:
        """``found``: how many cannot be scales, and the first of them."""
        return cls(found, tensor=scale, expected="finite and positive", remedy=COPY)


class UnsupportedFormatError(Fp8CheckpointError, ValueError):
    """Packed or integer quantization: recognised, and not handled."""

    @classmethod
    def of_packed(cls, weight: Stored) -> Self:
        found = f"{weight.dtype} {weight.shape} is packed or integer (INT8, INT4, FP6), which fp8ckpt does not read"
        return cls(found, tensor=weight, expected="FP8, MXFP4 or NVFP4", remedy=_SAME_TOOL)

    @classmethod
    def of_factor(cls, weight: Stored, second: str) -> Self:
        """``second``: the name of what scales the codes besides their scale."""
        found = f"{shown(second)} is a second factor or a zero point, which fp8ckpt does not apply"
        return cls(found, tensor=weight, expected="one scale", remedy=_SAME_TOOL)

    @classmethod
    def of_order(cls, weight: Stored, scale: Stored) -> Self:
        """``scale``: exponents of blocks that may be stored in a kernel's order."""
        found = f"the {scale.dtype} scales {shown(scale.name)} may be in the order of a kernel, not that of the blocks"
        return cls(found, tensor=weight, expected="float scales, or one", remedy=_SAME_TOOL)

    @classmethod
    def of_dtype(cls, tensor: str, file: object, what: str, known: Iterable[str], remedy: str | None = None) -> Self:
        """``what`` is of a dtype that no values of this kind have."""
        return cls(what, tensor=tensor, file=file, expected=f"one of {', '.join(known)}", remedy=remedy)

    @classmethod
    def of_codes(cls, tensor: Readable, dtype: str) -> Self:
        """A weight of a base whose codes are never written."""
        found, expected = (
            f"{dtype} codes in the base",
            "F8_E4M3, the one FP8 dtype that releases use and fp8ckpt writes",
        )
        return cls(found, tensor=tensor, expected=expected, remedy="write bf16, and give that a --scheme")

    @classmethod
    def of_quantized(cls, tensor: Readable) -> Self:
        """A tensor of a source that is to be quantized."""
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

    # ---------------------------------------------------------------- adapters

    @classmethod
    def of_kind(cls, file: Named, kind: object) -> Self:
        """The ``peft_type`` of an adapter that is no LoRA."""
        return cls(f"peft_type is {shown(kind)}", file=file, expected="LORA", remedy=MERGED_THERE)

    @classmethod
    def of_setting(cls, file: Named, key: str, why: str, *, mergeable: bool) -> Self:
        """What an adapter's configuration has, and ``why`` it is not merged; PEFT may know how (``mergeable``)."""
        remedy = MERGED_THERE if mergeable else None
        return cls(f"{key} is set: {why}", file=file, expected=f"{key} null", remedy=remedy)

    @classmethod
    def of_unknown_setting(cls, file: Named, key: str, stated: object) -> Self:
        found = f"{shown(key)} is {shown(stated)}, which is not known here"
        return cls(found, file=file, expected="plain LoRA", remedy=MERGED_THERE)

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
        """Parameters of one module that an adapter targets; of ``known`` ones it is known which PEFT wraps first."""
        found = f"target_parameters {listed(parameters)}: which was wrapped first is not known"
        return cls(found, tensor=module, expected=f"at most one of a module, or {' and '.join(known)}")

    @classmethod
    def of_parts(cls, factor: Stored, shape: tuple[int, ...]) -> Self:
        return cls(f"it is of {shape}, of which the base holds other parts than rows and columns", tensor=factor)

    @classmethod
    def of_square_experts(cls, factor: Stored) -> Self:
        found = "stacked experts of as many rows as columns: which are the rows of the factors is not recorded"
        expected = "both stacks adapted, or a base with a matrix an expert and peft_version 0.19.1 or newer"
        return cls(found, tensor=factor, expected=expected, remedy=MERGED_THERE)

    @classmethod
    def of_trained(cls, tensor: Stored, shape: tuple[int, ...]) -> Self:
        """A whole tensor of an adapter, of which the base has a part as one of this ``shape``."""
        found = f"a tensor of shape {tensor.shape} was trained whole, of which {shape} is a part in the base"
        return cls(found, tensor=tensor, expected="one tensor", remedy=MERGED_THERE)

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
        """Factors of ``key``, which the base has as one with others, by the name ``stored``."""
        found = f"factors of a part of what is tied in the base: {shown(key)} is {shown(stored)} there, which would "
        found += "change with it, and was trained without"
        expected = "the same factors for all, or those of the embeddings alone"
        remedy = (
            "train the embeddings with ensure_weight_tying=True; or serve the adapter beside the base, which parts the "
            "two; or untie them before training, and merge into that"
        )
        return cls(found, tensor=factor, expected=expected, remedy=remedy)
