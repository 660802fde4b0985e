"""The modules that a configuration must name as not quantized, and how its list is read.

Serving engines learn only from this list which modules are *not* FP8, and they read it in different ways. vLLM asks
whether a module's full name is in it: a prefix skips nothing, and BF16 weights are silently cast to FP8. transformers
5.23 (`should_convert_module`) takes each entry as a regular expression that must match from the start of the name to
the end of a component, or as an ending of the name; 5.18 does not require the end of a component. SGLang takes it as
whole components of the name. All of them understand a module's full name; only a prefix covers a module that the engine
makes of several (``qkv_proj``). So a list is complete in both forms: each unquantized Linear by its full name, and each
part of the model that holds nothing FP8 by its prefix.
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
    """Return the modules that multiply by floating-point weights that are not FP8, in the checkpoint's order: Linears,
    and the layers that engines make of stacked experts, without embeddings and norms.
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
    """Return the shortest prefixes of ``linears`` below which nothing is FP8: ``model.vision_tower``, ``lm_head``.

    A prefix that ends inside a stack of layers (a router, the attention of one layer) is not a part of the model, and
    is left out.
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
    """The entries of a skip list, prepared for look-ups: ``names`` of modules, of parts and endings of their names;
    ``exact`` names, which end in ``$`` in the list; ``patterns``, with ``re:`` or wildcards.
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
        """Whether the module, a module that contains it, or a pattern that matches it is listed."""
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
        """An entry that the name begins with, even within a component, as transformers 5.18 matches; or None."""
        return next((module[:n] for n in self.lengths if module[:n] in self.names), None)

    def ends(self, module: str) -> str | None:
        """An entry that the name ends in, even within a component, as transformers matches up to 5.23; or None."""
        return next((module[-n:] for n in self.lengths if module[-n:] in self.names), None)


class Missing(NamedTuple):
    """What a list lacks: ``prefixes`` of whole parts of the model, and full ``names`` of modules."""

    prefixes: list[str]
    names: list[str]


def missing_in_both_forms(
    entries: Sequence[str], linears: Sequence[str], parts: Sequence[str], native: Callable[[str], str]
) -> Missing:
    """Return what the list of a ``quant_method`` "fp8" lacks; ``native`` gives the model's own name of a module on
    disk, which also counts.

    Heads, routers and other modules that engines leave alone may be listed by their last component, and are required
    only if there is a list.
    """
    skip_list = SkipList.of(entries)

    def is_named(module: str) -> bool:
        if is_built_plain(module):
            return not entries or skip_list.reaches(module) or skip_list.reaches(native(module))
        return module in skip_list.names or native(module) in skip_list.names

    names = [module for module in linears if not is_named(module)]
    whole = {*linears}  # a part that is one Linear is required by name
    prefixes = [
        part for part in parts if part not in whole and not (skip_list.covers(part) or skip_list.covers(native(part)))
    ]
    if not entries:  # no prefix for modules that engines leave alone
        prefixes = [part for part in prefixes if any(name.startswith(part + ".") for name in names)]
    return Missing(prefixes, names)


def missing_in_patterns(entries: Sequence[str], linears: Sequence[str], *, heads: bool) -> Missing:
    """Return what the list of any other method lacks: its entries are names and patterns, and prefixes are not
    required.

    ``heads``: modules that engines leave alone are required even if there is no list.
    """
    skip_list = SkipList.of(entries)
    asked = (module for module in linears if entries or heads or not is_built_plain(module))
    return Missing([], [module for module in asked if not skip_list.reaches(module)])
