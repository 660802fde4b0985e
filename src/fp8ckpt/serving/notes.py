"""What is served otherwise than expected, or not checked: a sentence each, with places for facts."""

# fmt: off
UNREADABLE = "the configuration cannot be understood, and was not checked"
NOTHING_QUANTIZED = "nothing is quantized"
UNKNOWN_METHOD = "quant_method is {}, for which fp8ckpt does not know what engines need: not checked"
NO_BLOCK_SIZE = (
    "weight_block_size is absent: vLLM then expects one scale per tensor, transformers 128 x 128 blocks")
CACHE_ALONE = "{} states the quantization of the key-value cache alone, which fits these weights"
NOT_FP8 = "{} states a quantization that is not FP8 ({}): not checked"
UNEQUAL_SCALES = (
    "{} of {} groups of weights that are served as one have unequal scales, and are served through a requantization to "
    "the largest scale; the first is {}")
UNEQUAL_FACTORS = (
    "{} of {} groups of weights that are served as one have unequal second levels of scales, and are served with the "
    "largest number for all: values are off; the first is {}")
TORN_COLUMNS = (
    "{} FP8 tensors have columns that are not a multiple of their block's ({}): kernels that quantize activations by "
    "such groups refuse them when the model runs, and transformers, where it dequantizes, assumes smaller blocks, "
    "or refuses them")
_TORN_ROWS = (
    "{} FP8 tensors have rows that are not a multiple of their block's ({}): transformers, where it dequantizes, ")
MISREAD_ROWS = _TORN_ROWS + "assumes smaller blocks, and reads wrong values"
REFUSED_ROWS = _TORN_ROWS + "refuses them"
