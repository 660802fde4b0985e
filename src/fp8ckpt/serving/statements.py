"""What the configuration states of quantization and of tied heads, compared with the tensors."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError, shown, some
from fp8ckpt.families.loaders import engines_that_rename_scales, has_no_fp8_experts, misreads_stacks
from fp8ckpt.families.roles import is_built_plain
from fp8ckpt.families.tied import HEADS, embeddings_and_head, has_language_head, ties_embeddings
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.numerics.geometry import tiled
from fp8ckpt.serving import notes
from fp8ckpt.serving.skip_list import SkipList, unquantized_linears
from fp8ckpt.serving.subject import METHODS, SCHEMES, Finding, Subject, guessed_method, strings
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, Json
from fp8ckpt.tensors.reading import same_bits
from fp8ckpt.tensors.scaled import QuantizedTensor

_INTEGERS = ("I8", "U8", "I16", "I32", "U32")


def method(subject: Subject) -> Iterator[Finding]:
    """Quantization must be stated, with a method that engines serve."""
    stated = subject.stated
    if stated is None:
        unstated = ServingError.of_markers if subject.checkpoint.markers else ServingError.of_nothing_stated
        keys = '"quantization_config" with quant_method, activation_scheme and the skip list'
        yield unstated(file=subject.file, keys='"quantization"' if subject.file == MISTRAL_CONFIG else keys)
    elif stated.method is None:
        methods, guess = ", ".join(name for name in METHODS if name != "mistral"), guessed_method(stated.quantization)
        yield ServingError.of_no_method(file=stated.file, methods=methods, guess=guess)
    elif stated.method not in METHODS:
        yield notes.UNKNOWN_METHOD.format(shown(stated.method))


def fp8_fields(subject: Subject) -> Iterator[Finding]:
    """The further fields of "fp8": the activation scheme, and the block size of the file."""
    stated, quantized = subject.stated, subject.quantized
    if stated is None or stated.method != "fp8":
        return
    scheme = stated.quantization.get("activation_scheme")
    if scheme not in SCHEMES:
        yield ServingError.of_scheme(file=stated.file, scheme="missing" if scheme is None else scheme)
    block = stated.quantization.get("weight_block_size")
    if "weight_block_size" not in stated.quantization:
        yield notes.NO_BLOCK_SIZE
    size = tuple(block) if block else None

    def differs(tensor: QuantizedTensor) -> bool:
        if size is None:  # the last two dimensions are the matrix; leading ones are experts, with a scale each or one
            return any(n > 1 for n in tensor.grid.shape[-2:])
        fit = tiled(tensor.shape, size)
        return fit is None or fit.shape != tensor.grid.shape

    if others := [tensor for tensor in quantized if tensor.weight.dtype in FP8_DTYPES and differs(tensor)]:
        first, scale, weight = others[0], list(others[0].scale.shape), list(others[0].shape)
        yield ServingError.of_block(
            first.name, file=stated.file, block=block, count=len(others), all=len(quantized), scale=scale, weight=weight
        )


def renamed_scales(subject: Subject) -> Iterator[Finding]:
    """Blocks of scales under a name that the model's loader takes for the one scale of a tensor."""
    renamed = [tensor for tensor in subject.quantized if tensor.scale.name.endswith(".weight_scale_inv")]
    grids = [tensor for tensor in renamed if max(tensor.grid.shape[-2:], default=1) > 1]
    if not grids:
        return
    for engine in engines_that_rename_scales(subject.checkpoint.config):
        does, serves_others = f"refuses {len(grids)} that are blocks", engine.startswith("SGLang")
        if serves_others:
            does = f"does not serve the blocks of {shown(grids[0].name)} and {len(grids) - 1} more"
        failure = ServingError.of_renamed(grids[0].scale, engine=engine, does=does)
        yield failure.found if serves_others else failure


def not_quantized(subject: Subject) -> Iterator[Finding]:
    """Quantization that is stated although the weights have none; except of the cache alone, which engines serve."""
    checkpoint = subject.checkpoint
    if subject.has_codes or checkpoint.defects:
        return
    quantization = configuration.quantization_config(checkpoint.config)
    for file, stated in ((CONFIG, quantization), (MODELOPT_CONFIG, subject.modelopt)):
        if not stated:
            continue
        linears = unquantized_linears(checkpoint.tensors)
        spans = (span for header in checkpoint.files for span in header.spans)
        integers = [span.name for span in spans if span.dtype in _INTEGERS and len(span.shape) > 1]
        if _states_cache(stated) and _states_no_weights(stated, linears):
            yield notes.CACHE_ALONE.format(file)
        elif integers:
            yield notes.NOT_FP8.format(file, some(integers))
        else:
            yield ServingError.of_unquantized(file=file)


def _states_cache(stated: Json) -> bool:
    keys = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config", "kv_cache_quant_method")
    return any(stated.get(key) for key in keys)


def _states_no_weights(stated: Json, linears: list[str]) -> bool:
    """Whether no weight is stated to be quantized: no group and no algorithm is stated, or all Linears are skipped."""
    if not stated.get("config_groups") and not stated.get("quant_algo") and "weight_block_size" not in stated:
        return True
    entries = [
        entry for key in ("ignore", "exclude_modules", "modules_to_not_convert") for entry in strings(stated.get(key))
    ]
    skip_list = SkipList.of(entries)
    return bool(entries) and all(skip_list.reaches(module) for module in linears if not is_built_plain(module))


def contradictions(subject: Subject) -> Iterator[Finding]:
    """Two files must not state different methods."""
    quantization = configuration.quantization_config(subject.checkpoint.config)
    stated = quantization.get("quant_method")
    if subject.modelopt and quantization and not str(stated).startswith("modelopt"):
        yield ServingError.of_contradiction(file=MODELOPT_CONFIG, config=CONFIG, stated=stated)


def stacks_of_experts(subject: Subject) -> Iterator[Finding]:
    """Experts must be separate tensors if the model has no other FP8 layers; other stacks get a note."""
    stacks = [t for t in subject.quantized if len(t.shape) == 3 and t.weight.dtype in FP8_DTYPES]
    stated, config = subject.stated, subject.checkpoint.config
    if not stacks or stated is None or (misread := misreads_stacks(config, stated.method)) is None:
        return
    failure = ServingError.of_stacks(stacks[0], names=[tensor.name for tensor in stacks], misread=misread)
    yield failure if has_no_fp8_experts(config) else failure.found


def tied_head(subject: Subject) -> Iterator[Finding]:
    """The head must agree with ``tie_word_embeddings``."""
    checkpoint = subject.checkpoint
    ties = ties_embeddings(checkpoint.config)
    embeddings, head = map(checkpoint.tensors.get, embeddings_and_head(checkpoint.tensors).names)
    if embeddings is None:  # not a language model, or one file of several
        return
    if ties and head is not None and not same_bits(head, embeddings):
        said = f"{CONFIG} says tie_word_embeddings"
        if checkpoint.config.get("tie_word_embeddings") is False:  # transformers reads this, vLLM text_config
            said = f"text_config says tie_word_embeddings, though {CONFIG} itself says false"
        yield ServingError.of_head(head, embeddings=embeddings.name, said=said)
    if ties is False and head is None and not checkpoint.defects and has_language_head(checkpoint.config):
        yield ServingError.of_no_head(file=CONFIG, head=HEADS[0])
