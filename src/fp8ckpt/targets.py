"""What quantized weights can become, and the names of these targets. Imports nothing, for the commands' help."""

from __future__ import annotations

from collections.abc import Iterable

#: The dtypes that weights are dequantized to, by the names of the arguments.
TARGETS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

FP8 = "fp8"  # the other target: no dtype, but a choice of a base or a scheme

#: Other names for them, of torch, files and users, in lower case.
SPELLINGS = {
    "bfloat16": "bf16",
    **dict.fromkeys(("float16", "f16", "half"), "fp16"),
    **dict.fromkeys(("float32", "f32", "float"), "fp32"),
    **dict.fromkeys(("float8", "f8", "e4m3", "f8-e4m3", "float8-e4m3fn"), "fp8"),
}


def target_of(given: object, among: Iterable[str] = (*TARGETS, FP8), argument: str = "to") -> str:
    """Return the member of ``among`` with this name, alias or torch dtype. Raise `ValueError` for another.

    >>> target_of("BF16"), target_of("torch.float16"), target_of("float8_e4m3fn")
    ('bf16', 'fp16', 'fp8')
    """
    name = str(given).lower().replace("_", "-").removeprefix("torch.")
    name = SPELLINGS.get(name, name)
    if name not in (known := tuple(among)):
        raise ValueError(f"{argument}={given!r}; expected one of {', '.join(known)}")
    return name


def refuse_count(argument: str, given: object) -> None:
    """Raise `ValueError` for an argument that is given and is not a whole number of at least 1."""
    if given is not None and not (hasattr(given, "__index__") and given.__index__() >= 1):
        raise ValueError(f"{argument}={given!r}; expected at least 1")


def refuse_other(argument: str, given: str, among: Iterable[str]) -> None:
    """Raise `ValueError` for an argument that is not one of these words."""
    if given not in (known := tuple(among)):
        raise ValueError(f"{argument}={given!r}; expected one of {', '.join(known)}")
