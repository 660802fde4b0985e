"""What every rank would do first, done once in the server that ranks are forked from: its imports, the compiled loops
that are loaded at their first call, the tables of transformers. No thread of it is left.
"""

from __future__ import annotations

import os
import warnings
from tempfile import TemporaryDirectory

import hypothesis  # noqa: F401  # of the modules that the functions of ranks come from
import pytest  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

from fp8ckpt import load_pretrained, sample, save_model
from tests.support import ALL  # noqa: F401

with TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    base = sample(f"{folder}/fp8")
    model = load_pretrained(base)
    for scales in ("reuse", "fresh"):
        save_model(model, f"{folder}/{scales}", to="fp8", like=base, scales=scales)
    del model
