"""What keeps an output from being written: an existing file, another run, another rank."""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Says, shown

_FREE, _AWAY = (
    "a path that is free, to write to until the output is whole",
    "move it away, or choose another destination",
)
_ANEW = "choose another destination, or delete {begun} to begin anew, without what that run had done"


class OutputExistsError(Fp8CheckpointError, FileExistsError):
    """The destination exists, and is never overwritten."""

    # fmt: off
    of_destination = Says("the destination exists", "no such path", "choose another one, or move it away")
    of_page = Says("there is something already", remedy="move it away, or choose another name")
    of_objects = Says("there are objects below it", "none", "choose another one, or move them away")
    of_other = Says("there is another object of this name below {where}", "what the run before made",
        "choose another destination, or move away what is there")
    of_inside = Says("the destination lies inside the {what} {where}", "a path outside it",
        "choose another destination")
    of_read = Says("{path}, which is read, stands where the output is written until it is whole", "a path that is free",
        "choose another destination")
    of_no_directory = Says("it is no directory", _FREE, _AWAY)
    of_mount = Says("another file system is mounted there, out of which no output can be renamed", _FREE, _AWAY)
    of_foreign = Says("fp8ckpt did not make it: it holds {holds}, and no {state}/", _FREE, _AWAY)
    # fmt: on


class OutputBusyError(Fp8CheckpointError, RuntimeError):
    """Another process is writing the same destination."""

    of = Says("another process is writing it", remedy="wait for it to end")
    of_lock = Says("another run writes there", remedy="wait for it to end; if it never will, delete that object")


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

    # fmt: off
    of = Says("{what} is {other:shown} on rank {rank}, and {first:shown} on rank 0", "the same on all ranks",
        "call it with the same arguments and files on all ranks, by one version of fp8ckpt")
    of_group = Says("{count} ranks are in the writer's process group, and {saving} save", "the same ranks",
        "give {writer} the process_group that dcp.save is given")
    # fmt: on


class ResumeMismatchError(Fp8CheckpointError, RuntimeError):
    """A partial output exists, and belongs to another conversion."""

    # fmt: off
    of_gone = Says("its state is gone", remedy=_ANEW)
    of_unreadable = Says("its state cannot be read", remedy=_ANEW)
    of_other = Says("it is of another source, another target dtype, other options or another version", remedy=_ANEW)
    of_changed = Says("{name}, which it is made from, has changed since", remedy=_ANEW)
    # A run that goes elsewhere has a destination of the same last name: no reason to delete anything.
    of_elsewhere = Says("it is of a run that goes to {where}",
        remedy="run this in another directory, or choose a destination of another last name")
    of_strange = Says("it holds {holds}, which this output does not have", remedy=_AWAY)
    of_linked = Says("{holds} in it is a file of another name as well", remedy=_AWAY)
    # A run was cut off in completing the parts of a file, and these are others.
    of_other_weights = Says(
        "a run before was cut off while its files appeared in {where}: other weights, by their MD5s",
        remedy="choose another destination, or save the weights of that run, which {partial} is of")
    # fmt: on
