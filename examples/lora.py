"""Train a LoRA on a release with transformers and PEFT, for as long as it takes to see a difference.

python examples/lora.py RELEASE ADAPTER
"""

from __future__ import annotations

import argparse

import peft
import torch

import fp8ckpt

STEPS = 20


def main() -> None:
    """Train on a made-up text, and save what PEFT saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("adapter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = fp8ckpt.load_pretrained(arguments.base)  # or from_pretrained, of what `convert --to bf16` wrote
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    tokens = torch.randint(3, model.get_base_model().get_input_embeddings().num_embeddings, (4, 32))
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f} after {STEPS} steps")
    model.save_pretrained(arguments.adapter)


if __name__ == "__main__":
    main()
