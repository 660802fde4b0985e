"""Formats that are recognised and not handled: of weights, of tensors to be quantized, of models, of adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Named, Says, listed
from fp8ckpt.errors.scales import SAME_TOOL

_FILES = "check that no file of the checkpoint is missing"
_MERGED_THERE = "merge it with PEFT (merge_and_unload) into the model in BF16, and convert that with --like"
_WRITTEN = "F8_E4M3, the one FP8 dtype that releases use and fp8ckpt writes"
FACTORS = "matrices [rank, in] and [out, rank]"


class UnsupportedFormatError(Fp8CheckpointError, ValueError):
    """Packed or integer quantization: recognised, and not handled."""

    # fmt: off
    of_object = Says("it is not a tensor", "tensors only", "keep it out of the state dict")
    of_no_place = Says("a safetensors file cannot store dtype {dtype}", remedy="cast it first")
    of_shard = Says("a shard of shape {shape} for {placements} of {whole}", "the shape that the placements give")
    of_placement = Says("the placement {placement}", "Shard or Replicate", "redistribute it first")
    of_codes_and_others = Says("some of its pieces are FP8 and others {dtype}", "one dtype", "convert to bf16")
    of_base = Says("none of its tensors is quantized", "an FP8 base", "{remedy}")
    of_grid = Says("its scale {scale.name} has shape {scale.shape}", "{fits}",
        "use load_model or FP8StorageReader, which accept any scale shape")
    of_axes = Says("shape {shape}", "at least two dimensions")
    of_packed = Says(
        "{tensor.dtype} {tensor.shape} is packed or integer (INT8, INT4, FP6), which fp8ckpt does not read",
        "FP8, MXFP4 or NVFP4", SAME_TOOL)
    # ``second``: the name of the tensor that scales the codes besides their scale.
    of_factor = Says("{second:shown} is a second factor or a zero point, which fp8ckpt does not apply", "one scale",
        SAME_TOOL)
    # ``scale``: exponents of blocks that may be stored in a kernel's order.
    of_order = Says(
        "the {scale.dtype} scales {scale.name:shown} may be in a kernel's order, not in block order",
        "float scales, or one scale", SAME_TOOL)
    # A weight of a base whose codes are never written.
    of_codes = Says("{dtype} codes in the base", _WRITTEN, "convert to bf16, and quantize that with --scheme")
    # A weight with a factor whose rows are longer than a working step.
    of_rows = Says("rows of {size} elements, whose last group is not whole",
        "rows of at most {most} elements, or of whole groups")
    of_native = Says("Mistral's own layout, whose configuration states quantization differently from a scheme's",
        remedy="give the base that it came from: --like BASE")
    # A quantized tensor in a source that is to be quantized.
    of_quantized = Says("it is already quantized", "BF16, F16 or F32", "convert it first: --to bf16")
    of_assembly = Says("its assembly has {defect}")
    of_layout = Says("the model's own layout needs transformers, which is not installed",
        remedy="pip install 'fp8ckpt[hf]'")
    # Experts of a class (``kind``) that does not say which of the two equal sizes is the rows.
    of_square_stack = Says("experts of {kind} of shape {shape} may be transposed or not",
        remedy="give the model a state_dict_adapter with its assemblies")
    of_interleaved = Says("experts of {kind} interleave the rows of gate and up, which the file stores separately",
        remedy="use a checkpoint whose experts are stacked")
    of_conversion = Says("transformers makes it with {function}, which is not known as a rearrangement",
        "a conversion that stacks, concatenates, cuts, permutes or reshapes",
        "load it with from_pretrained, or give the model a state_dict_adapter")

    # ---------------------------------------------------------------- adapters
    # The ``peft_type`` of an adapter that is not a LoRA.
    of_kind = Says("peft_type is {kind:shown}", "LORA", _MERGED_THERE)
    of_unknown_setting = Says("{key:shown} is {stated:shown}, which fp8ckpt does not know", "plain LoRA", _MERGED_THERE)
    of_start = Says("init_lora_weights is {how:shown}: its initial factors were subtracted from the base", "true",
        "save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    of_unknown = Says("fp8ckpt does not know this kind of tensor", "lora_A and lora_B of a module, or a whole tensor")
    of_convolution = Says("factors of shapes {tensor.shape} and {b.shape}: a convolution", FACTORS)
    of_dimensions = Says("it adapts a tensor of shape {shape}", "a 2-D or 3-D tensor")
    of_square = Says("fan_in_fan_out is set for a square matrix: the module's class decides whether PEFT transposes it",
        "a module that is known to be a Conv1D", "set it to false in adapter_config.json if the module is a Linear")
    of_several = Says("several adapters change the tensor, and one is DoRA, whose norms hold for one adapter only",
        "one adapter")
    of_magnitude = Says("DoRA that fp8ckpt cannot merge",
        "a matrix that is one tensor of the base, and an adapter of weight 1")
    of_parts = Says("it adapts a tensor of shape {shape}, of which the base stores parts other than rows or columns")
    of_square_experts = Says(
        "the stacked experts are square: which dimension the factors take as rows is not recorded",
        "an adapter of both stacks, or a base with a matrix per expert and peft_version 0.19.1 or newer", _MERGED_THERE)
    # A whole tensor of an adapter; the base has a part of it, of this ``shape``, as a tensor.
    of_trained = Says("it was trained whole, with shape {tensor.shape}; the base stores a part, {shape}, separately",
        "one tensor", _MERGED_THERE)
    # A whole tensor of an adapter that the base ties to ``others``.
    of_untied = Says("it was trained whole, separately from the tensors that the base ties it to: {others:listed}",
        "the same values for all of them",
        "train it with ensure_weight_tying=True; or merge it with PEFT (merge_and_unload), which unties them, "
        "state tie_word_embeddings false there, and quantize that with --scheme")
    # Factors of ``key``, which the base ties to other names and stores as ``stored``.
    of_tied_factors = Says(
        "the base ties {key:shown} to {stored:shown} and stores only that, which would change with these factors but "
        "was trained without them", "factors of the embeddings alone, or equal ones for all tied tensors",
        "train the embeddings with ensure_weight_tying=True; or serve the adapter beside the base, where "
        "the two stay separate; or untie them before training, and merge into the untied base")
    # fmt: on

    @classmethod
    def of_dtype(cls, tensor: str, file: object, what: str, known: Iterable[str], remedy: str | None = None) -> Self:
        """``what`` has a dtype that no values of this kind have."""
        return cls(what, tensor=tensor, file=file, expected=f"one of {', '.join(known)}", remedy=remedy)

    @classmethod
    def of_scheme(cls, path: object, left: Iterable[str]) -> Self:
        """A source of which nothing is quantized; ``left``: the reasons."""
        found = "this scheme quantizes none of its tensors"
        expected = "Linears in the layers of a language model, or stacks of experts"
        remedy = f"give other weights, another --scheme, or --like BASE ({'; '.join(left) or 'it has no weights'})"
        return cls(found, file=str(path), expected=expected, remedy=remedy)

    @classmethod
    def of_model(cls, config: str, named: object) -> Self:
        found = f"the configuration names {named or 'no model'}"
        return cls(found, file=config, expected="a model that transformers knows")

    @classmethod
    def of_pieces(cls, tensor: str, dtypes: Iterable[str]) -> Self:
        return cls(f"its pieces have the dtypes {' and '.join(sorted(dtypes))}", tensor=tensor, expected="one dtype")

    @classmethod
    def of_gaps(cls, stack: str, last: int, absent: Iterable[int]) -> Self:
        found = f"its experts are numbered up to {last}, and {listed(map(str, absent))} are missing"
        remedy = f"{_FILES}; or renumber the experts, together with the rows of their router"
        return cls(found, tensor=stack, expected="experts without gaps", remedy=remedy)

    @classmethod
    def of_sources(cls, tensor: str, sources: Iterable[str], error: Exception) -> Self:
        first, *others = sorted(sources)
        found = f"{1 + len(others)} tensors, {first} first, cannot be combined into it: {error}"
        return cls(found, tensor=tensor, remedy=_FILES)

    @classmethod
    def of_setting(cls, file: Named, key: str, why: str, *, mergeable: bool) -> Self:
        """A setting of an adapter, and ``why`` it is not merged; ``mergeable``: PEFT may merge it."""
        remedy = _MERGED_THERE if mergeable else None
        return cls(f"{key} is set: {why}", file=file, expected=f"{key} null", remedy=remedy)

    @classmethod
    def of_wrapping(cls, module: str, parameters: Iterable[str], known: Iterable[str]) -> Self:
        """Several targeted parameters of one module; only for the ``known`` ones is it known which PEFT wraps first."""
        found = f"target_parameters {listed(parameters)}, and it is not known which PEFT wrapped first"
        return cls(found, tensor=module, expected=f"at most one per module, or {' and '.join(known)}")
