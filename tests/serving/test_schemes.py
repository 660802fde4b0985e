"""What a scheme quantizes and what the skip list says is one decision: no output of ``--scheme`` is refused by
``verify --serving``, whatever the class is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from fp8ckpt.encodings.asked import Asked
from fp8ckpt.encodings.schemes import SCHEMES, plan_scheme
from fp8ckpt.errors import ServingError
from fp8ckpt.output.layout import TensorSpec, lay_out_in_files
from fp8ckpt.output.partial import PartialOutput
from fp8ckpt.serving import joining, listing, statements
from fp8ckpt.serving.subject import Subject
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import dump_json

CHECKS = (
    statements.method, statements.fp8_fields, statements.contradictions, listing.complete, listing.true, joining.mixed,
)  # fmt: skip
#: Of each class, what is left although its name or its place might say otherwise.
LEFT = {
    "BertForMaskedLM": ["cls.predictions.transform.dense"],
    "RobertaForMaskedLM": ["lm_head.dense"],
    "XLMRobertaForMaskedLM": ["lm_head.dense"],
    "Data2VecTextForCausalLM": ["lm_head.dense"],
    "XmodForCausalLM": ["lm_head.dense"],
    "CamembertForCausalLM": ["lm_head.dense"],
    "ElectraForCausalLM": ["generator_predictions.dense"],
    "JetMoeForCausalLM": ["model.layers.0.self_attention.experts.router.layer"],
    "VideoLlavaForConditionalGeneration": ["video_tower.encoder.layers.0.mlp.fc1"],
    "Cosmos3OmniForConditionalGeneration": ["blocks.0.attn.qkv"],
    "Step3p7ForConditionalGeneration": ["model.layers.0.self_attn.g_proj"],
    "DeepseekVLForConditionalGeneration": ["model.aligner.linear1"],
    "GraniteSpeechForConditionalGeneration": ["encoder.input_linear"],
    "InstructBlipForConditionalGeneration": ["language_projection"],
    "FNetForMaskedLM": ["fnet.pooler.dense"],
    "DistilBertForMaskedLM": ["vocab_transform"],
    "DeepseekV3ForCausalLM": ["model.layers.3.mlp.gate"],
    "T5ForConditionalGeneration": ["lm_head"],
}


def write(name: str, directory: Path) -> Path:
    """A model of a class, with as many layers as its default configuration has up to four: a header, and a hole."""
    cls = getattr(transformers, name)
    config = cls.config_class()
    for part in (
        config,
        *(value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)),
    ):
        if getattr(part, "num_hidden_layers", None):
            part.num_hidden_layers = min(4, part.num_hidden_layers)
            if isinstance(kinds := getattr(part, "layer_types", None), list):
                part.layer_types = kinds[: part.num_hidden_layers]
    with torch.device("meta"):
        model: Any = cls._from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [name]
    tied = {*model.all_tied_weights_keys}
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    shapes = {key: tuple(tensor.shape) for key, tensor in revert_weight_conversion(model, state).items()}
    directory.mkdir()
    for layout in lay_out_in_files([TensorSpec(key, "BF16", shape) for key, shape in shapes.items()], 1 << 50):
        with (directory / layout.name).open("wb") as file:
            file.write(layout.head)
            file.truncate(layout.size)
    (directory / "config.json").write_bytes(dump_json(model.config.to_dict()))
    return directory


def planned(directory: Path, scheme: str) -> Checkpoint:
    """What ``convert --scheme`` would write, with its configuration."""
    asked = Asked(directory, "fp8", "native", None, scheme, "reuse", None, False, False, True, None, None, False)
    written: list[Checkpoint] = []

    def served(checkpoint: Checkpoint) -> dict[str, Any]:
        written.append(dataclasses.replace(checkpoint, config=listing.served_config(checkpoint)))
        return written[0].config

    plan_scheme(asked, PartialOutput(directory.with_name("out")), served)
    return written[0]


def refused(checkpoint: Checkpoint) -> list[ServingError]:
    subject = Subject(checkpoint)
    return [found for check in CHECKS for found in check(subject) if isinstance(found, ServingError)]


@pytest.mark.parametrize("name", LEFT)
def test_no_output_of_a_scheme_is_refused(name: str, tmp_path: Path) -> None:
    """Each by each scheme; and what its releases would leave is left."""
    directory = write(name, tmp_path / "source")
    for scheme in SCHEMES:
        checkpoint = planned(directory, scheme)
        assert not refused(checkpoint), scheme
        codes = {tensor.name for tensor in checkpoint.quantized}
        assert codes
        assert codes.isdisjoint(f"{module}.weight" for module in LEFT[name])
        assert all(f"{module}.weight" in checkpoint.tensors for module in LEFT[name] if module != "lm_head")
