"""A model and a checkpoint that do not hold the same tensors, or a model that cannot be filled or written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Readable, Stored, listed, shown
from fp8ckpt.errors.formats import FACTORS

_SHARD = "shard it with fully_shard (FSDP2)"


class ModelMismatchError(Fp8CheckpointError, ValueError):
    """The model or the checkpoint lacks tensors of the other, or their shapes differ."""

    @classmethod
    def of_shape(cls, tensor: str, file: object, found: tuple[int, ...], base: tuple[int, ...], what: str) -> Self:
        """A tensor of ``what`` (the "source", the "model") whose shape is not the base's."""
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

    @classmethod
    def of_other_shape(
        cls, tensor: str | Readable, shape: tuple[int, ...], expected: object, file: object = None
    ) -> Self:
        return cls(f"shape {shape}", tensor=tensor, file=file, expected=f"{expected}")

    @classmethod
    def of_dtype(cls, tensor: str, file: object, dtype: str, base: str) -> Self:
        """``base``: the dtype in the base."""
        remedy = f"give its own base, or cast it to {base} if its values are meant to be that"
        return cls(f"dtype {dtype}", tensor=tensor, file=file, expected=f"{base}, as in the base", remedy=remedy)

    @classmethod
    def of_tensors(cls, base: object, missing: Collection[str], extra: Collection[str], what: str, remedy: str) -> Self:
        """Tensors that are only in the ``base``, and those that are only in ``what`` (see `of_shape`)."""
        name, where = (min(missing), "base") if missing else (min(extra), what)
        found = f"{len(missing)} tensors are only in the base, {len(extra)} only in the {what}; "
        found += f"the first is {shown(name)}, in the {where}"
        if missing and not extra:
            option = "carry=REGEX" if what == "model" else "--carry REGEX"
            remedy = f"{remedy}; or name what is to be taken from the base: {option}"
        return cls(found, file=str(base), expected="the same logical tensors", remedy=remedy)

    @classmethod
    def of_head(cls, tensor: str, file: object, kept: str) -> Self:
        """A tensor of a source that the base ties to ``kept``."""
        found = f"it is not {shown(kept)}, and the base, where the two are one, stores no other"
        remedy = "tie the two before the model is saved, or quantize it by a --scheme instead"
        return cls(found, tensor=tensor, file=file, expected="the same values", remedy=remedy)

    # ---------------------------------------------------------------- adapters

    @classmethod
    def of_empty_adapter(cls, where: str) -> Self:
        return cls("it holds no tensor", file=where, expected="the factors of an adapter")

    @classmethod
    def of_lone_factor(cls, factor: Stored, module: str, lacks: str) -> Self:
        return cls(f"{module} has no lora_{lacks}", tensor=factor, expected="both factors")

    @classmethod
    def of_magnitude(cls, factor: Stored, module: str, *, dora: bool) -> Self:
        """A pair of factors without a magnitude vector in ``dora``, or with one elsewhere."""
        found = f"{module} has {'no' if dora else 'a'} magnitude vector, and use_dora is {dora}"
        return cls(found, tensor=factor, expected="the files of one adapter")

    @classmethod
    def of_unequal_ranks(cls, a: Stored, b: Stored) -> Self:
        found = f"factors of shapes {a.shape} and {b.shape}"
        return cls(found, tensor=a, expected=FACTORS, remedy="save the whole adapter")

    @classmethod
    def of_replacement(cls, tensor: Stored, weight: float) -> Self:
        """A tensor that was trained whole, in an adapter with a ``weight`` other than 1, or in two adapters."""
        if weight == 1:
            return cls("two adapters replace it", tensor=tensor, expected="one that does")
        found = f"a whole tensor of an adapter of weight {weight:g}"
        return cls(found, tensor=tensor, expected="weight 1: it replaces the base's")

    @classmethod
    def of_key(cls, factor: Stored, name: str, others: int, base: object) -> Self:
        """Neither the tensor trained as ``name`` nor ``others`` are in the ``base``."""
        found = f"nothing in the base answers to {shown(name)}" + (f", and to {others} more" if others else "")
        remedy = f"give the base that it was trained on: {base} is another, or ties or lacks this"
        return cls(found, tensor=factor, expected="a tensor of the base", remedy=remedy)

    @classmethod
    def of_pairs(cls, factor: Stored, module: str, pairs: int, parameters: int) -> Self:
        expected = f"one for each of target_parameters, of which {parameters} are of it"
        return cls(f"{module} has {pairs} pairs of factors", tensor=factor, expected=expected)

    @classmethod
    def of_rank(cls, factor: Stored, rank: int, experts: int | None) -> Self:
        expected = f"rank {rank}, by {'' if experts is None else f'{experts} experts, '}the configuration"
        return cls(f"{factor.shape[0]} rows", tensor=factor, expected=expected)

    @classmethod
    def of_factors(cls, a: Stored, b: Stored, target: str, shape: tuple[int, ...]) -> Self:
        found, expected = f"factors {a.shape} and {b.shape}", f"those of {shown(target)}, {shape} in the base"
        return cls(found, tensor=a, expected=expected, remedy="give its own base")

    # ---------------------------------------------------------------- what is loaded, saved or compared

    @classmethod
    def of_absent(cls, names: Collection[str], file: object) -> Self:
        """Tensors of the model that the checkpoint ``file`` lacks."""
        remedy = (
            "load another checkpoint, or only the part of the model without them (for a new head, "
            "load_model(model.model, path, partial=True)), or give the model a state_dict_adapter that knows its names"
        )
        return cls(f"{len(names)} tensors of the model are not in it: {listed(names)}", file=file, remedy=remedy)

    @classmethod
    def of_unused(cls, names: Collection[str], file: object) -> Self:
        """Tensors of the checkpoint ``file`` that the model lacks."""
        remedy = "if the model is meant to be only a part of it, say partial=True"
        return cls(f"{len(names)} of its tensors are not in the model: {listed(names)}", file=file, remedy=remedy)

    @classmethod
    def of_two(cls, tensor: str, file: object, found: str) -> Self:
        """One of two tensors that the model ties and that differ; ``found`` names the other."""
        remedy = "if it is its own, give it memory of its own, and build the model with tie_word_embeddings false"
        return cls(found, tensor=tensor, file=file, remedy=remedy)

    @classmethod
    def of_second(cls, stored: Readable, where: object) -> Self:
        """A tensor that another one of its file becomes, under the names and in the stackings of ``where``."""
        remedy = "ask who wrote it which of the two is meant, and have it written without the other"
        return cls(f"another of its tensors is this one in {where}", tensor=stored, remedy=remedy)

    @classmethod
    def of_copies(cls, names: Collection[str]) -> Self:
        what = f"its state_dict() gives copies of {len(names)} tensors, which nothing can be loaded into"
        remedy = f"load it before it is wrapped in FullyShardedDataParallel, or {_SHARD}"
        return cls(f"{what}: {listed(names)}", expected="its own tensors", remedy=remedy)

    @classmethod
    def of_inference(cls, tensor: str) -> Self:
        remedy = "build the model outside of torch.inference_mode()"
        return cls("it was made in inference mode, and cannot be filled", tensor=tensor, remedy=remedy)

    @classmethod
    def of_memory(cls, tensor: str, numel: int, reach: int) -> Self:
        """A tensor of ``numel`` elements in the memory of ``reach`` elements, which are fewer."""
        found, remedy = f"its {numel} elements lie in the memory of {reach}", "give it memory of its own"
        return cls(found, tensor=tensor, expected="a place for each", remedy=f"{remedy}: tensor.contiguous()")

    @classmethod
    def of_codes(cls, tensor: str, dtype: object) -> Self:
        """A parameter that would get codes without their scales."""
        expected = "bfloat16, float16 or float32, in which values are loaded, scales and all"
        return cls(f"a parameter of dtype {dtype}", tensor=tensor, expected=expected, remedy="cast it first")

    @classmethod
    def of_bare_codes(cls, tensor: str, dtype: object) -> Self:
        """A parameter that was cast, and would be saved as codes that nothing could load."""
        remedy = "cast it to bfloat16 first; to='fp8' with like= writes codes with their scales"
        return cls(f"a parameter of dtype {dtype}, and no scale of it", tensor=tensor, expected="values", remedy=remedy)

    @classmethod
    def of_rounding(cls, stored: Readable, dtypes: tuple[str, object]) -> Self:
        """A tensor that has the first of the dtypes on disk and the second, which holds fewer values, in the model."""
        expected = "a dtype that holds every value of the stored one"
        remedy = "keep this parameter in the stored dtype, or say narrow=True to have it rounded"
        return cls("{} on disk, and {} in the model".format(*dtypes), tensor=stored, expected=expected, remedy=remedy)

    @classmethod
    def of_sharded(cls, names: Collection[str]) -> Self:
        """ShardedTensors, torch's predecessor of DTensor."""
        found = f"{len(names)} tensors are ShardedTensors, the first {shown(next(iter(names)))}"
        save = "to save what FullyShardedDataParallel wraps, set its state_dict_type to FULL_STATE_DICT"
        return cls(found, expected="tensors, or DTensors", remedy=f"{_SHARD}; {save}")

    @classmethod
    def of_meta(cls, names: Collection[str], remedy: str) -> Self:
        return cls(f"{len(names)} tensors are on the meta device: {listed(names)}", remedy=remedy)

    @classmethod
    def of_apart(cls, tensor: str, kept: str) -> Self:
        """A tensor that differs from the one that it is tied to and stored as."""
        found = f"the configuration ties it to {kept}, under whose name the two are stored, and they differ"
        own = "a head of its own is saved without like, from a model that was built with tie_word_embeddings false"
        remedy = f"tie the two before training: model.tie_weights(); {own}"
        return cls(found, tensor=tensor, expected="the same values", remedy=remedy)

    @classmethod
    def of_stage(cls, tensor: str, source: str) -> Self:
        """A tensor that is stored under the name of another stage's tensor."""
        found = f"it is tied to {source}, which this stage of the model does not hold"
        remedy = "take it out of this stage once the two are the same (model.lm_head = None), for one is stored"
        return cls(found, tensor=tensor, expected="both in one stage, where they can be compared", remedy=remedy)

    @classmethod
    def of_plan(cls, model: str, sizes: Collection[str], error: Exception) -> Self:
        """``sizes`` of a mesh over which transformers' own plans cannot shard a ``model``."""
        found = f"DistributedConfig({', '.join(sizes)}) cannot be applied: {type(error).__name__}: {shown(error)}"
        remedy = "combine other sizes, or give a function that shards the model"
        return cls(found, expected=f"what transformers can make of {model}", remedy=remedy)

    @classmethod
    def of_adapter(cls) -> Self:
        found = "its state_dict_adapter says only by assemblies what its tensors are called on disk"
        remedy = "give like=, the checkpoint that it came from"
        return cls(found, expected="a base, of whose tensors they are made", remedy=remedy)

    @classmethod
    def of_peft(cls, remedy: str) -> Self:
        return cls("it holds adapters of PEFT beside its weights", remedy=remedy)

    @classmethod
    def of_deepspeed(cls) -> Self:
        found = "DeepSpeed has shared out its parameters (ZeRO 3), and they have no values here"
        remedy = "shard it with fully_shard (FSDP2) instead, or use ZeRO 1 or 2"
        return cls(found, expected="whole parameters, or DTensors", remedy=remedy)
