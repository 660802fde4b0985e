"""Requests that tensors cannot fulfil: a name, a region, a dtype, a code."""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Readable, Says, Stored


class UnknownTensorError(Fp8CheckpointError, KeyError):
    """The checkpoint has no tensor of that name."""

    # fmt: off
    of_pattern = Says("no tensor has a name like {pattern:shown}", remedy="--tensor . lists them all")
    of = Says("the checkpoint has no such tensor", "one of its {count} logical tensors",
        "fp8ckpt inspect --tensor REGEX lists them")
    # fmt: on


class RegionError(Fp8CheckpointError, IndexError):
    """Offsets and sizes reach outside the tensor."""

    of_target = Says("a target of shape {shape}", "{planned}, as the plan says")

    @classmethod
    def of(cls, tensor: Readable, region: tuple[object, object]) -> Self:
        found = "offsets {} and sizes {} reach outside the tensor".format(*region)
        return cls(found, tensor=tensor, expected=f"a region of {tensor.shape}")


class WeightValueError(Fp8CheckpointError, ValueError):
    """A weight holds NaN or infinity, and has no FP8 code."""

    # fmt: off
    # ``found``: how many elements are not finite; ``file``: where they are read from, None for a model's.
    of = Says("{found}", "finite weights",
        "find out where they come from: training that diverged, or NaN codes of an FP8 source (verify counts them)")
    # A row or a column (``what``) of a tensor that DoRA scales.
    of_direction = Says("{what} {index} is zero, and has no direction that DoRA's magnitude can scale",
        "{what}s that are not zero")
    of_adapter = Says("{count} of {numel} elements are NaN or infinite", "finite values",
        "give a checkpoint of the adapter from before its training diverged")
    # fmt: on

    @classmethod
    def of_nonfinite(cls, tensor: str, file: object, count: int, numel: int) -> Self:
        return cls.of(tensor, file=file, found=f"{count} of {numel} elements are NaN or infinite, which have no code")


class RangeError(Fp8CheckpointError, OverflowError):
    """Finite values do not fit the range of the target dtype."""

    # fmt: off
    of_halves = Says("{count} elements exceed 65504, the largest float16", remedy="convert to bf16 or fp32")
    # Sums of a base and its adapters that ``dtype`` cannot hold.
    of_merged = Says("{count} merged values do not fit {dtype}", "an adapter of this base",
        "check that the adapter was trained on this base, and how lora_alpha and =WEIGHT scale it")
    # fmt: on

    @classmethod
    def of_codes(cls, tensor: str | Readable, count: int, dtype: str) -> Self:
        """Finite codes whose scaled values exceed ``dtype``."""
        remedy = "compare its scale with the original" if dtype == "F32" else "use fp32"
        return cls(f"{count} elements with finite codes exceed the largest {dtype}", tensor=tensor, remedy=remedy)

    @classmethod
    def of_base(cls, tensor: str, source: Readable, dtypes: tuple[str, str], count: int) -> Self:
        """Values of a ``source``, which has the first of the dtypes, and the base the second."""
        found = "{} finite values of {} do not fit {}".format(count, *dtypes)
        return cls(found, tensor=tensor, file=source.span.file, expected=f"{dtypes[1]}, as in the base")

    @classmethod
    def of_cast(cls, stored: Stored, given: str, count: int, *, beyond_all: bool) -> Self:
        """Values of dtype ``given`` in one piece of a save; ``beyond_all``: no dtype holds some of them."""
        found = f"{count} finite {given} values of one piece do not fit {stored.dtype}"
        wider = {"F16": "save in bf16 or fp32", "BF16": "save in fp32"}.get(stored.dtype)
        remedy = f"{wider}; if the base decides the dtype, save without like"
        if beyond_all or wider is None:
            remedy = "find out why they are so large: no dtype that can be saved holds them"
        return cls(found, tensor=stored, expected=f"values within {stored.dtype}", remedy=remedy)

    @classmethod
    def of_scale(cls, dtype: str, tensor: str, file: object, remedy: str | None, *, factor: bool) -> Self:
        """A new scale that ``dtype`` cannot hold, under the weight's ``factor`` or alone."""
        under = " under the weight's factor" if factor else ""
        found = f"its values need a scale beyond the range of {dtype}{under}"
        expected = "values that the base's scale dtype can scale"
        return cls(found, tensor=tensor, file=file, expected=expected, remedy=remedy)
