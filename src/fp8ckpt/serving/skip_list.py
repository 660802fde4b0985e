"""The modules that a configuration must name as not quantized, and how its list is read.

Serving engines learn from this list alone which modules are *not* FP8, and they read it in different ways. vLLM asks
whether a module's full name is in it: a prefix skips nothing, and weights in BF16 are cast to FP8 without a word.
transformers 5.23 (`should_convert_module`) takes each entry as a regular expression that must match from the start of
the name to the end of a component, or as an ending of the name; 5.18 does not ask for the end of a component. SGLang
takes it as whole components of the name. To all a full name says enough for the module itself, and only a prefix says
it for a module that the engine makes of several (``qkv_proj``). So a list is complete in both forms: each unquantized
Linear by its full name, and each part of the model that holds nothing FP8 by its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fp8ckpt.families.roles import Roles, is_built_plain
from fp8ckpt.tensors.config import ancestors, skips
from fp8ckpt.tensors.formats import module_of
from fp8ckpt.tensors.tensor import Tensor

_FLOATS = ("BF16", "F16", "F32", "F64")


def unquantized_linears(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that multiply by floating point that is not FP8, less embeddings and norms, in the order of the
    checkpoint: Linears, and the layers that engines make of stacked experts.
    """
    roles = Roles({name: tensor.shape for name, tensor in tensors.items()}, {})
    found: dict[str, None] = {}
    for name, tensor in tensors.items():
        if tensor.scaled is not None or tensor.dtype not in _FLOATS:
            continue
        module = roles.experts_of(name) if len(tensor.shape) == 3 else module_of(name)
        if module is None or (len(tensor.shape) != 3 and (len(tensor.shape) != 2 or module == name)):
            continue
        leaf = module.rpartition(".")[2]
        if "embed" not in leaf and "norm" not in leaf:
            found[module] = None
    return [*found]


def unquantized_parts(linears: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The shortest prefixes of ``linears`` below which nothing is FP8: ``model.vision_tower``, ``lm_head``.

    A prefix that ends inside a stack of layers (a router, the attention of one layer) is no part of the model, and not
    among them.
    """
    holders = {ancestor for module in quantized for ancestor in (module, *ancestors(module))}
    parts: dict[str, None] = {}
    for module in linears:
        part = next(
            (ancestor for ancestor in (*reversed([*ancestors(module)]), module) if ancestor not in holders), None
        )
        if part is not None and not any(component.isdigit() for component in part.split(".")):
            parts[part] = None
    return list(parts)


class SkipList(NamedTuple):
    """Entries of a skip list, ready to be asked: ``names`` of modules, of parts and endings of their names; ``exact``
    names, which end in ``$`` in the list; ``patterns``, ``re:`` and wildcards.
    """

    names: frozenset[str]
    exact: frozenset[str]
    patterns: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, entries: Sequence[str]) -> SkipList:
        patterns = tuple(entry for entry in entries if entry.startswith("re:") or "*" in entry)
        exact = frozenset(entry[:-1] for entry in entries if entry.endswith("$") and entry not in patterns)
        names = frozenset(entry for entry in entries if entry and entry[-1] != "$") - frozenset(patterns)
        return cls(names, exact, patterns, tuple(sorted({len(name) for name in names})))

    def covers(self, module: str) -> bool:
        """Whether the module, one that holds it, or a pattern that matches it is listed."""
        return (
            module in self.names
            or module in self.exact
            or any(ancestor in self.names for ancestor in ancestors(module))
            or any(skips(pattern, module) for pattern in self.patterns)
        )

    def reaches(self, module: str) -> bool:
        endings = (module[at + 1 :] for at, character in enumerate(module) if character == ".")
        return self.covers(module) or any(ending in self.names for ending in endings)

    def begins(self, module: str) -> str | None:
        """An entry that the name begins with, in the middle of a component too: as transformers 5.18 reads it."""
        return next((module[:n] for n in self.lengths if module[:n] in self.names), None)

    def ends(self, module: str) -> str | None:
        """An entry that the name ends in, in the middle of a component too: as transformers reads it to 5.23."""
        return next((module[-n:] for n in self.lengths if module[-n:] in self.names), None)


class Missing(NamedTuple):
    """What a list lacks: ``prefixes`` of whole parts of the model, and full ``names`` of modules."""

    prefixes: list[str]
    names: list[str]


def missing_in_both_forms(
    entries: Sequence[str], linears: Sequence[str], parts: Sequence[str], native: Callable[[str], str]
) -> Missing:
    """What the list of a ``quant_method`` "fp8" lacks; ``native`` gives the model's own name of a module on disk, which
    counts too.

    Heads, routers and whatever else engines leave alone may be listed by their last component, and are asked for only
    where there is a list.
    """
    skip_list = SkipList.of(entries)

    def is_named(module: str) -> bool:
        if is_built_plain(module):
            return not entries or skip_list.reaches(module) or skip_list.reaches(native(module))
        return module in skip_list.names or native(module) in skip_list.names

    names = [module for module in linears if not is_named(module)]
    whole = {*linears}  # a part that is one Linear is asked for by name
    prefixes = [
        part for part in parts if part not in whole and not (skip_list.covers(part) or skip_list.covers(native(part)))
    ]
    if not entries:  # no prefix for what is left alone
        prefixes = [part for part in prefixes if any(name.startswith(part + ".") for name in names)]
    return Missing(prefixes, names)


def missing_in_patterns(entries: Sequence[str], linears: Sequence[str], *, heads: bool) -> Missing:
    """What the list of any other method lacks: its entries are names and patterns, and prefixes are not asked for.

    ``heads``: what engines leave alone is asked for where there is no list, too.
    """
    skip_list = SkipList.of(entries)
    asked = (module for module in linears if entries or heads or not is_built_plain(module))
    return Missing([], [module for module in asked if not skip_list.reaches(module)])
