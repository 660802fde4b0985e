"""What the configuration states of quantization and of tied heads, compared with the tensors."""

from __future__ import annotations

from collections.abc import Iterator

from fp8ckpt.errors import ServingError, shown
from fp8ckpt.families.loaders import engines_that_rename_scales, has_no_fp8_experts, is_stack, misreads_stacks
from fp8ckpt.families.roles import is_built_plain
from fp8ckpt.families.tied import HEADS, embeddings_and_head, has_language_head, ties_embeddings
from fp8ckpt.numerics.codes import FP8_DTYPES
from fp8ckpt.numerics.geometry import tiled
from fp8ckpt.serving.skip_list import SkipList, unquantized_linears
from fp8ckpt.serving.subject import METHODS, SCHEMES, Finding, Subject, guessed_method, some, strings
from fp8ckpt.tensors import config as configuration
from fp8ckpt.tensors.config import CONFIG, MISTRAL_CONFIG, MODELOPT_CONFIG, Json
from fp8ckpt.tensors.reading import same_bits
from fp8ckpt.tensors.scaled import QuantizedTensor

_INTEGERS = ("I8", "U8", "I16", "I32", "U32")


def method(subject: Subject) -> Iterator[Finding]:
    """Quantization must be stated, with a method that engines serve."""
    stated = subject.stated
    if stated is None:
        found = "the weights are FP8, and no configuration says so"
        expected = '"quantization_config" with quant_method, activation_scheme and the skip list'
        if subject.file == MISTRAL_CONFIG:
            expected = '"quantization"'
        remedy = "take the configuration that was written with them; convert --like and --serving writes one"
        if subject.checkpoint.markers:
            remedy = (
                "serve it with ComfyUI, whose markers say so; for engines, convert it to bf16 and that with a --scheme"
            )
        yield ServingError(found, file=subject.file, expected=expected, remedy=remedy)
    elif stated.method is None:
        found, guess = "quant_method is missing", guessed_method(stated.quantization)
        remedy = f"add it; what else is stated is that of {guess}"
        expected = f"one of {', '.join(name for name in METHODS if name != 'mistral')}"
        yield ServingError(found, file=stated.file, expected=expected, remedy=remedy)
    elif stated.method not in METHODS:
        yield f"quant_method is {shown(stated.method)}, of which fp8ckpt does not know what engines need: not checked"


def fp8_fields(subject: Subject) -> Iterator[Finding]:
    """The further fields of "fp8": the activation scheme, and the block size of the file."""
    stated, quantized = subject.stated, subject.quantized
    if stated is None or stated.method != "fp8":
        return
    scheme = stated.quantization.get("activation_scheme")
    if scheme not in SCHEMES:
        found = "activation_scheme is missing" if scheme is None else f"activation_scheme is {shown(scheme)}"
        remedy = "state static if every FP8 tensor has its activation scale, else dynamic"
        yield ServingError(found, file=stated.file, expected="static or dynamic", remedy=remedy)
    block = stated.quantization.get("weight_block_size")
    if "weight_block_size" not in stated.quantization:
        yield "weight_block_size is absent: vLLM takes that for one scale a tensor, transformers for 128 x 128 blocks"
    size = tuple(block) if block else None

    def differs(tensor: QuantizedTensor) -> bool:
        if size is None:  # the last two dimensions are the matrix; leading ones are experts, with a scale each or one
            return any(n > 1 for n in tensor.grid.shape[-2:])
        fit = tiled(tensor.shape, size)
        return fit is None or fit.shape != tensor.grid.shape

    if others := [tensor for tensor in quantized if tensor.weight.dtype in FP8_DTYPES and differs(tensor)]:
        first, count = others[0], f"{len(others)} of {len(quantized)} FP8 tensors"
        found = f"weight_block_size is {shown(block)}, and {count} are scaled otherwise"
        expected = f"the block size of scales {list(first.scale.shape)} for weights {list(first.shape)}"
        remedy = "state the block size of the file, or null for one scale a tensor; engines take one for all"
        yield ServingError(found, tensor=first.name, file=stated.file, expected=expected, remedy=remedy)


def renamed_scales(subject: Subject) -> Iterator[Finding]:
    """Blocks of scales under a name that the model's loader takes for the one scale of a tensor."""
    renamed = [tensor for tensor in subject.quantized if tensor.scale.name.endswith(".weight_scale_inv")]
    grids = [tensor for tensor in renamed if max(tensor.grid.shape[-2:], default=1) > 1]
    if not grids:
        return
    for engine in engines_that_rename_scales(subject.checkpoint.config):
        found = f"{engine} takes weight_scale_inv of this model for the one scale of a tensor"
        if engine.startswith("SGLang"):
            yield f"{found}, and does not serve the blocks of {shown(grids[0].name)} and {len(grids) - 1} more"
            continue
        expected = "weight_scale, of compressed-tensors, for blocks"
        remedy = "convert the BF16 weights with --scheme block, which names blocks so, or with --scheme per-tensor"
        found += f", and refuses {len(grids)} that are blocks"
        yield ServingError(found, tensor=grids[0].scale, expected=expected, remedy=remedy)


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
            yield f"{file} states the quantization of the key-value cache alone, and the weights are as they should be"
        elif integers:
            yield f"{file} states a quantization that is not FP8 ({some(integers)}): not checked"
        else:
            found = "it states that the weights are quantized, and none is"
            remedy = (
                "if they are meant to be as they are, state no quantization of them: an engine would look for scales"
            )
            yield ServingError(found, file=file, expected="no quantization of weights", remedy=remedy)


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
        found = f"it states quantization by ModelOpt, and {CONFIG} states {shown(stated)}"
        remedy = "move away the file that does not speak of these weights"
        yield ServingError(found, file=MODELOPT_CONFIG, expected="one method", remedy=remedy)


def stacks_of_experts(subject: Subject) -> Iterator[Finding]:
    """Experts must be separate tensors if the model has no other FP8 layers; other stacks get a note."""
    stacks = [t for t in subject.quantized if is_stack(t.name, t.shape) and t.weight.dtype in FP8_DTYPES]
    stated, config = subject.stated, subject.checkpoint.config
    if not stacks or stated is None or (misread := misreads_stacks(config, stated.method)) is None:
        return
    found = f"{len(stacks)} stacks of experts are FP8 ({some(tensor.name for tensor in stacks)}): {misread}"
    if not has_no_fp8_experts(config):
        yield found
        return
    remedy = "leave them in BF16 (convert --scheme, --skip experts), or give each expert a tensor of its own"
    yield ServingError(found, tensor=stacks[0], expected="an expert a tensor", remedy=remedy)


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
        found = f"the head is not {shown(embeddings.name)}, and {said}"
        remedy = "state false in all of it if the head is its own; an engine would serve the embeddings in its place"
        yield ServingError(found, tensor=head, expected="the same bytes, or no head", remedy=remedy)
    if ties is False and head is None and not checkpoint.defects and has_language_head(checkpoint.config):
        found = "tie_word_embeddings is false, and no head is stored"
        remedy = "restore the head; or state true if it is the embeddings"
        yield ServingError(found, file=CONFIG, expected=f"a tensor {HEADS[0]}", remedy=remedy)
