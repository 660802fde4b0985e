"""Models that are sharded by transformers' own plans: tensors and experts over ranks, layers in a pipeline."""

from __future__ import annotations

import logging
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from fp8ckpt import convert, load_model, load_pretrained, open_checkpoint, save_model
from tests.distributed import assert_same, run, whole
from tests.families.releases import RELEASES
from tests.families.test_there_and_back import assert_released, logits

Plan = dict[str, int]

TP, TP_EP, EP_FSDP, PP = {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"ep_size": 2, "fsdp_size": 2}, {"pp_size": 2}
CASES = [
    *((name, TP) for name in ("Qwen3-MoE", "Qwen3-Next", "DeepSeek-V3", "Llama-4", "Qwen3 tied, head stored")),
    *((name, TP_EP) for name in ("GLM-4.5-MoE", "Mistral4")),
    *((name, EP_FSDP) for name in ("Qwen3.5-MoE", "DeepSeek-V3")),
    *((name, PP) for name in ("DeepSeek-V3", "Mixtral", "Qwen3 tied")),
]


def _config(plan: Plan) -> Any:
    return DistributedConfig(**plan)


def _there_and_back(root: Path, out: Path, name: str, plan: Plan) -> None:
    model = load_pretrained(root / name, parallelize=_config(plan), partial="pp_size" in plan)
    expected = RELEASES[name].expected(open_checkpoint(root / name).read)
    state = model.state_dict()
    for key, tensor in state.items():
        assert_same(whole(tensor), expected[key], key)
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, set(state))
    assert set.union(*held) == expected.keys()
    assert (held[0] != held[1]) == ("pp_size" in plan)
    assert "pp_size" in plan or any(isinstance(tensor, DTensor) for tensor in state.values())
    save_model(model, out, to="fp8", like=root / name)
    assert_released(out, name, root / name)


def _all_there_and_back(root: Path, out: Path, cases: list[tuple[str, Plan]]) -> None:
    logging.disable(logging.WARNING)  # transformers says which of its rules do not apply
    for name, plan in cases:
        try:
            _there_and_back(root, out / f"{name}, {' '.join(plan)}", name, plan)
        except Exception as error:
            raise AssertionError(f"{name}, {plan}: {error!r}") from error


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the releases of the cases."""
    root = tmp_path_factory.mktemp("releases")
    for name in {name for name, _ in CASES}:
        RELEASES[name].write(root / name)
    return root


def test_there_and_back_by_the_plans_of_transformers(released: Path, tmp_path: Path) -> None:
    """On two ranks every tensor has the release's bits, on one of them at least; saved as FP8, it is the release."""
    known = signature(DistributedConfig).parameters
    cases = [(name, plan) for name, plan in CASES if plan.keys() <= known.keys()]
    run(2, _all_there_and_back, released, tmp_path, cases)
    if len(cases) < len(CASES):
        pytest.skip(
            f"transformers {transformers.__version__} knows {len(cases)} of the {len(CASES)} plans, which passed"
        )


def _all_as_transformers(root: Path, plain: Path, names: list[str]) -> None:
    logging.disable(logging.WARNING)
    for name in names:
        _as_transformers(root, plain, name, TP)


def _as_transformers(root: Path, plain: Path, name: str, plan: Plan) -> None:
    cls = getattr(transformers, RELEASES[name].model)
    theirs = cls.from_pretrained(plain / name, dtype=torch.bfloat16, distributed_config=_config(plan))
    ours = load_pretrained(root / name, parallelize=_config(plan))
    _assert_same_shards(ours, theirs)
    if "MoE" not in name:  # its miniature is too narrow for their kernel
        assert_same(logits(ours), logits(theirs))
    for parameter in theirs.parameters():
        parameter.data.zero_()
    load_model(theirs, root / name)
    _assert_same_shards(ours, theirs)


def _assert_same_shards(ours: Any, theirs: Any) -> None:
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert found.keys() == expected.keys()  # what is tied is there once
    for key, tensor in expected.items():
        assert type(found[key].data) is type(tensor.data)
        if isinstance(tensor, DTensor):
            assert found[key].placements == tensor.placements
            assert_same(found[key].to_local(), tensor.to_local(), key)
        else:
            assert_same(found[key], tensor, key)


def test_each_rank_holds_what_it_would_hold_by_from_pretrained(released: Path, tmp_path: Path) -> None:
    """The shards, ties and logits are those of from_pretrained; load_model fills such a model, too."""
    names = ["Qwen3 tied", "Qwen3-MoE"]
    for name in names:
        convert(released / name, tmp_path / name)
    run(2, _all_as_transformers, released, tmp_path, names)
