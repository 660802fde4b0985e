"""A model and a checkpoint that do not hold the same tensors, or a model that cannot be filled or written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Readable, Says, Stored, shown
from fp8ckpt.errors.formats import FACTORS

_SHARD = "shard it with fully_shard (FSDP2)"


class ModelMismatchError(Fp8CheckpointError, ValueError):
    """The model or the checkpoint lacks tensors of the other, or their shapes differ."""

    # fmt: off
    of_model_shape = Says("shape {shape} in the model", "{stored}")
    of_assembly = Says("its assembly has {defect}", remedy="correct the state_dict_adapter")
    of_plans = Says("the ranks' plans hold {planned} of its bytes", "{whole}",
        "use a planner that saves each shard once")
    of_other_shape = Says("shape {shape}", "{expected}")
    # ``base``: the dtype in the base.
    of_dtype = Says("dtype {dtype}", "{base}, as in the base",
        "give the base that it was trained from, or cast it to {base} if its values are meant to be {base}")
    # A tensor of a source that the base ties to ``kept``.
    of_head = Says("it differs from {kept:shown}, which the base ties to it and stores instead", "the same values",
        "tie the two before the model is saved, or quantize with --scheme instead of --like")

    # ---------------------------------------------------------------- adapters
    of_empty_adapter = Says("it holds no tensors", "the factors of an adapter")
    of_lone_factor = Says("{module} has no lora_{lacks}", "both factors")
    of_unequal_ranks = Says("factors of shapes {tensor.shape} and {b.shape}", FACTORS, "save the whole adapter")
    of_pairs = Says("{module} has {pairs} pairs of factors",
        "{parameters}, one for each of its target_parameters")
    of_factors = Says("factors {tensor.shape} and {b.shape}", "those of {target:shown}, which is {shape} in the base",
        "give the base that the adapter was trained on")

    # ---------------------------------------------------------------- what is loaded, saved or compared
    # Tensors of the model that the checkpoint ``file`` lacks.
    of_absent = Says("{names:count} tensors of the model are not in it: {names:listed}",
        remedy="load another checkpoint, or only the part of the model without them (for a new head, "
        "load_model(model.model, path, partial=True)), or give the model a state_dict_adapter that knows its names")
    # Tensors of the checkpoint ``file`` that the model lacks.
    of_unused = Says("{names:count} of its tensors are not in the model: {names:listed}",
        remedy="if the model is meant to be only a part of it, pass partial=True")
    # One of two tensors that the model ties and that differ; ``found`` names the other.
    of_two = Says("{found}",
        remedy="if it is meant to differ, give it its own memory, and build the model with tie_word_embeddings false")
    # A tensor that another one of its file becomes, under the names and in the stackings of ``where``.
    of_second = Says("another of its tensors has the same name in {where}",
        remedy="ask the author of the checkpoint which of the two is meant, and write it with that one only")
    of_copies = Says(
        "its state_dict() returns copies of {names:count} tensors, which cannot be loaded into: {names:listed}",
        "the model's own tensors", f"load it before it is wrapped in FullyShardedDataParallel, or {_SHARD}")
    of_inference = Says("it was created in inference mode, and cannot be written to",
        remedy="build the model outside torch.inference_mode()")
    # A tensor of ``numel`` elements in the memory of ``reach`` elements, which are fewer.
    of_memory = Says("its {numel} elements share the memory of {reach}", "memory for each element",
        "give it memory of its own: tensor.contiguous()")
    # A parameter that would get codes without their scales.
    of_codes = Says("a parameter of dtype {dtype}",
        "bfloat16, float16 or float32, which values are loaded as, with their scales applied", "cast it first")
    # A parameter that was cast, and would be saved as codes that nothing could load.
    of_bare_codes = Says("a parameter of dtype {dtype} without a scale", "values",
        "cast it to bfloat16 first; to='fp8' with like= writes codes with their scales")
    of_meta = Says("{names:count} tensors are on the meta device: {names:listed}", remedy="{remedy}")
    # A tensor that differs from the one that it is tied to and stored as.
    of_apart = Says("it differs from {kept}, which the configuration ties it to: only one of the two can be stored",
        "the same values",
        "tie the two before training: model.tie_weights(); to save a head of its own, build the model with "
        "tie_word_embeddings false, and save it without like")
    # A tensor that is stored under the name of another stage's tensor.
    of_stage = Says("it is tied to {source}, which this stage of the model does not hold",
        "both in one stage, where they can be compared",
        "once the two are the same, take it out of this stage (model.lm_head = None): only one is stored")
    # ``sizes`` of a mesh over which transformers' own plans cannot shard a ``model``.
    of_plan = Says("DistributedConfig({sizes:joined}) cannot be applied: {error.__class__.__name__}: {error:shown}",
        "sizes over which transformers can shard {model}", "use other sizes, or give a function that shards the model")
    of_adapter = Says("its state_dict_adapter names the tensors on disk only through assemblies, which need a base",
        "a base", "give like=, the checkpoint that it came from")
    of_peft = Says("it holds PEFT adapters beside its weights", remedy="{remedy}")
    of_deepspeed = Says("DeepSpeed has partitioned its parameters (ZeRO 3), and they have no values here",
        "whole parameters, or DTensors", "shard it with fully_shard (FSDP2) instead, or use ZeRO 1 or 2")
    # fmt: on

    @classmethod
    def of_shape(cls, tensor: str, file: object, found: tuple[int, ...], base: tuple[int, ...], what: str) -> Self:
        """A tensor of ``what`` (the "source", the "model") whose shape is not the base's."""
        remedy = "give the base that it was trained from"
        if len(found) == 2 and found[1:] == base[1:]:
            instead = (
                "quantize the source with --scheme, which keeps its own configuration and tokenizer"
                if what == "source"
                else "save it in bf16 without like, put the tokenizer beside it, and convert that with --scheme"
            )
            remedy += "; if its vocabulary was resized, the base's configuration and tokenizer do not fit it: "
            remedy += f"{instead}; or resize it back: model.resize_token_embeddings({base[0]})"
        expected = f"{base}, as in the base"
        return cls(f"shape {found} in the {what}", tensor=tensor, file=file, expected=expected, remedy=remedy)

    @classmethod
    def of_tensors(cls, base: object, missing: Collection[str], extra: Collection[str], what: str, remedy: str) -> Self:
        """Tensors that are only in the ``base``, and those that are only in ``what`` (see `of_shape`)."""
        name, where = (min(missing), "base") if missing else (min(extra), what)
        found = f"{len(missing)} tensors are only in the base, {len(extra)} only in the {what}; "
        found += f"the first is {shown(name)}, in the {where}"
        if missing and not extra:
            option = "carry=REGEX" if what == "model" else "--carry REGEX"
            remedy = f"{remedy}; or name the tensors to take from the base: {option}"
        return cls(found, file=str(base), expected="the same logical tensors", remedy=remedy)

    @classmethod
    def of_magnitude(cls, factor: Stored, module: str, *, dora: bool) -> Self:
        """A pair of factors without a magnitude vector in ``dora``, or with one elsewhere."""
        found = f"{module} has {'no' if dora else 'a'} magnitude vector, but use_dora is {dora}"
        return cls(found, tensor=factor, expected="weights and a configuration of one adapter")

    @classmethod
    def of_replacement(cls, tensor: Stored, weight: float) -> Self:
        """A tensor that was trained whole, in an adapter with a ``weight`` other than 1, or in two adapters."""
        if weight == 1:
            return cls("two adapters replace it", tensor=tensor, expected="one adapter that replaces it")
        found = f"a whole tensor in an adapter of weight {weight:g}"
        return cls(found, tensor=tensor, expected="weight 1, for a tensor that replaces the base's")

    @classmethod
    def of_key(cls, factor: Stored, name: str, others: int, base: object) -> Self:
        """Neither the tensor trained as ``name`` nor ``others`` are in the ``base``."""
        found = f"the base has no {shown(name)}" + (f", nor {others} more tensors of the adapter" if others else "")
        remedy = f"give the base that the adapter was trained on: {base} is another one, or ties or lacks this tensor"
        return cls(found, tensor=factor, expected="a tensor of the base", remedy=remedy)

    @classmethod
    def of_rank(cls, factor: Stored, rank: int, experts: int | None) -> Self:
        expected = f"rank {rank}{'' if experts is None else f' for each of {experts} experts'}, by the configuration"
        return cls(f"{factor.shape[0]} rows", tensor=factor, expected=expected)

    @classmethod
    def of_rounding(cls, stored: Readable, dtypes: tuple[str, object]) -> Self:
        """A tensor that has the first of the dtypes on disk and the second, which holds fewer values, in the model."""
        expected = "a dtype that holds every value of the stored one"
        remedy = "keep this parameter in the stored dtype, or pass narrow=True to round it"
        return cls("{} on disk, but {} in the model".format(*dtypes), tensor=stored, expected=expected, remedy=remedy)

    @classmethod
    def of_sharded(cls, names: Collection[str]) -> Self:
        """ShardedTensors, torch's predecessor of DTensor."""
        found = f"{len(names)} tensors are ShardedTensors, the first {shown(next(iter(names)))}"
        save = "to save a model in FullyShardedDataParallel, set its state_dict_type to FULL_STATE_DICT"
        return cls(found, expected="tensors or DTensors", remedy=f"{_SHARD}; {save}")
