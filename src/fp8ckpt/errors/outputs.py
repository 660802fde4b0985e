"""What keeps an output from being written: an existing file, another run, another rank."""

from __future__ import annotations

from typing import Self

from fp8ckpt.errors.base import Fp8CheckpointError, Says, shown

_FREE, _AWAY = (
    "a free path for the unfinished output",
    "move it away, or choose another destination",
)
_ANEW = "choose another destination, or delete {begun} to start again without the work of that run"


class OutputExistsError(Fp8CheckpointError, FileExistsError):
    """The destination exists, and is never overwritten."""

    # fmt: off
    of_destination = Says("the destination exists", "no such path", "choose another destination, or move it away")
    of_page = Says("the path exists", remedy="move it away, or choose another name")
    of_objects = Says("there are objects below it", "no objects", "choose another destination, or move them away")
    of_other = Says("there is another object of this name below {where}", "the object that the earlier run wrote",
        "choose another destination, or move that object away")
    of_inside = Says("the destination lies inside the {what} {where}", "a path outside it",
        "choose another destination")
    of_read = Says("{path}, which is read, is where the unfinished output is written", "a free path",
        "choose another destination")
    of_no_directory = Says("it is not a directory", _FREE, _AWAY)
    of_mount = Says("another file system is mounted there, and an output cannot be renamed out of it", _FREE, _AWAY)
    of_foreign = Says("fp8ckpt did not create it: it holds {holds}, but no {state}/", _FREE, _AWAY)
    # fmt: on


class OutputBusyError(Fp8CheckpointError, RuntimeError):
    """Another process is writing the same destination."""

    of = Says("another process is writing it", remedy="wait for it to end")
    of_lock = Says("another run is writing there", remedy="wait for it to end; if it is dead, delete this object")


class RankLostError(Fp8CheckpointError, RuntimeError):
    """Another rank ended, or did not answer."""

    remedy = (
        "find out why it ended, and run the same again: what is on disk is kept; if it was only slow, "
        "set a longer timeout for the process group"
    )

    @classmethod
    def of(cls, error: RuntimeError) -> Self:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return cls(f"another rank ended, or did not answer ({shown(said)})")


class RanksDifferError(Fp8CheckpointError, ValueError):
    """Ranks of one job have different arguments, read different checkpoints, or run different versions."""

    # fmt: off
    of = Says("{what} is {other:shown} on rank {rank}, but {first:shown} on rank 0", "the same on all ranks",
        "use the same arguments, files and version of fp8ckpt on all ranks")
    of_group = Says("{count} ranks are in the writer's process group, but {saving} ranks save", "the same ranks",
        "give {writer} the process_group that dcp.save gets")
    # fmt: on


class ResumeMismatchError(Fp8CheckpointError, RuntimeError):
    """A partial output exists, and belongs to another conversion."""

    # fmt: off
    of_gone = Says("the record of what the run did is missing", remedy=_ANEW)
    of_unreadable = Says("the record of what the run did cannot be read", remedy=_ANEW)
    of_other = Says("it belongs to a run with another source, target dtype, options or version", remedy=_ANEW)
    of_changed = Says("{name}, which it is made from, has changed since that run", remedy=_ANEW)
    # A run that goes elsewhere has a destination of the same last name: no reason to delete anything.
    of_elsewhere = Says("it belongs to a run that writes to {where}",
        remedy="run this in another directory, or choose a destination with another last name")
    of_strange = Says("it holds {holds}, which is not a file of this output", remedy=_AWAY)
    of_linked = Says("{holds} in it also has a name elsewhere (a hard link)", remedy=_AWAY)
    # A run was cut off in completing the parts of a file, and these are others.
    of_other_weights = Says(
        "an earlier run was interrupted while its files appeared in {where}, and its weights differ (MD5)",
        remedy="choose another destination, or save the weights of that run, to which {partial} belongs")
    # fmt: on
