"""What transformers knows about its own models, asked of the installed version. No other file touches its internals.

Its conversion tables say how the tensors of a file become those of a model. Here they run on symbols: tensors without
values that record their pieces. So fp8ckpt loads every family that transformers loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn

from fp8ckpt.collector import collector_paused
from fp8ckpt.errors import ConfigError, ModelMismatchError, UnsupportedFormatError
from fp8ckpt.families.names import ONE_EXPERT, Shapes, stack_with, stacked
from fp8ckpt.tensors.assembly import Assembly
from fp8ckpt.tensors.config import CONFIG, without_quantization
from fp8ckpt.tensors.reading import stored_dtype

# Whether a class holds experts as [E, in, out]; other classes state it in ``is_transposed``.
_TRANSPOSED = {"Llama4TextExperts": True}


class Assembled(NamedTuple):
    """A model assembled from a file. ``parts``: the model's tensors; ``stored``: all tensors of the file; ``ignored``:
    those of the file that the model's class declares to have no place for.
    """

    parts: dict[str, Assembly]
    stored: Shapes
    ignored: Collection[str] = ()

    @property
    def unused(self) -> list[str]:
        """The tensors of the file that no tensor of the model uses, in the file's order."""
        used = {piece.source for assembly in self.parts.values() for piece in assembly.pieces}
        return [name for name in self.stored if name not in used]


def is_pretrained(module: Any) -> bool:
    """Whether it is one of transformers' models, which have a configuration. Does not import transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__) and hasattr(module, "config")


def configured_model(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the model that a configuration (``config.json``) names, unquantized, on the meta device; None if
    transformers has no such class. Raise `ConfigError` if it cannot build a model from the configuration.
    """
    import transformers

    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""
    cls = getattr(transformers, name, None) if name else None
    if cls is None or not isinstance(config.get("model_type"), str):
        return None
    try:
        # Infinities are written as objects, which only transformers' own reader turns into floats.
        decoded = transformers.PreTrainedConfig._decode_special_floats(dict(config))
        # The configurations of parts state dtypes too, with which the parts are built.
        plain = without_quantization(CONFIG, decoded, stored_dtype(dtype))
        with torch.device("meta"):
            return cls._from_config(transformers.AutoConfig.for_model(**plain), dtype=dtype)
    except Exception as error:  # of many classes: each part of a configuration is checked in its own way
        raise ConfigError.of_model(file=CONFIG, model=name, error=error) from error


def distributed(model: Any, how: Any) -> Any:
    """Shard a model on the meta device by its own plans, as ``from_pretrained(distributed_config=how)`` does. Tied
    tensors are separated first, for plans that name the head; the caller that fills them ties them again.
    """
    for target in model.all_tied_weights_keys:
        owner, _, leaf = target.rpartition(".")
        parameter = model.get_parameter(target)
        apart = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, apart)
    try:
        prepared, _, meshes = model.prepare_distribute_model(how)
        return model.maybe_distribute_model(model, prepared, meshes)
    except Exception as error:  # of many kinds: each plan of a class is applied in its own way
        sizes = [f"{key}={size}" for key, size in vars(how).items() if key.endswith("_size") and size not in (None, 1)]
        raise ModelMismatchError.of_plan(model=type(model).__name__, sizes=sizes, error=error) from error


def is_distributed(model: Any) -> bool:
    """Whether transformers has sharded it."""
    return is_pretrained(model) and getattr(model, "_device_mesh", None) is not None


