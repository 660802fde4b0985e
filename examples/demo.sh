#!/usr/bin/env bash
# The main job on a miniature checkpoint: look, convert, prove it, go back, and run the result in transformers. `make demo` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf demo
mkdir demo

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say fp8ckpt sample demo/fp8
say fp8ckpt inspect demo/fp8
say fp8ckpt convert demo/fp8 demo/bf16 --to bf16
say fp8ckpt verify demo/fp8 demo/bf16
say fp8ckpt convert demo/bf16 demo/back --to fp8 --like demo/fp8
say diff -r demo/fp8 demo/back
say python examples/logits.py demo/fp8 demo/bf16
