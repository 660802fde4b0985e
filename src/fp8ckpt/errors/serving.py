"""What a serving engine would fail on, one row each; `fp8ckpt.serving` finds them."""

from __future__ import annotations

from fp8ckpt.errors.base import Fp8CheckpointError, Says

_NOT_STATED = "the weights are FP8, but no configuration says so"
_MULTIPLES = "multiples of {part.block} {part.dimension}, or vLLM and SGLang raise ValueError"
_UNLISTED = "{names:count} unquantized Linears are not in {key}: {names:some}"
_TO_LIST = "list them: an engine treats as FP8 what it is not told to skip"
_ACTIVATIONS = "the activation scale has shape {shape}, one of {count} that engines cannot load"
_NO_DIMENSIONS = "store it with shape []"


class ServingError(Fp8CheckpointError, ValueError):
    """A serving engine would refuse the directory, or serve something other than its contents."""

    # fmt: off
    of_unsound = Says("it has {defects}: an engine refuses it, or serves other values", "a sound checkpoint")

    # ---------------------------------------------------------------- what the configuration states
    of_nothing_stated = Says(_NOT_STATED, "{keys}",
        "use the configuration that was written with them; or convert with --like and --serving, which writes one")
    of_markers = Says(_NOT_STATED, "{keys}",
        "serve it with ComfyUI, whose markers say so; for engines, convert it to bf16, and that with --scheme")
    of_no_method = Says("quant_method is missing", "one of {methods}",
        "add it; the other statements are those of {guess}")
    of_scheme = Says("activation_scheme is {scheme:shown}", "static or dynamic",
        "state static if every FP8 tensor has its activation scale, else dynamic")
    of_block = Says("weight_block_size is {block:shown}, and {count} of {all} FP8 tensors have other blocks",
        "the block size of scales {scale} for weights {weight}",
        "state the block size of the file, or null for one scale per tensor; engines use one for all tensors")
    of_renamed = Says("{engine} reads this model's weight_scale_inv as one scale per tensor, and {does}",
        "weight_scale, as in compressed-tensors, for block scales",
        "convert the BF16 weights with --scheme block, which uses that name, or with --scheme per-tensor")
    of_unquantized = Says("it states that the weights are quantized, but none is", "no quantization of weights",
        "if they are meant to be unquantized, state no quantization of them: an engine would look for scales")
    of_contradiction = Says("it states quantization by ModelOpt, but {config} states {stated:shown}", "one method",
        "move away the file that does not describe these weights")
    of_stacks = Says("{names:count} stacks of experts are FP8 ({names:some}): {misread}", "one tensor per expert",
        "leave them in BF16 (convert --scheme, --skip experts), or store each expert as a tensor of its own")
    of_head = Says("the head differs from {embeddings:shown}, but {said}", "the same bytes, or no head",
        "if the head is its own, state false everywhere: an engine would serve the embeddings in its place")
    of_no_head = Says("tie_word_embeddings is false, but no head is stored", "a tensor {head}",
        "restore the head; or state true if it is tied to the embeddings")
    of_unlisted = Says(_UNLISTED, "a name or a pattern for each", _TO_LIST)
    of_unlisted_names = Says(_UNLISTED, "the full name of each: vLLM does not skip modules by a prefix",
        _TO_LIST)
    of_unlisted_parts = Says("{names:count} parts of the model that hold nothing FP8 are not in {key}: {names:some}",
        "the prefix of each, as transformers and SGLang read the list", _TO_LIST)
    of_listed = Says("{names:count} FP8 tensors are in {key}: {names:some}", "no FP8 tensors in it",
        "take them off the list: an engine would read codes as weights")
    of_misread_list = Says(
        "transformers {version} matches {entry:shown} in {key} with the {part} of {names:count} FP8 tensors' "
        "names: {names:some}",
        "no FP8 tensors in it", "list what is not FP8 by its full name, with a $ at the end if longer names begin so")

    # ---------------------------------------------------------------- scales
    of_dimensions = Says("the scale of a whole tensor has shape {shape}, in {count} of {all} FP8 tensors", "[] or [1]",
        f"{_NO_DIMENSIONS}: vLLM's loader fails on this one")
    of_activation_shape = Says(_ACTIVATIONS, "[] or [1], or [experts]", _NO_DIMENSIONS)
    of_activation_values = Says(_ACTIVATIONS, "[] or [1], or [experts]",
        "calibrate one value for all: engines have no other static scaling of activations")
    of_lacking = Says("{count} of {all} FP8 tensors have no activation scale", "one for each, {by}",
        "restore them, or leave out all and state dynamic, where the method has that: "
        "engines serve an arbitrary number for a missing one")
    of_needless = Says("{count} of {all} FP8 tensors have an activation scale", "none, by {by}",
        "leave them out; or state static, where the method has that and every FP8 tensor has one")
    of_powers = Says("{scales} scales of {count} FP8 tensors are not powers of two, but {by} states scale_fmt ue8m0",
        "powers of two",
        "quantize these weights again (convert --scales fresh): engines keep only the exponents of such scales")

    # ---------------------------------------------------------------- what engines join and shard
    of_mixed = Says("{count} groups of weights that engines join are only partly FP8; the first is {names:some}",
        "all FP8, or none", "quantize all of a group, or none: vLLM refuses to build the layer")
    of_torn = Says("{count} FP8 tensors {why} and are not whole blocks: {part}", _MULTIPLES,
        "convert the BF16 weights with --scheme block, which leaves these, or with per-tensor or channel")
    of_shares = Says("with a tensor-parallel size of {size}, {count} FP8 tensors are not cut into whole blocks: {part}",
        _MULTIPLES, "serve it with a size of {largest} or less; with expert parallelism, experts are not cut")

    # ---------------------------------------------------------------- files
    of_native_weights = Says("Mistral's own copy of the weights is beside the others: {names:some}", "one copy",
        "move it away: vLLM serves it instead of the others")
    of_native_config = Says("Mistral's own configuration is beside weights that it does not describe",
        "{config} alone", "move it away: vLLM reads it, and looks for consolidated*.safetensors")
    of_other_weights = Says("weights in another format are beside the safetensors files: {names:some}", "one copy",
        "move them away: an engine may load them instead")
    of_no_index = Says("{count} safetensors files without an index", "model.safetensors.index.json",
        "use the index that was written with them, or write the directory again with convert, which makes one")
    of_metadata = Says("the metadata does not say what wrote it, in {count} of {all} files", '{{"format": "pt"}}',
        "write the file again with it: loaders that serve several frameworks refuse the file, or guess")
    # fmt: on
