"""What all errors share: five facts, the one line that is made from them, and how names are shown in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from string import Formatter
from typing import Any, Protocol, Self, TypeVar

_MOST_NAMES = 10  # in one message
_LONGEST_NAME = 200  # characters; a header may hold names of megabytes


def shown(text: object) -> str:
    """``text`` as it may appear inside a one-line message."""
    clean = str(text)[: _LONGEST_NAME + 1]
    if not clean.isprintable():
        escaped = (c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in clean)
        clean = "".join(escaped)
    return clean if len(clean) <= _LONGEST_NAME else clean[:_LONGEST_NAME] + "..."


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of the names, and the number of others."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def listed(names: Iterable[str]) -> str:
    """The same in alphabetical order, and more of them."""
    return some(sorted(names), _MOST_NAMES)


E = TypeVar("E", bound="Fp8CheckpointError")


_SHOWN: dict[str, Callable[[Any], str]] = {
    "shown": shown, "some": some, "listed": listed, "joined": ", ".join, "count": lambda names: str(len(names)),
}  # fmt: skip


class _Facts(Formatter):
    """As `str.format`; and "{name:shown}" is a name from a file, "{names:some}" and "{names:listed}" are the first of
    many, "{names:joined}" are all of them, and "{names:count}" is how many there are.
    """

    def format_field(self, value: Any, format_spec: str) -> Any:
        return _SHOWN[format_spec](value) if format_spec in _SHOWN else super().format_field(value, format_spec)


class Says:
    """A sentence of an error class; calling it makes the error. ``found``, ``expected`` and ``remedy`` have
    placeholders for facts, which the raise site gives by name, with the tensor and the file.
    """

    def __init__(self, found: str, expected: str = "", remedy: str = "") -> None:
        self.texts = found, expected, remedy

    def __get__(self, _: object, cls: type[E]) -> Callable[..., E]:
        return partial(self._of, cls)

    def _of(self, cls: type[E], tensor: Any = None, *, file: object = None, **facts: object) -> E:
        facts |= {"tensor": tensor, "file": file}
        found, expected, remedy = (_Facts().vformat(text, (), facts) for text in self.texts)
        return cls(found, tensor=tensor, file=file, expected=expected, remedy=remedy)


class Fp8CheckpointError(Exception):
    """Base of all errors raised by fp8ckpt.

    Attributes: ``tensor`` and ``file`` (names, or None), ``found``, ``expected``, ``remedy`` (texts, or None).
    ``tensor`` may be given as a tensor of a checkpoint, which names its file, too.

    >>> try:
    ...     fp8ckpt.open_checkpoint("nowhere/at/all")
    ... except fp8ckpt.Fp8CheckpointError as error:
    ...     print(type(error).__name__, error.remedy)
    CheckpointNotFoundError check the path
    """

    expected: str | None = None  # a class may have a default
    remedy: str | None = None

    def __init_subclass__(cls) -> None:
        if cls.__module__.startswith("fp8ckpt.errors."):
            cls.__module__ = "fp8ckpt.errors"  # where users import it from

    def __init__(
        self,
        found: str,
        *,
        tensor: str | Readable | None = None,
        file: object = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if tensor is not None and not isinstance(tensor, str):
            file, tensor = tensor.span.file, tensor.name
        self.tensor = tensor
        self.file = None if file is None else str(getattr(file, "name", file))
        self.found = found
        self.expected = expected or self.expected
        self.remedy = remedy or self.remedy
        super().__init__(found)

    @property
    def message(self) -> str:
        """The one-line message. Composed on demand: a hostile file has 200,000 defects."""
        subject = " in ".join(shown(part) for part in (self.tensor, self.file) if part is not None)
        message = f"{subject}: {self.found}" if subject else self.found
        if self.expected is not None:
            message += f"; expected {self.expected}"
        return message if self.remedy is None else f"{message}; {self.remedy}"

    @property
    def facts(self) -> dict[str, str | None]:
        """The facts besides ``found``, by the names of the arguments."""
        return {"tensor": self.tensor, "file": self.file, "expected": self.expected, "remedy": self.remedy}

    def but(self, **other: str | None) -> Self:
        """The same error with some of its `facts` replaced."""
        return type(self)(self.found, **{**self.facts, **other})

    def advising(self, more: str) -> Self:
        """The same error, with a further remedy."""
        return self.but(remedy=more if self.remedy is None else f"{self.remedy}; {more}")

    def among(self, others: int) -> Self:
        """The same error, with the number of other defects."""
        return (
            self.advising(f"{others} more defect{'s' if others > 1 else ''}: see fp8ckpt inspect") if others else self
        )

    def __str__(self) -> str:  # KeyError would print the repr, OSError its errno
        return self.message

    def __reduce__(self) -> tuple[object, ...]:  # survives the pickling that ranks and processes need
        return partial(type(self), self.found, **self.facts), ()


class Named(Protocol):
    """Anything with a name: a file of a store, or a path."""

    @property
    def name(self) -> str:
        """The name as a message shows it."""


class Stored(Protocol):
    """What a message says of a stored tensor: its key, its file, and dtype and shape from the header."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Named: ...

    @property
    def span(self) -> Stored: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Readable(Protocol):
    """A tensor of a checkpoint; its ``span`` is what is stored of it, values or codes."""

    @property
    def name(self) -> str: ...

    @property
    def span(self) -> Stored: ...

    @property
    def shape(self) -> tuple[int, ...]: ...
