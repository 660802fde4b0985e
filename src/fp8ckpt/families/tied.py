"""Tied weights: several names of a model for one tensor. For a live model they follow from its parameters and
transformers' configuration; for files from the model that their configuration names, or, if transformers does not know
it, from the common names of embeddings and head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from fp8ckpt.families.between import known_model
from fp8ckpt.families.kinds import parts_of
from fp8ckpt.families.names import Shapes, architectures, stated

#: The head and the embeddings of a language model, by their names on disk.
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight", "head.weight")
EMBEDDINGS = (
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.embed_tokens.weight",
)
#: Heads with other names than ``lm_head``, by ``model_type``.
_OTHER_HEADS = (
    ("proj_out", {"whisper", "moonshine", "moonshine_streaming"}),
    ("cls.predictions.decoder", {"bert", "big_bird", "deberta", "deberta-v2", "ernie", "megatron-bert", "roformer"}),
    ("lm_head.decoder", {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "esm", "longformer", "mpnet"}),
    ("lm_head.out_proj", {"t5gemma", "t5gemma2"}),
    ("output_projection", {"biogpt", "trocr"}),
    ("decoder", {"modernbert", "modernbert-decoder"}),
    ("generator_lm_head", {"electra", "convbert"}),
    ("predictions.decoder", {"albert"}),
    ("vocab_projector", {"distilbert"}),
    ("pred_layer.proj", {"xlm", "flaubert"}),
    ("embed_out", {"gpt_neox_japanese"}),
)
_HAS_HEAD = re.compile(r"For\w*(LM|Generation|PreTraining)|LMHead|DoubleHeads")


class Tied(NamedTuple):
    """One tensor of a model that has several names. ``names`` maps each name, those on disk included, to the one that
    it is stored under, or to "" if it is not stored. ``size``: the number of the model's names.
    """

    names: dict[str, str]
    size: int

    @property
    def stored(self) -> list[str]:
        return list(dict.fromkeys(filter(None, self.names.values())))

    def others(self, stored: str) -> list[str]:
        """Return its names except those that ``stored`` stands for."""
        return [name for name, on_disk in self.names.items() if on_disk != stored]


def ties_embeddings(config: Any) -> bool | None:
    """Whether a model's head is its embeddings, according to its configuration or the text section; None if neither
    says.
    """
    said = [stated(section, "tie_word_embeddings") for section in (config, stated(config, "text_config"))]
    return True in said or (False if False in said else None)


def has_language_head(config: Mapping[str, Any]) -> bool:
    """Whether the model predicts tokens, by its ``architectures``; True if none is stated."""
    named = architectures(config)
    return not named or any(map(_HAS_HEAD.search, named))


def tied_sets(parameters: Iterable[tuple[str, Any]], model: Any) -> list[list[str]]:
    """Return disjoint sets of names of a model's ``parameters`` that are one tensor, or that transformers'
    configuration of the ``model`` ties. The first name of a set is the one to store.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in parameters:
        shared.setdefault(id(parameter), []).append(name)
    configured: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    of_name: dict[str, list[str]] = {}
    for names in (*([source, target] for target, source in configured.items()), *shared.values()):
        joined = list(dict.fromkeys(one for name in names for one in of_name.get(name, [name])))
        of_name.update(dict.fromkeys(joined, joined))
    sets = {id(names): names for names in of_name.values() if len(names) > 1}.values()
    return [sorted(names, key=configured.__contains__) for names in sets]


def tied_tensors(config: Mapping[str, Any], stored: Shapes, asked: Collection[str]) -> list[Tied]:
    """Return the tied tensors of a model with this configuration, for a file with the tensors ``stored``. Nothing is
    looked up if all names that are ``asked`` for are in layers.
    """
    if ties_embeddings(config) is False or all(parts_of(name)[1] is not None for name in asked):
        return []
    if (known := known_model(config)) is None:
        return [embeddings_and_head(stored)] if ties_embeddings(config) else []
    made = known.assembled(stored).parts
    on_disk = {name: assembly.pieces[0].source for name, assembly in made.items() if len(assembly.pieces) == 1}
    found = []
    for names in tied_sets(known.model.named_parameters(remove_duplicate=False), known.model):
        own = {name: on_disk.get(name, "") for name in names}
        found.append(Tied({**own, **{name: name for name in own.values() if name}}, len(names)))
    return found


def embeddings_and_head(stored: Collection[str]) -> Tied:
    """Return embeddings and head as one tensor, under the names that most language models have for them."""
    names = [next((name for name in known if name in stored), known[0]) for known in (EMBEDDINGS, HEADS)]
    return Tied({name: name if name in stored else "" for name in names}, 2)


def tied_heads(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Return the modules of a head that is tied to the embeddings and is not among ``names``, under each name that
    engines may have for it; empty if the configuration ties nothing.
    """
    if ties_embeddings(config) is False or not has_language_head(config):
        return []
    heads = [head for head, models in _OTHER_HEADS if config.get("model_type") in models] or ["lm_head"]
    if any(name.endswith(f"{head}.weight") for head in heads for name in names):
        return []
    return [*heads, *(f"language_model.{head}" for head in heads if isinstance(config.get("text_config"), Mapping))]
