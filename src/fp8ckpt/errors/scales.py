"""What is wrong with the scales of a weight.

Only the writer of a file knows which scales its codes were made with, so no remedy guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Says, Stored, shown
from fp8ckpt.errors.files import COPY

SAME_TOOL = "read it with the tool that wrote it"


class MissingScaleError(Fp8CheckpointError, ValueError):
    """An FP8 weight without a scale: its codes alone are not its values."""

    remedy = (
        "look for the scale in the other files of this checkpoint, or under another name; "
        "if the weights were only cast to FP8, without scales, use the tool that cast them: fp8ckpt cannot know that"
    )

    @classmethod
    def of(cls, weight: Stored, expected: str, near: str | None) -> Self:
        """``expected``: a name that its scale could have; ``near``: a tensor that may be its scale, misnamed."""
        misnamed = "" if near is None else f" (is {shown(near)} its scale, misnamed?)"
        return cls(f"{weight.dtype} weight without a scale{misnamed}", tensor=weight, expected=shown(expected))


class OrphanScaleError(Fp8CheckpointError, ValueError):
    """A scale belongs to no FP8 weight."""

    remedy = "look for the weight in the other files of this checkpoint, or ask its author where the weight is"

    @classmethod
    def of(cls, scale: Stored, weights: Sequence[str], stored: Mapping[str, Stored]) -> Self:
        """``weights``: the names of those that it could scale; ``stored``: all tensors by name."""
        there = next((stored[name] for name in weights if name in stored), None)
        other = f"the scale of a weight of dtype {there.dtype}, which is not FP8" if there else None
        return cls(other or "a scale without a weight", tensor=scale, expected=f"an FP8 tensor {shown(weights[0])}")


class AmbiguousScaleError(Fp8CheckpointError, ValueError):
    """More than one tensor could be the scale of one weight."""

    expected = "one scale"
    remedy = "ask the author of the file which scale the codes were made with"

    @classmethod
    def of(cls, weight: Stored, scales: Sequence[str]) -> Self:
        return cls(f"its scale could be any of {', '.join(shown(key) for key in scales)}", tensor=weight)


class ScaleShapeError(Fp8CheckpointError, ValueError):
    """A scale does not tile its weight."""

    # fmt: off
    of_grid = Says("scale shape {scale} does not fit weight {weight}", "a grid of blocks of {block}")
    # ``stated``: the configuration's number of 4-bit codes per scale; ``group``: the actual number.
    of_group = Says(
        "scale shape {scale.shape} in {scale.file.name:shown} has groups of {group}, group_size is {stated}",
        "group_size {group}, by the scales' dtype {scale.dtype}",
        "state this group_size in every configuration file that has one: engines allocate the scales by it")
    # fmt: on

    @classmethod
    def of(cls, weight: Stored, scale: Stored, block_size: tuple[int, ...] | None, fit: tuple[int, ...] | None) -> Self:
        """``block_size``: the module's, as stated in the configuration; ``fit``: the shape of scales that fits it."""
        found = f"scale shape {scale.shape} in {shown(scale.file.name)} does not fit weight {weight.shape}"
        if fit is None:
            expected = "one scale, or one per row"
            remedy = "if they are per block, state the size they were made with (weight_block_size in config.json)"
            if scale.dtype in ("U8", "F8_E8M0"):
                remedy += "; ComfyUI's exponents are in another order, which fp8ckpt does not read"
        else:
            found += f" with block size {block_size}"
            expected = str(fit)
            remedy = "check that the configuration belongs to these weights; if it does, the scales do not"
        return cls(found, tensor=weight, expected=expected, remedy=remedy)


class ScaleDtypeError(Fp8CheckpointError, ValueError):
    """A scale has a dtype that no FP8 family uses."""

    remedy = SAME_TOOL

    # fmt: off
    of = Says("its scale {scale.name:shown} in {scale.file.name:shown} has dtype {scale.dtype}",
        "one of {known:joined}")
    # fmt: on


class ScaleValueError(Fp8CheckpointError, ValueError):
    """A scale is NaN, infinite, zero or negative."""

    # fmt: off
    of_dtype = Says("a scale of dtype {dtype}", "one of {known}")
    of_placeholders = Says("{count} of {all} scales are not finite and positive",
        remedy="load the scale before the weight is used")
    # fmt: on

    @classmethod
    def of(cls, scale: Stored, counts: tuple[int, int], first: object, at: tuple[int, ...]) -> Self:
        """``counts``: the number of bad scales, and of all; ``first``: the first bad one, and its index ``at``."""
        found = "{} of {} scales are not valid, the first is {}".format(*counts, first) + (f" at {at}" if at else "")
        return cls(found, tensor=scale, expected="finite and positive scales", remedy=COPY)
