"""What keeps an output from being written: an existing file, another run, another rank."""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Says, shown


class OutputExistsError(Fp8CheckpointError, FileExistsError):
    """The destination exists, and is never overwritten."""

    of_objects = Says("there are objects below it", "none", "choose another one, or move them away")
    of_other = Says("there is another object of this name below {where}", "what the run before made",
        "choose another destination, or move away what is there")  # fmt: skip

    @classmethod
    def of_destination(cls, destination: object) -> Self:
        remedy = "choose another one, or move it away"
        return cls("the destination exists", file=str(destination), expected="no such path", remedy=remedy)

    @classmethod
    def of_foreign(cls, partial: object, found: str) -> Self:
        """``found``: what stands where the output would be written, and is not ours."""
        expected = "a path that is free, to write to until the output is whole"
        remedy = "move it away, or choose another destination"
        return cls(found, file=str(partial), expected=expected, remedy=remedy)


class OutputBusyError(Fp8CheckpointError, RuntimeError):
    """Another process is writing the same destination."""

    of_lock = Says("another run writes there", remedy="wait for it to end; if it never will, delete that object")

    @classmethod
    def of(cls, partial: object) -> Self:
        return cls("another process is writing it", file=str(partial), remedy="wait for it to end")


class RankLostError(Fp8CheckpointError, RuntimeError):
    """Another rank ended, or did not answer."""

    remedy = (
        "what is on disk is kept: look why it ended, and run the same again; if it is only slower than the others, "
        "with a longer timeout of the process group"
    )

    @classmethod
    def of(cls, error: RuntimeError) -> Self:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return cls(f"another rank ended, or did not answer ({shown(said)})")


class RanksDifferError(Fp8CheckpointError, ValueError):
    """Ranks of one job have different arguments, read different checkpoints, or run different versions."""

    @classmethod
    def of(cls, what: str, rank: int, other: object, first: object) -> Self:
        """``what`` differs: it is ``other`` on a ``rank`` and ``first`` on rank 0."""
        found = f"{what} is {shown(other)} on rank {rank}, and {shown(first)} on rank 0"
        remedy = "call it with the same arguments and files on all ranks, by one version of fp8ckpt"
        return cls(found, expected="the same on all ranks", remedy=remedy)


class ResumeMismatchError(Fp8CheckpointError, RuntimeError):
    """A partial output exists, and belongs to another conversion."""

    @classmethod
    def of_other(cls, partial: object, begun: str, found: str) -> Self:
        """``begun``: everything that the other run left, which may be deleted."""
        remedy = f"choose another destination, or delete {begun} to begin anew, without what that run had done"
        return cls(found, file=str(partial), remedy=remedy)

    @classmethod
    def of_elsewhere(cls, partial: object, where: str) -> Self:
        """The partial output of a run to another destination with the same last name: no reason to delete anything."""
        remedy = "run this in another directory, or choose a destination of another last name"
        return cls(f"it is of a run that goes to {where}", file=str(partial), remedy=remedy)

    @classmethod
    def of_strange(cls, partial: object, found: str) -> Self:
        """``found``: what a partial output holds that no run of ours leaves so."""
        return cls(found, file=str(partial), remedy="move it away, or choose another destination")

    @classmethod
    def of_other_weights(cls, file: str, where: str, partial: object) -> Self:
        """A run was interrupted while it completed the parts of ``file``, and the parts given now differ."""
        found = f"a run before was cut off while its files appeared in {where}: other weights, by their MD5s"
        remedy = f"choose another destination, or save the weights of that run, which {partial} is of"
        return cls(found, file=file, remedy=remedy)
