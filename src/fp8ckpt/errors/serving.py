"""What a serving engine would fail on, one row each; `fp8ckpt.serving` finds them."""

from __future__ import annotations

from fp8ckpt.errors.base import Fp8CheckpointError, Says

_NOT_STATED = "the weights are FP8, and no configuration says so"
_MULTIPLES = "multiples of {part.block} {part.dimension}, where vLLM and SGLang raise ValueError otherwise"
_UNLISTED = "{names:count} unquantized Linears are not in {key}: {names:some}"
_TO_LIST = "list them: an engine makes FP8 of what it is not told to skip"
_ACTIVATIONS = "the activation scale has shape {shape}, and is one of {count} that engines cannot load"
_NO_DIMENSIONS = "store it without dimensions"


class ServingError(Fp8CheckpointError, ValueError):
    """A serving engine would refuse the directory, or serve something other than its contents."""

    # fmt: off
    of_unsound = Says("it has {defects}: an engine refuses it, or serves something else", "a sound checkpoint")

    # ---------------------------------------------------------------- what the configuration states
    of_nothing_stated = Says(_NOT_STATED, "{keys}",
        "take the configuration that was written with them; convert --like and --serving writes one")
    of_markers = Says(_NOT_STATED, "{keys}",
        "serve it with ComfyUI, whose markers say so; for engines, convert it to bf16 and that with a --scheme")
    of_no_method = Says("quant_method is missing", "one of {methods}", "add it; what else is stated is that of {guess}")
    of_scheme = Says("activation_scheme is {scheme:shown}", "static or dynamic",
        "state static if every FP8 tensor has its activation scale, else dynamic")
    of_block = Says("weight_block_size is {block:shown}, and {count} of {all} FP8 tensors are scaled otherwise",
        "the block size of scales {scale} for weights {weight}",
        "state the block size of the file, or null for one scale a tensor; engines take one for all")
    of_renamed = Says("{engine} takes weight_scale_inv of this model for the one scale of a tensor, and {does}",
        "weight_scale, of compressed-tensors, for blocks",
        "convert the BF16 weights with --scheme block, which names blocks so, or with --scheme per-tensor")
    of_unquantized = Says("it states that the weights are quantized, and none is", "no quantization of weights",
        "if they are meant to be as they are, state no quantization of them: an engine would look for scales")
    of_contradiction = Says("it states quantization by ModelOpt, and {config} states {stated:shown}", "one method",
        "move away the file that does not speak of these weights")
    of_stacks = Says("{names:count} stacks of experts are FP8 ({names:some}): {misread}", "an expert a tensor",
        "leave them in BF16 (convert --scheme, --skip experts), or give each expert a tensor of its own")
    of_head = Says("the head is not {embeddings:shown}, and {said}", "the same bytes, or no head",
        "state false in all of it if the head is its own; an engine would serve the embeddings in its place")
    of_no_head = Says("tie_word_embeddings is false, and no head is stored", "a tensor {head}",
        "restore the head; or state true if it is the embeddings")
    of_unlisted = Says(_UNLISTED, "a name or a pattern for each", _TO_LIST)
    of_unlisted_names = Says(_UNLISTED, "each by its full name: vLLM skips no module that a prefix stands for",
        _TO_LIST)
    of_unlisted_parts = Says("{names:count} parts of the model that hold nothing FP8 are not in {key}: {names:some}",
        "each by its prefix, as transformers and SGLang read the list", _TO_LIST)
    of_listed = Says("{names:count} FP8 tensors are in {key}: {names:some}", "none that is FP8",
        "take them off the list: an engine would read codes as weights")
    of_misread_list = Says(
        "transformers {version} takes {entry:shown} in {key} for the {part} of {names:count} FP8 tensors' "
        "names: {names:some}",
        "none that is FP8", "list what is not FP8 by its full name, and with a $ after it where other names begin so")

    # ---------------------------------------------------------------- scales
    of_dimensions = Says("the scale of a whole tensor has shape {shape}, in {count} of {all} FP8 tensors", "[] or [1]",
        f"{_NO_DIMENSIONS}: vLLM's loader fails on this one")
    of_activation_shape = Says(_ACTIVATIONS, "[] or [1], or [experts]", _NO_DIMENSIONS)
    of_activation_values = Says(_ACTIVATIONS, "[] or [1], or [experts]",
        "calibrate one value for all: engines have no other static scaling of activations")
    of_lacking = Says("{count} of {all} FP8 tensors have no activation scale", "one for each, {by}",
        "restore them, or leave out all and state dynamic, where the method has that: engines take a missing one for "
        "a senseless number")
    of_needless = Says("{count} of {all} FP8 tensors have an activation scale", "none, by {by}",
        "leave them out; or state static, where the method has that and every FP8 tensor has one")
    of_powers = Says("{scales} scales of {count} FP8 tensors are no powers of two, and {by} states scale_fmt ue8m0",
        "powers of two",
        "quantize these weights again (convert --scales fresh): engines keep only the exponents of such scales")

    # ---------------------------------------------------------------- what engines join and shard
    of_mixed = Says("{count} groups of weights that engines join are FP8 in part; the first is {names:some}",
        "all FP8, or none", "quantize all of a group, or none: vLLM refuses to build the layer")
    of_torn = Says("{count} FP8 tensors {why} and are not whole blocks: {part}", _MULTIPLES,
        "convert the BF16 weights with --scheme block, which leaves such, or with per-tensor or channel")
    of_shares = Says("with a tensor-parallel size of {size}, {count} FP8 tensors are not cut into whole blocks: {part}",
        _MULTIPLES, "serve it with {largest} or fewer; experts that are not cut (expert parallelism) fit")

    # ---------------------------------------------------------------- files
    of_native_weights = Says("Mistral's own copy of the weights stands beside the others: {names:some}", "one copy",
        "move it away: vLLM serves it instead of the others")
    of_native_config = Says("Mistral's own configuration stands beside weights that it does not speak of",
        "{config} alone", "move it away: vLLM reads it, and looks for consolidated*.safetensors")
    of_other_weights = Says("weights of another kind stand beside the safetensors files: {names:some}", "one copy",
        "move them away: an engine may load them instead")
    of_no_index = Says("{count} safetensors files without an index", "model.safetensors.index.json",
        "take the index that was written with them, or write the directory anew with convert, which makes one")
    of_metadata = Says("the metadata does not say what wrote it, in {count} of {all} files", '{{"format": "pt"}}',
        "have it written anew with that: loaders that serve several frameworks refuse the file, or guess")
    # fmt: on
