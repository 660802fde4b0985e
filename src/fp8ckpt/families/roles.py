"""The role of a weight in its model, from its name, its shape and its neighbours.

Releases in FP8 quantize the Linears of the language model's layers and the stacks of its experts, and no other weights.
`Roles` gives the reason why a weight is not quantized, or None. A router is recognised by its name, or by having one
row for each neighbouring expert; a stack of experts by its three dimensions; the projections of a recurrent layer with
one or two rows a head by their names, or by the vector of decay rates (``A_log``) beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from fp8ckpt.families.loaders import is_transposed
from fp8ckpt.tensors.formats import module_of

Shape = tuple[int, ...]

# Weights that the releases of a family do not quantize, by the ends of names, for adapters without a file at hand. Ends
# of names are no modules: "model.norm.weight" also matches "model.language_model.norm.weight".
MISTRAL3 = (
    "embed_tokens.weight", "lm_head.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
    "model.norm.weight",
)  # fmt: skip
#: Whole modules of Mistral3: those of vision.
MISTRAL3_TOWERS = ("model.vision_tower", "model.multi_modal_projector")
#: The same for DeepSeek V3: embeddings, heads, norms, routers, and the projection of multi-token prediction.
DEEPSEEK_V3 = (
    "embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", "eh_proj.weight",
    "shared_head.head.weight",
)  # fmt: skip

_WEIGHT = ".weight"
#: Parts that are never quantized, whatever their shape, and the pattern of their modules' names.
_PARTS = (
    ("embeddings", re.compile(r"embed|relative_attention_bias$|_emb$|(^|\.)(emb|shared|wpe|wte)$", re.IGNORECASE)),
    ("projections of hyper-connections", re.compile(r"hyper_connection")),
    ("norms", re.compile(r"norm", re.IGNORECASE)),
    ("convolutions", re.compile(r"conv", re.IGNORECASE)),
    (
        "parts of vision or audio towers and projectors",
        re.compile(
            r"vision|visual|vit\b|image|audio|video|projector|merger|connector|mm_|aligner|q_?former|resampler"
            r"|language_projection",
            re.IGNORECASE,
        ),
    ),
)
#: The same by the last component of the name: anywhere, and (below) only outside layers.
_LEAVES = {
    "heads": {"lm_head", "head"},
    "projections of multi-token prediction": {"eh_proj"},
    "weights of sparse attention's indexer": {"weights_proj"},
}
_HEADS_OUTSIDE_LAYERS = {"output", "score", "classifier", "pre_classifier"}
#: A component in the names of a head's parts, outside layers: ``lm_head.dense``, ``predictions.transform``.
_PARTS_OF_HEADS = re.compile(r"(\w+_)?(head|predictions|pooler|vocab_transform)")
#: The prefix of a tower without a name of its own, and the prefix of the text model beside it.
_NAMELESS_TOWERS = (("blocks.", "layers."), ("encoder.", "language_model."))
_TOWER_CONFIG = re.compile(r"(vision|audio|encoder)_config")
_VOCABULARY = re.compile(r"\w*vocab_size\w*|n_vocab")
#: Modules that engines always build unquantized; heads by whole components of their names.
_BUILT_PLAIN = {"gate", "router", "shared_expert_gate", *_LEAVES["projections of multi-token prediction"]}
_BUILT_PLAIN |= _LEAVES["weights of sparse attention's indexer"]
_HEADS_BUILT_PLAIN = (".lm_head", ".output", ".shared_head.head")
#: Components of a router's name, anywhere and last. ``gate_proj`` is none, nor is a `gate` with an ``up`` beside it.
_ROUTER = re.compile(r"gate|\w*router\w*|\w*experts?_gate", re.IGNORECASE)
_ROUTER_LEAF = re.compile(r"wg|gating|(gate|gating)_net(work)?", re.IGNORECASE)
_ATTENTION = re.compile(r"att", re.IGNORECASE)
_ROUTER_IN_ATTENTION = re.compile(r"\w*router\w*", re.IGNORECASE)
#: A gated delta net's projections to one or two numbers a head: too small for blocks, and BF16 in all releases.
_PER_HEAD = re.compile(r"in_proj_(ba|ab|a|b)")
_DECAY_RATES = ".A_log"
#: A gate of attention, with one row a head, or one for each number of each head.
_GATE_OF_HEADS = re.compile(r"g_proj|gate(_proj)?")
_HEAD_COUNTS = re.compile(r"(n|num)_(attention_)?heads?")
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_EXPERT_COUNTS = re.compile(r"(moe_)?(n|num)_(local_|routed_|moe_)?experts")
_NO_STACK = ("bias", "scale", "scales", "blocks", "scale_inv")


class Roles:
    """The roles of a checkpoint's weights. ``shapes``: of all tensors by name; ``config``: ``config.json``."""

    def __init__(self, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> None:
        self._shapes = shapes
        self._config = config

    def is_weight(self, name: str) -> bool:
        """Whether the tensor may be a matrix or a stack: a ``.weight`` of two dimensions, or any tensor of more."""
        rank = len(self._shapes[name])
        return rank > 2 or (rank == 2 and name.endswith(_WEIGHT))

    def is_stack(self, name: str) -> bool:
        """Whether the tensor is a stack of experts: ``[experts, rows, columns]``."""
        shape, module = self._shapes[name], module_of(name)
        if len(shape) != 3 or _part_of(module) is not None or module.endswith(_NO_STACK):
            return False
        held = module if name.endswith(_WEIGHT) else module.rpartition(".")[0]
        if _EXPERTS.search(held) is not None:
            return True
        return shape[0] in self._experts_beside(module) and _ATTENTION.search(held) is None  # heads are no experts

    def experts_of(self, name: str) -> str | None:
        """Return the module of the experts that a weight is one of, which engines build as one layer; or None."""
        components = module_of(name).split(".")
        stack = self.is_stack(name)
        for i, part in enumerate(components[:-1]):
            if _holds_experts(part) and (stack or components[i + 1].isdigit()):
                return ".".join(components[: i + 1])
        return ".".join((*components[:-1], "experts")) if stack else None

    def left(self, name: str) -> str | None:
        """Return the kind of weight, in the plural, that releases do not quantize; None if they quantize it."""
        module, rank = module_of(name), len(self._shapes[name])
        if (part := _part_of(module)) is not None:
            return part
        if module.startswith(self._nameless_towers):
            return _PARTS[-1][0]
        if self.is_stack(name):
            return None
        if rank > 2:
            return f"tensors of {rank} dimensions that are no experts"
        leaf = module.rpartition(".")[2]
        for reason, leaves in _LEAVES.items():
            if leaf in leaves:
                return reason
        if self._is_router(name):
            return "routers of experts"
        if not _in_layer(module):
            if leaf in _HEADS_OUTSIDE_LAYERS or any(map(_PARTS_OF_HEADS.fullmatch, module.split("."))):
                return "heads"
            if self._shapes[name][0] in _stated(self._config, _VOCABULARY):
                return "embeddings or heads, having a row for each token"
        if is_transposed(self._config, leaf):
            return "weights of Conv1D, which lie across and which no engine dequantizes"
        if self._is_per_head(name):
            return "projections to a number or two a head"
        return None

    def _is_router(self, name: str) -> bool:
        path = _in_layer(module_of(name)) or module_of(name).split(".")
        if any(_ATTENTION.search(part) for part in path):
            return any(_ROUTER_IN_ATTENTION.fullmatch(part) for part in path)
        if self._is_named_a_router(path, name):
            return True
        rows, columns = self._shapes[name]
        beside = rows in self._experts_beside(module_of(name)) and rows < columns
        return beside and not any("expert" in part for part in path)

    def _is_named_a_router(self, path: list[str], name: str) -> bool:
        if not (any(_ROUTER.fullmatch(part) for part in path) or _ROUTER_LEAF.fullmatch(path[-1])):
            return False
        beside = name.removesuffix("gate.weight") + "up"  # a gate with an up of the same shape is part of a plain MLP
        ups = (self._shapes.get(f"{beside}.weight"), self._shapes.get(f"{beside}_proj.weight"))
        return not (name.endswith(".gate.weight") and self._shapes[name] in ups)

    def _is_per_head(self, name: str) -> bool:
        parent, _, leaf = module_of(name).rpartition(".")
        if _PER_HEAD.fullmatch(leaf):
            return True
        rows = self._shapes[name][0]
        if _GATE_OF_HEADS.fullmatch(leaf) and _ATTENTION.search(parent) and rows in _stated(self._config, _HEAD_COUNTS):
            return True
        rates = self._shapes.get(parent + _DECAY_RATES, ())
        heads = max(rates, default=0)
        return heads > 1 and rates.count(1) == len(rates) - 1 and rows in (heads, 2 * heads)

    @cached_property
    def _nameless_towers(self) -> tuple[str, ...]:
        if not any(map(_TOWER_CONFIG.fullmatch, self._config)):
            return ()
        return tuple(tower for tower, text in _NAMELESS_TOWERS if any(name.startswith(text) for name in self._shapes))

    def _experts_beside(self, module: str) -> set[int]:
        """Return the possible numbers of experts in the two modules above ``module``."""
        above = module.rpartition(".")[0]
        return self._experts.get(above, set()) | self._experts.get(above.rpartition(".")[0], set())

    @cached_property
    def _experts(self) -> dict[str, set[int]]:
        """The possible numbers of experts, by the module that holds them: from their indices, stacks and router."""
        stated = {*_stated(self._config, _EXPERT_COUNTS)}
        found: dict[str, set[int]] = {}
        numbers: dict[str, set[str]] = {}
        for name, shape in self._shapes.items():
            components = module_of(name).split(".")
            at = next((i for i, part in enumerate(components[:-1]) if _holds_experts(part)), None)
            if at is not None and components[at + 1].isdigit():
                numbers.setdefault(".".join(components[:at]), set()).add(components[at + 1])
                continue
            parent = ".".join(components[:-1] if at is None else components[:at])
            if len(shape) == 3:
                known = at is not None or shape[0] in stated or _EXPERTS.search(parent) is not None
            else:
                known = len(shape) == 2 and self._is_named_a_router(components[-1:], name)
            if known:
                found.setdefault(parent, set()).add(shape[0])
        for parent, experts in numbers.items():
            found.setdefault(parent, set()).add(len(experts))
        return {parent: counts - {1} for parent, counts in found.items()}


def in_tower(module: str) -> bool:
    """Whether a module is part of a vision or audio tower, or joins one to the text model."""
    return _PARTS[-1][1].search(module) is not None


def is_built_plain(module: str) -> bool:
    """Whether engines build this module unquantized for any configuration. Releases without a list rely on it."""
    leaf = module.rpartition(".")[2]
    return leaf in _BUILT_PLAIN or f".{module}".endswith(_HEADS_BUILT_PLAIN)


def _part_of(module: str) -> str | None:
    return next((what for what, pattern in _PARTS if pattern.search(module)), None)


def _holds_experts(component: str) -> bool:
    return "expert" in component and "shared" not in component and "gate" not in component


def _in_layer(module: str) -> list[str]:
    """Return the components of a module's name after its last number, which is that of a layer or of an expert."""
    components = module.split(".")
    last = max((i for i, part in enumerate(components) if part.isdigit()), default=len(components))
    return components[last + 1 :]


def _stated(config: Mapping[str, Any], key_of: re.Pattern[str]) -> Iterator[int]:
    """Yield the numbers that a configuration states under such keys, nested ones too."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _stated(value, key_of)
        elif type(value) is int and key_of.fullmatch(key):
            yield value
