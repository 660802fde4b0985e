"""How a model's tensors are made of those on disk: by its state_dict_adapter, by transformers' own tables, or by the
names found in the file.

`assemble` asks the adapter (``assemblies``), or runs the conversions of the installed transformers on symbols
(`fp8ckpt.families.transformers_tables`), or takes the table of prefixes that matches most names
(`fp8ckpt.families.names`). Each gives one `Assembly` per tensor; planners cut it by shard, and the reader fills the
pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fp8ckpt.checkpoint.live import plain_name
from fp8ckpt.errors import ModelMismatchError
from fp8ckpt.families.names import IDENTITY, LAYOUTS, KeyLayout, Shapes, find_layout
from fp8ckpt.families.transformers_tables import Assembled, is_pretrained
from fp8ckpt.families.transformers_tables import assemble as assemble_pretrained
from fp8ckpt.tensors.assembly import Assembly


def assemble(model: nn.Module, native: Mapping[str, torch.Tensor], stored: Shapes) -> Assembled | None:
    """Return how the tensors ``native`` of ``model`` are made of those ``stored`` in a checkpoint; None if a
    state_dict_adapter without assemblies converts them itself.

    Raises `ModelMismatchError` for an assembly that does not fit, and `UnsupportedFormatError` for a transformers
    conversion that is not a rearrangement.
    """
    own = {name: tuple(tensor.shape) for name, tensor in native.items()}
    adapter: Any = getattr(model, "state_dict_adapter", None)
    if adapter is None:
        made = _of_pretrained(model, own, stored) or of_names(own, stored, find_layout(own, stored))
    elif (given := adapter.assemblies(own, stored) if hasattr(adapter, "assemblies") else None) is not None:
        made = Assembled(dict(given), stored)
    else:
        return None
    for name, assembly in made.parts.items():
        if (defect := assembly.defect(stored)) is not None:
            raise ModelMismatchError.of_assembly(name, defect=defect)
    return made


def of_names(own: Iterable[str], stored: Shapes, layout: KeyLayout = IDENTITY) -> Assembled:
    """Return assemblies that make each tensor of one tensor of the file, renamed by ``layout``."""
    found = {name: hf for name in own if (hf := layout.native_to_hf(name)) in stored}
    return Assembled({name: Assembly.whole(hf, stored[hf]) for name, hf in found.items()}, stored)


def _of_pretrained(model: nn.Module, own: Shapes, stored: Shapes) -> Assembled | None:
    """Assemble by transformers' tables, for the one transformers model that ``model`` is or holds. If most of its
    tensors are not found, as for the text model of a multimodal file, known layouts are tried on the file's names.
    """
    roots: dict[str, nn.Module] = {}  # the outermost ones, by the prefix of their tensors' names
    for name, module in model.named_modules():
        prefix = f"{plain_name(name)}.".removeprefix(".")
        if is_pretrained(module) and not prefix.startswith(tuple(roots)):
            roots[prefix] = module
    if len(roots) != 1:
        return None
    [(prefix, root)] = roots.items()
    inner = {name.removeprefix(prefix): shape for name, shape in own.items() if name.startswith(prefix)}
    best = assemble_pretrained(root, inner, stored)
    parts, ignored = best.parts, best.ignored
    for layout in LAYOUTS[1:] if 2 * len(parts) < len(inner) else ():
        disk = {layout.hf_to_native(name): name for name in stored}
        made = assemble_pretrained(root, inner, {name: stored[hf] for name, hf in disk.items()})
        if len(made.parts) > len(parts):
            parts = {name: assembly.renamed(disk) for name, assembly in made.parts.items()}
            ignored = {disk[name] for name in made.ignored}
    parts = {prefix + name: assembly for name, assembly in parts.items()}
    outside = {name: Assembly.whole(name, stored[name]) for name in own.keys() - parts.keys() if name in stored}
    return Assembled({**parts, **outside}, stored, ignored)
