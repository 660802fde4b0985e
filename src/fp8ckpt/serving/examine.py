"""Whether a serving engine would load a directory, and serve what is in it.

`examine` checks what vLLM 0.33, SGLang 0.5 and transformers 5.18 to 5.23 need beyond sound tensors. Each check comes
from a directory that was refused, or served wrong without an error. A check is a row; it finds failures, and notes on
what is served otherwise than expected. It reads headers and scales, and a head that is tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fp8ckpt.errors import Fp8CheckpointError, ServingError
from fp8ckpt.serving import joining, leftovers, listing, notes, scales, statements
from fp8ckpt.serving.joining import TensorParallel
from fp8ckpt.serving.subject import Finding, Subject
from fp8ckpt.tensors.checkpoint import Checkpoint

Check = Callable[[Subject], Iterator[Finding]]

#: Checks for quantized checkpoints, for any configuration that can be understood, and for any directory.
_QUANTIZED: tuple[Check, ...] = (
    statements.method,
    statements.fp8_fields,
    statements.renamed_scales,
    scales.shapes,
    scales.of_activations,
    scales.powers_of_two,
    listing.complete,
    listing.true,
    joining.mixed,
    joining.blocks,
    scales.of_siblings,
    statements.stacks_of_experts,
)
_READABLE: tuple[Check, ...] = (statements.not_quantized, statements.contradictions, statements.tied_head)
_ANY: tuple[Check, ...] = (leftovers.second_copies, leftovers.index_and_metadata)


@dataclass(frozen=True)
class Servability:
    """What `examine` found: ``failures`` of an engine to load or serve the directory, and ``notes`` on what is served
    otherwise than expected.

    ``tensor_parallel``: the largest size to which weights in blocks can be sharded; None if blocks do not limit it.
    """

    failures: tuple[ServingError, ...]
    notes: tuple[str, ...]
    tensor_parallel: TensorParallel | None = None


def examine(checkpoint: Checkpoint, *, tensor_parallel: int | None = None) -> Servability:
    """Run all checks on a directory; never raises. What `survey` has found already is not repeated.

    ``tensor_parallel``: the size to serve with; one GPU by default.
    """
    subject = Subject(checkpoint, tensor_parallel)
    failures: list[ServingError] = []
    said: list[str] = []
    unreadable: dict[str, ServingError] = {}  # by message, since several checks may read one file
    able = None
    checks = [*_ANY]
    if not subject.is_readable:
        said.append(notes.UNREADABLE)
    elif subject.has_codes:
        checks = [*_QUANTIZED, *_ANY, *_READABLE]
        able = joining.tensor_parallel(subject)
    else:
        said.append(notes.NOTHING_QUANTIZED)
        checks = [*_ANY, *_READABLE]
    for check in checks:
        try:
            for found in check(subject):
                if isinstance(found, ServingError):
                    failures.append(found)
                else:
                    said.append(found)
        except Fp8CheckpointError as error:  # a file that cannot be read, by engines either
            unreadable[error.message] = ServingError(error.found, **error.facts)
    return Servability((*failures, *unreadable.values()), tuple(said), able)
