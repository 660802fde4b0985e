"""What the releases of a family leave unquantized, by the ends of names: for adapters that there are before a file.

Where there is a file, it says so itself.
"""

#: Ends of weights' names in Mistral3. Endings, not modules: the last is of "model.language_model.norm.weight", too.
MISTRAL3 = (
    "embed_tokens.weight",
    "lm_head.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "model.norm.weight",
)
#: Its modules, whole, where it sees.
MISTRAL3_TOWERS = ("model.vision_tower", "model.multi_modal_projector")
#: In DeepSeek V3: embeddings, heads, norms, routers, and the projection of multi-token prediction.
DEEPSEEK_V3 = (
    "embed_tokens.weight",
    "lm_head.weight",
    "norm.weight",
    "mlp.gate.weight",
    "eh_proj.weight",
    "shared_head.head.weight",
)