@collector_paused()
def assemble(model: Any, own: Shapes, stored: Shapes) -> Assembled:
    """Return the tensors ``own`` of a transformers model as assemblies of those ``stored`` in a file, by the rules of
    ``from_pretrained``.

    Raises `UnsupportedFormatError` for a conversion that is more than a rearrangement.
    """
    import transformers.core_model_loading as core

    mapping = _conversions(model)
    renamings = [rule for rule in mapping if isinstance(rule, core.WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, core.WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, held = model.base_model_prefix, dict(own)
    parts: dict[str, Assembly] = {}
    rules: dict[str, Any] = {}
    stacks: dict[tuple[str, str], list[str]] = {}  # by tensor and pattern: the names that match
    unused: dict[str, str] = {}  # by name on disk: the name in the model
    for name in sorted(stored, key=core.dot_natural_key):
        target, pattern = core.rename_source_key(name, renamings, converters, prefix, held)
        if target not in own and name in own:
            target, pattern = core.rename_source_key(name, [], [], prefix, held)
        if target not in own or (pattern is None and target in parts):
            unused[name] = target
        elif pattern is None:
            parts[target] = Assembly.whole(name, stored[name])
        else:
            if target not in rules:
                rules[target] = deepcopy(of_pattern[pattern])
            stacks.setdefault((target, pattern), []).append(name)
            rules[target].add_tensor(target, name, pattern, _Symbol.of(Assembly.whole(name, stored[name])))
    for (target, pattern), names in stacks.items():
        if "*" in pattern:
            _refuse_gaps(target, names)
    for target, rule in rules.items():
        parts.update((name, made) for name, made in _converted(rule, target, model).items() if name in own)
    _stack_experts(model, own, stored, parts, unused)
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = {name for name, target in unused.items() if any(re.search(p, target) for p in patterns)}
    return Assembled(parts, stored, ignored)


def _conversions(model: Any) -> list[Any]:
    """Return the rules for this model and the models in it.

    transformers finds them by class. ``fully_shard`` gives a module another class, which transformers takes for custom
    code, so it gets stand-ins of the models' own classes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    standing = {}
    for name, module in model.named_modules():
        if is_pretrained(module):
            own: Any = own_class(module)
            standing[name] = own.__new__(own)
            vars(standing[name]).update(config=module.config)
    vars(standing[""]).update(named_modules=lambda: iter(standing.items()))
    return get_model_conversion_mapping(standing[""])


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class before it was sharded."""
    return next(cls for cls in type(module).__mro__ if not cls.__name__.startswith("FSDP"))


def _converted(rule: Any, target: str, model: Any) -> dict[str, Assembly]:
    """Return what a rule makes of the symbols that it has collected."""
    try:
        made = rule.convert(target, model=model, config=model.config)
    except UnsupportedFormatError as error:
        raise error.but(tensor=target) from None
    except (ValueError, RuntimeError) as error:  # shapes do not match: a file lacks some of the experts
        sources = [name for names in rule.layer_targets.values() for name in names]
        raise UnsupportedFormatError.of_sources(target, sources, error) from error
    return {name: (held[0] if isinstance(held, list) else held).assembly for name, held in made.items()}


def _refuse_gaps(target: str, names: list[str]) -> None:
    """Raise if the numbers of experts have gaps: transformers stacks experts in order, whatever their numbers are."""
    numbers = [int(one[2]) for one in map(ONE_EXPERT.fullmatch, names) if one is not None]
    absent = sorted(set(range(max(numbers, default=0))) - {*numbers})
    if absent:
        raise UnsupportedFormatError.of_gaps(target, max(numbers), absent)


def _stack_experts(model: Any, own: Shapes, stored: Shapes, parts: dict[str, Assembly], unused: dict[str, str]) -> None:
    """Stack the experts that no rule of transformers stacks."""
    found: dict[str, dict[str, str]] = {}  # by stack: its matrices, the model's name of each to its own
    for name, target in unused.items():
        if (stack := stack_with(target)) in own and stack not in parts:
            found.setdefault(str(stack), {})[target] = name
    for stack, disk in found.items():
        experts, *_ = own[stack]
        try:
            made = stacked(stack, {target: stored[name] for target, name in disk.items()})
            if made is None or made.shape[0] != experts or len(made.pieces) != len(disk):
                raise ValueError(f"it is of experts 0 to {experts - 1}, each with all of its matrices")
        except ValueError as error:
            raise UnsupportedFormatError.of_sources(stack, disk.values(), error) from error
        module = model.get_submodule(stack.rpartition(".")[0])
        if len(disk) > experts and not getattr(module, "is_concatenated", True):
            raise UnsupportedFormatError.of_interleaved(stack, kind=own_class(module).__name__)
        made = made.renamed(disk)
        parts[stack] = made.transpose(1, 2) if _is_transposed(module, stack, made, own) else made
        for name in disk.values():
            del unused[name]


def _is_transposed(module: nn.Module, target: str, stacked: Assembly, own: Shapes) -> bool:
    known: bool | None = getattr(module, "is_transposed", _TRANSPOSED.get(own_class(module).__name__))
    if known is not None:
        return known
    straight, across = stacked.shape == own[target], stacked.transpose(1, 2).shape == own[target]
    if straight and across:
        raise UnsupportedFormatError.of_square_stack(target, kind=own_class(module).__name__, shape=stacked.shape)
    return across


class _Symbol(torch.Tensor):
    """A tensor on the meta device with its assembly. torch's rearrangements of it rearrange the assembly."""

    assembly: Assembly

    @classmethod
    def of(cls, assembly: Assembly) -> _Symbol:
        symbol = torch.empty(assembly.shape, device="meta").as_subclass(cls)
        symbol.assembly = assembly
        return symbol

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(getattr(func, "__name__", ""))
        if rule is not None:
            made = rule(*args, **(kwargs or {}))
            return cls.of(made) if isinstance(made, Assembly) else tuple(cls.of(one) for one in made)
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's
        if isinstance(result, torch.Tensor):
            name = torch.overrides.resolve_name(func) or getattr(func, "__name__", "a function")
            raise UnsupportedFormatError.of_conversion(function=name)
        return result


def _assemblies(symbols: Any) -> list[Assembly]:
    return [symbol.assembly for symbol in symbols]


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if sizes and not isinstance(sizes[0], int) else sizes


def _split(symbol: Any, sizes: int | list[int], dim: int = 0) -> tuple[Assembly, ...]:
    length = symbol.assembly.shape[dim]
    each = [min(sizes, length - at) for at in range(0, length, sizes)] if isinstance(sizes, int) else list(sizes)
    return symbol.assembly.split(each, dim)  # type: ignore[no-any-return]  # of a symbol


def _squeeze(symbol: Any, dim: int | None = None) -> Assembly:
    made: Assembly = symbol.assembly
    for axis in [axis for axis, size in enumerate(made.shape) if size == 1][::-1] if dim is None else [dim]:
        made = made.squeeze(axis)
    return made


_RULES: dict[str, Callable[..., Assembly | tuple[Assembly, ...]]] = {
    "stack": lambda symbols, dim=0: Assembly.stack(_assemblies(symbols), dim),
    "cat": lambda symbols, dim=0: Assembly.concatenate(_assemblies(symbols), dim),
    "chunk": lambda symbol, chunks, dim=0: symbol.assembly.chunk(chunks, dim),
    "split": _split,
    "transpose": lambda symbol, dim0, dim1: symbol.assembly.transpose(dim0, dim1),
    "permute": lambda symbol, *dims: symbol.assembly.permute(_sizes(dims)),
    "reshape": lambda symbol, *shape: symbol.assembly.reshape(_sizes(shape)),
    "view": lambda symbol, *shape: symbol.assembly.reshape(_sizes(shape)),
    "squeeze": _squeeze,
    "contiguous": lambda symbol: symbol.assembly,
}


def kept_in_float32(model: Any, dtype: torch.dtype, names: Iterable[str]) -> list[str]:
    """Return the tensors that ``from_pretrained(dtype=dtype)`` keeps in float32, by the patterns of the classes."""
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return [name for name in names if any(pattern.search(name) for pattern in patterns)]


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Convert the tensors that ``from_pretrained(dtype=dtype)`` keeps in float32. The model is on the meta device."""
    held = model.state_dict(keep_vars=True)
    for name in kept_in_float32(model, dtype, held):
        if held[name].is_floating_point():
            held[name].data = held[name].data.to(torch.float32)


def initialize_buffers(model: Any, module: nn.Module) -> None:
    """Set the non-persistent buffers of one of the model's modules, as ``from_pretrained`` does after it has built a
    model on the meta device. Tensors of the state dict are not changed.
    """
    from transformers.initialization import guard_torch_init_functions

    held = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}.values()
    flagged = [tensor for tensor in held if not vars(tensor).get("_is_hf_initialized")]
    for tensor in flagged:
        tensor._is_hf_initialized = True
    try:
        with torch.no_grad(), guard_torch_init_functions():
            model._init_weights(module)
    finally:
        for tensor in flagged:
            del tensor._is_hf_initialized
