"""What every rank would do first, done once in the server that they are forked from: loading of the compiled loops and
of the tables of transformers. No thread of it is left.
"""

from __future__ import annotations

import os
import warnings
from tempfile import TemporaryDirectory

from fp8ckpt import load_pretrained, sample, save_model

with TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    base = sample(f"{folder}/fp8")
    model = load_pretrained(base)
    for scales in ("reuse", "fresh"):
        save_model(model, f"{folder}/{scales}", to="fp8", like=base, scales=scales)
    del model
