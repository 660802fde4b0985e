"""Load a converted checkpoint in transformers, run it, and compare it with transformers' own dequantizing load of the
source.

python examples/logits.py FP8_DIRECTORY BF16_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, FineGrainedFP8Config, Mistral3ForConditionalGeneration
from transformers.utils import logging


def main(source: Path, converted: Path) -> None:
    """Print what was compared; exit with a message where anything differs."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    skip = json.loads((source / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    dequantize = FineGrainedFP8Config(
        dequantize=True, weight_block_size=None, activation_scheme="static", modules_to_not_convert=skip
    )
    ours = Mistral3ForConditionalGeneration.from_pretrained(converted, dtype=torch.bfloat16).eval()
    theirs = Mistral3ForConditionalGeneration.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=dequantize
    ).eval()

    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not torch.equal(parameter.view(torch.int16), reference[name].view(torch.int16)):
            sys.exit(f"{name} differs")
    print(f"{len(reference)} parameters are equal, bit for bit, to those that transformers dequantizes itself")

    inputs = AutoTokenizer.from_pretrained(converted)("The file is the authority.", return_tensors="pt")
    with torch.no_grad():
        logits = ours(input_ids=inputs.input_ids).logits
        expected = theirs(input_ids=inputs.input_ids).logits
    if not torch.equal(logits, expected) or not logits.isfinite().all():
        sys.exit("the logits differ")
    print(f"logits {list(logits.shape)} are equal, too; their standard deviation is {logits.float().std():.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
