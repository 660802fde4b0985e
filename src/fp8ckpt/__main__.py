"""``python -m fp8ckpt``."""

from fp8ckpt.cli import main

main()
