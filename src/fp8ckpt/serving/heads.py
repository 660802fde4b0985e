"""A head that is tied to the embeddings is not stored, or is the same; one that is not tied is stored."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError, shown
from fp8ckpt.families.tied import HEADS, embeddings_and_head, has_language_head, ties_embeddings
from fp8ckpt.serving.subject import Finding, Subject
from fp8ckpt.tensors.config import CONFIG


def tied(subject: Subject) -> Iterator[Finding]:
    """The head against ``tie_word_embeddings``."""
    from fp8ckpt.tensors.reading import same_bits  # compiled loops, which most directories need not wait for

    checkpoint = subject.checkpoint
    ties = ties_embeddings(checkpoint.config)
    embeddings, head = map(checkpoint.tensors.get, embeddings_and_head(checkpoint.tensors).names)
    if embeddings is None:  # not a language model, or one file of several
        return
    if ties and head is not None and not same_bits(head, embeddings):
        said = f"{CONFIG} says tie_word_embeddings"
        if checkpoint.config.get("tie_word_embeddings") is False:  # transformers reads this one, vLLM the other
            said = f"text_config says tie_word_embeddings, though {CONFIG} itself says false"
        found = f"the head is not {shown(embeddings.name)}, and {said}"
        remedy = "state false in all of it if the head is its own; an engine would serve the embeddings in its place"
        yield ServingError(found, tensor=head, expected="the same bytes, or no head", remedy=remedy)
    if ties is False and head is None and not checkpoint.defects and has_language_head(checkpoint.config):
        found = "tie_word_embeddings is false, and no head is stored"
        remedy = "restore the head; or state true if it is the embeddings"
        yield ServingError(found, file=CONFIG, expected=f"a tensor {HEADS[0]}", remedy=remedy)
