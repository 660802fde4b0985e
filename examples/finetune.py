"""Fine-tune a BF16 directory in plain transformers, for as long as it takes to see a difference, and save it as
transformers does.

python examples/finetune.py BF16_DIRECTORY OUT [--steps N]
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import logging


def main() -> None:
    """Train on a made-up text; the tokens are the same at every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16).train()
    tokens = torch.randint(20, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for step in range(arguments.steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
