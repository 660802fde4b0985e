"""Translating between two files of one model that differ in names or in the stacking of experts.

The translation goes through the model: transformers builds it from the configuration, without values, and its tables
say how the tensors of each file make the model's. One of these two assemblies is reversed, and the two are composed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8ckpt.errors import ConfigError, ModelMismatchError, UnsupportedFormatError
from fp8ckpt.families.names import Shapes
from fp8ckpt.tensors.assembly import Assembly, composed, reversed_assemblies
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import CONFIG
from fp8ckpt.tensors.joined import joined_tensors
from fp8ckpt.tensors.tensor import Tensor

if TYPE_CHECKING:
    from fp8ckpt.families.transformers_tables import Assembled


class Translated(NamedTuple):
    """A translation. ``tensors``: those of one file under the names and in the stackings of another, as far as they can
    be made, and the remaining ones under their own names. ``made``: how many are assembled from others.
    """

    tensors: dict[str, Tensor]
    made: int


def translated(given: Checkpoint, wanted: Checkpoint) -> Translated | None:
    """Return the tensors of ``given`` as in ``wanted``. None if no translation is needed, or none is known:
    transformers is not installed, or does not know the model.

    Raises `ModelMismatchError` for tensors of other shapes, and `UnsupportedFormatError` if some experts are missing.
    """
    if given.tensors.keys() <= wanted.tensors.keys() or wanted.tensors.keys() <= given.tensors.keys():
        return None
    named = [config for config in (wanted.config, given.config) if config.get("architectures")]
    if not named or named[0]["architectures"] != named[-1]["architectures"]:
        return None
    parts = between(wanted.shapes, given.shapes, named[0])
    if parts is None:
        return None
    used = {piece.source for assembly in parts.values() for piece in assembly.pieces}
    left = {name: tensor for name, tensor in given.tensors.items() if name not in used}
    if twice := sorted(left.keys() & parts.keys()):
        raise ModelMismatchError.of_second(left[twice[0]], where=wanted.path)
    tensors = joined_tensors(parts, given.tensors)
    made = sum(tensor is not given.tensors.get(name) for name, tensor in tensors.items())
    return Translated({**tensors, **left}, made)


def as_in_model(given: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names and in the stackings of its model. Tensors that the model has
    no place for keep their own names.

    Raises `UnsupportedFormatError` if transformers is not installed or does not know the model, and
    `ModelMismatchError` for tensors of other shapes than the model's.
    """
    if not has_transformers():
        raise UnsupportedFormatError.of_layout(file=str(given.path))
    if (known := _configured(given.config)) is None:
        raise UnsupportedFormatError.of_model(f"{given.path}/{CONFIG}", given.config.get("architectures"))
    made = known.assembled(given.shapes)
    for name, assembly in made.parts.items():
        if assembly.shape != known.shapes[name]:
            expected = f"{known.shapes[name]}, as in the model"
            raise ModelMismatchError.of_other_shape(name, file=given.path, shape=assembly.shape, expected=expected)
        if (defect := assembly.defect(given.shapes)) is not None:
            raise UnsupportedFormatError.of_assembly(name, file=given.path, defect=defect)
    return {**joined_tensors(made.parts, given.tensors), **{name: given.tensors[name] for name in made.unused}}


def between(wanted: Shapes, given: Shapes, config: Mapping[str, Any]) -> dict[str, Assembly] | None:
    """Return the tensors of ``wanted`` that can be made of the ones in ``given``, as assemblies. None if transformers
    does not know a model of this configuration.
    """
    if (known := known_model(config)) is None:
        return None
    there, here = known.assembled(wanted), known.assembled(given)
    for name, assembly in there.parts.items():
        if name in here.parts and here.parts[name].shape != assembly.shape:
            raise ModelMismatchError.of_other_shape(name, shape=here.parts[name].shape, expected=assembly.shape)
    apart = {*there.unused}
    parts = {name: Assembly.whole(name, given[name]) for name in here.unused if name in apart}
    for name, assembly in composed(reversed_assemblies(there.parts, wanted), here.parts).items():
        parts[name] = assembly
        if (defect := assembly.defect(given)) is not None:
            raise UnsupportedFormatError.of_assembly(name, defect=defect)
    return parts


def parts_of_model(given: Checkpoint) -> dict[str, Assembly]:
    """Return the tensors of a checkpoint's model as assemblies of the checkpoint's; empty if transformers is not
    installed, or does not know the model.
    """
    known = known_model(given.config)
    return {} if known is None else known.assembled(given.shapes).parts


class Known(NamedTuple):
    """A ``model`` that transformers knows, without values, and the ``shapes`` of its tensors."""

    model: Any
    shapes: Shapes

    def assembled(self, stored: Shapes) -> Assembled:
        """Return the model's tensors as assemblies of those ``stored``."""
        from fp8ckpt.families.transformers_tables import assemble

        return assemble(self.model, self.shapes, stored)


def known_model(config: Mapping[str, Any]) -> Known | None:
    """Return the model that a configuration names; None if transformers is not installed, or cannot build it."""
    with suppress(ConfigError):
        return _configured(config) if has_transformers() else None
    return None


def _configured(config: Mapping[str, Any]) -> Known | None:
    from fp8ckpt.families.transformers_tables import configured_model

    if (model := configured_model(config)) is None:
        return None
    return Known(model, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None
