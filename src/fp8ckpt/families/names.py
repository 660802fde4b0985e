"""Translation between a model's own names and stackings (native) and those on disk (HF), as data.

A layout is a list of prefix pairs; the first whose native prefix begins a name replaces it. Other names are the same on
both sides. The names in the file decide which layout a checkpoint has, never the number of layers. A model of
transformers 5 holds stacked experts, ``experts.gate_up_proj [E, 2 I, H]`` and ``experts.down_proj [E, H, I]``; most
releases hold one matrix for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fp8ckpt.tensors.assembly import Assembly

Shapes = Mapping[str, tuple[int, ...]]


class KeyLayout(NamedTuple):
    """A name map between a model and its files. ``prefixes``: pairs (native, HF), each empty or ending in a dot."""

    name: str
    prefixes: tuple[tuple[str, str], ...]

    def native_to_hf(self, name: str) -> str:
        """Return the name on disk of a model's tensor."""
        return _renamed(name, self.prefixes)

    def hf_to_native(self, name: str) -> str:
        """Return the model's name of a tensor on disk."""
        return _renamed(name, ((hf, native) for native, hf in self.prefixes))


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """Return a name with the first of the prefixes that it has in the place of the other of its pair."""
    return next((new + name[len(old) :] for old, new in prefixes if name.startswith(old)), name)


# Mistral3 vision-language models: Mistral Medium 3.5 keeps the names of the model's own state dict; Ministral 3 and
# Devstral Small 2 nest the text model in the other order. A text model alone has the names of its part.
IDENTITY = KeyLayout("vlm_full", ())
NESTED = KeyLayout(
    "vlm_nested",
    (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
)
TEXT_OF_IDENTITY = KeyLayout("text_of_vlm_full", (("model.", "model.language_model."),))
TEXT_OF_NESTED = KeyLayout(
    "text_of_vlm_nested", (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
)
# The base of a model, which transformers' AutoModel makes, lacks the first part of its names.
HEADLESS = KeyLayout("headless", (("", "model."),))
HEADLESS_OF_NESTED = KeyLayout("headless_of_vlm_nested", (("language_model.", "language_model.model."),))

LAYOUTS = (IDENTITY, NESTED, TEXT_OF_IDENTITY, TEXT_OF_NESTED, HEADLESS, HEADLESS_OF_NESTED)

#: The number of layers of the one Mistral3 release with the model's own names on disk: Mistral Medium 3.5 128B.
_IDENTITY_LAYERS = 88
#: Models whose releases have nested names on disk, which transformers renames like Mistral3's; by ``model_type``.
NESTED_MODELS = frozenset(
    {"mistral3", "llava", "llava_next", "vipllava", "gemma3", "aya_vision", "internvl", "got_ocr2"}
)

#: The name of a stack, and the leaves of one expert that it concatenates, in the variants of the families.
STACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_WITH = {leaf: (stack, leaves) for stack, ways in STACKS.items() for leaves in ways for leaf in leaves}
#: The matrix of one expert: the module of the experts, the expert's number, the leaf.
ONE_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)\.weight")


def find_layout(native_names: Collection[str], hf_names: Collection[str]) -> KeyLayout:
    """Return the layout with which the most names of a model are on disk; of equally good ones the first."""
    stored = set(hf_names)
    return max(LAYOUTS, key=lambda layout: sum(layout.native_to_hf(name) in stored for name in native_names))


def released_layout(config: Any) -> KeyLayout:
    """Return the layout in which a Mistral3 model is released, from its configuration (an object, or the mapping of
    ``config.json``), for callers without a file whose names would show it.
    """
    text = stated(config, "text_config")
    identity = stated(text, "model_type") == "ministral3" and stated(text, "num_hidden_layers") == _IDENTITY_LAYERS
    return IDENTITY if identity else NESTED


def architectures(config: Mapping[str, Any]) -> set[str]:
    """Return the classes that the configuration names; none if it has no list of them."""
    named = config.get("architectures")
    return {str(name) for name in named} if isinstance(named, list) else set()


def stated(config: Any, key: str) -> Any:
    """Return the value of a key in a configuration, an object or a mapping; None if it has none."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def name_pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    """Return the compiled regular expression ``text`` that a user gave as ``option``. Raise `ValueError` for an invalid
    one.
    """
    try:
        return None if text is None else re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{option}={text!r} is no regular expression: {error}") from error


def layout_on_disk(names: Iterable[str], config: Mapping[str, Any]) -> KeyLayout:
    """Return the layout of a checkpoint: nested if its names are, and its model has such names or is not stated."""
    kind = config.get("model_type")
    if kind is not None and str(kind) not in NESTED_MODELS:
        return IDENTITY
    return NESTED if any(name.startswith("language_model.model.") for name in names) else IDENTITY


def answers(wanted: Collection[str], stored: Shapes) -> dict[str, Assembly]:
    """Return the tensors ``wanted`` of a model as assemblies of those ``stored``, under the layout of names that
    matches the most. Tensors without a match are left out.
    """
    found = [dict(_answered(wanted, stored, layout)) for layout in LAYOUTS]
    return max(found, key=len)


def _answered(wanted: Collection[str], stored: Shapes, layout: KeyLayout) -> Iterator[tuple[str, Assembly]]:
    for name in wanted:
        hf = layout.native_to_hf(name)
        made = Assembly.whole(hf, stored[hf]) if hf in stored else stacked(hf, stored) or unstacked(hf, stored)
        if made is not None:
            yield name, made


def stacked(name: str, stored: Shapes) -> Assembly | None:
    """Return the stack of this name, as an assembly of its experts' matrices; None if some are missing."""
    stem, _, leaf = name.rpartition(".")
    for leaves in STACKS.get(leaf, ()):
        count = 0
        while f"{stem}.{count}.{leaves[0]}.weight" in stored:
            count += 1
        names = [[f"{stem}.{i}.{part}.weight" for i in range(count)] for part in leaves]
        if count and all(part in stored for of_leaf in names for part in of_leaf):
            stacks = [Assembly.stack([Assembly.whole(part, stored[part]) for part in of_leaf]) for of_leaf in names]
            return Assembly.concatenate(stacks, 1)
    return None


def stack_with(name: str) -> str | None:
    """Return the name of the stack that the matrix of one expert belongs to; None for another tensor."""
    one = ONE_EXPERT.fullmatch(name)
    return f"{one[1]}.{_WITH[one[3]][0]}" if one is not None and one[3] in _WITH else None


def unstacked(name: str, stored: Shapes) -> Assembly | None:
    """Return the matrix of one expert, as an assembly of a stack [E, out, in]; None if there is no such stack."""
    one, stack = ONE_EXPERT.fullmatch(name), stack_with(name)
    if one is None or stack is None:
        return None
    expert, leaf, leaves = int(one[2]), one[3], _WITH[one[3]][1]
    shape = stored.get(stack, ())
    if len(shape) != 3 or expert >= shape[0] or shape[1] % len(leaves):
        return None
    return Assembly.whole(stack, shape).narrow(0, expert, 1).squeeze(0).chunk(len(leaves))[leaves.index(leaf)]
