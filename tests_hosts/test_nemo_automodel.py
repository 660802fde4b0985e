"""NeMo AutoModel's own `Checkpointer`, with our adapter in the place of its own: every path by which it loads, and its
saving.

Which path it takes is its decision, from the class of the model, the number of ranks and the class of the adapter. It
is read from the line that each path logs at its end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from nemo_automodel.components.checkpoint.state_dict_adapter import StateDictAdapter as HostStateDictAdapter
from nemo_automodel.components.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter as HostAdapter
from torch import nn
from transformers import AutoConfig, Mistral3ForConditionalGeneration

import fp8ckpt
from fp8ckpt.hosts import nemo_automodel as leaf
from fp8ckpt.hosts.nemo_automodel import AutoModelMistral3FP8StateDictAdapter
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter
from tests_hosts.models import EMBEDDING, HEAD, build, keep_stage, on_disk, shard, sharded, spoil, wrong
from tests_hosts.ranks import Ranks

VARIANTS = ["identity", "nested", "uneven", "f32_scales", "shaped_scales", "bf16_linear"]

OURS = Mistral3FP8StateDictAdapter.from_checkpoint
OURS_IN_PARTS = AutoModelMistral3FP8StateDictAdapter.from_checkpoint


class HostsOwn(Mistral3ForConditionalGeneration):
    """A model of which the host thinks that it is one of its own: it looks at the module of the class only."""


HostsOwn.__module__ = "nemo_automodel.components.models.fp8ckpt_tests"


@dataclass(frozen=True)
class Job:
    """One load by the host, and what follows it. ``part``: elements of one part of the streaming path."""

    source: Path
    adapter: Callable[[Path], Any]
    custom: bool = False  # whether the host is to take the model's class for one of its own
    sharding: str = "none"
    nested: bool = False
    dtype: torch.dtype = torch.bfloat16
    on_meta: bool = False
    part: int | None = None
    save: Path | None = None
    base: Path | None = None  # the file layout that the host is to save in
    resume: bool = False


@dataclass
class Outcome:
    """What one rank saw."""

    path: list[str]
    log: list[str]
    wrong: list[str]
    sharded: int
    after_resume: list[str] | None = None


class Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.lines.append(record.getMessage())

    def paths(self) -> list[str]:
        """The loading paths that came to their end, in order."""
        found = []
        for line in self.lines:
            if line.startswith("load_model: loaded a "):
                found.append("streaming")
            elif line.startswith("load_model: "):
                found += ["single-process"] if "disk read" in line else ["dcp"] if "destinations" in line else []
        return found


@contextmanager
def logged() -> Iterator[Lines]:
    """What the root logger is given, from INFO on."""
    root, lines = logging.getLogger(), Lines()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(lines)
    try:
        yield lines
    finally:
        root.removeHandler(lines)
        root.setLevel(level)


@contextmanager
def parts_of(elements: int | None) -> Iterator[None]:
    """The streaming path's parts so small that a sample has many."""
    with pytest.MonkeyPatch.context() as patch:
        if elements is not None:
            patch.setattr(leaf, "_PART", elements)
        yield


def checkpointer(base: Path | None = None) -> Checkpointer:
    """The host's, set to dequantize, and to consolidate at every save."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    config = CheckpointingConfig(
        model_save_format="safetensors",
        save_consolidated="every",
        dequantize_base_checkpoint=True,
        model_repo_id=None if base is None else str(base),
    )
    return Checkpointer(config, dp_rank=rank, tp_rank=0, pp_rank=0)


def prepared(job: Job) -> nn.Module:
    """The model as a trainer has it before the load: sharded, adapter in place; every parameter is NaN."""
    with torch.device("meta" if job.on_meta else "cpu"):
        model = build(job.source, HostsOwn if job.custom else Mistral3ForConditionalGeneration, job.dtype)
    model.state_dict_adapter = job.adapter(job.source)
    shard(model, job.sharding)
    if job.on_meta:
        checkpointer().initialize_model_weights(model, torch.device("cpu"))
    spoil(model)
    return model


def carry_out(job: Job) -> Outcome:
    """Load, and save and resume where the job says so; on every rank."""
    host, model = checkpointer(job.base), prepared(job)
    with logged() as log, parts_of(job.part):
        host.load_model(model, str(job.source), is_init_step=True)
    outcome = Outcome(log.paths(), log.lines, wrong(model, job.source, job.nested), sharded(model))
    if job.save is not None:
        host.save_model(model, str(job.save))
    if job.resume:
        another = prepared(job)
        host.load_model(another, str(job.save / "model"), is_init_step=False)
        outcome.after_resume = wrong(another, job.source, job.nested)
    host.close()
    return outcome


def assert_right(outcomes: list[Outcome], path: str) -> None:
    """Each rank took ``path``, once, and every parameter has the contract's bits."""
    for outcome in outcomes:
        assert outcome.path == [path], outcome.log
        assert outcome.wrong == []


def job_for(variant: str, sources: dict[str, Path], adapter: Callable[[Path], Any], **more: Any) -> Job:
    """The job of loading a variant."""
    return Job(sources[variant], adapter, nested=variant == "nested", **more)


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_process(variant: str, sources: dict[str, Path]) -> None:
    """One process, which reads everything and lets the adapter convert it."""
    assert_right([carry_out(job_for(variant, sources, OURS))], "single-process")


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_in_a_single_process(variant: str, sources: dict[str, Path]) -> None:
    """One process, part after part."""
    assert_right([carry_out(job_for(variant, sources, OURS_IN_PARTS))], "streaming")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sharding", ["fsdp", "tp"])
@pytest.mark.parametrize(
    ("path", "adapter", "custom"),
    [
        ("dcp", OURS, True),
        ("streaming", OURS_IN_PARTS, False),
        ("single-process", OURS, False),  # each rank reads everything
    ],
    ids=["dcp", "streaming", "single-process"],
)
def test_two_ranks(
    path: str,
    adapter: Callable[[Path], Any],
    custom: bool,
    sharding: str,
    variant: str,
    sources: dict[str, Path],
    two_ranks: Ranks,
) -> None:
    """Sharded parameters, by every path that the host has."""
    outcomes = two_ranks.run(carry_out, job_for(variant, sources, adapter, custom=custom, sharding=sharding))
    assert_right(outcomes, path)
    assert all(outcome.sharded >= 16 for outcome in outcomes)


def test_the_adapter_of_the_documentation(sources: dict[str, Path], two_ranks: Ranks) -> None:
    """``for_vlm_full()``, which has no file to look at, serves a release whose names and scales are as documented."""
    job = Job(sources["identity"], documented)
    assert_right([carry_out(job)], "single-process")
    assert_right(two_ranks.run(carry_out, replace(job, custom=True, sharding="fsdp")), "dcp")


@pytest.mark.parametrize(("variant", "path"), [("nested", "streaming"), ("tied_nested", "single-process")])
def test_the_adapter_of_a_configuration(variant: str, path: str, sources: dict[str, Path]) -> None:
    """As the host's own models make it: names by the configuration, in parts; a tied model, whose head may be on disk
    or not, goes by the other path.
    """
    assert_right([carry_out(Job(sources[variant], of_configuration, nested=True))], path)


def of_configuration(source: Path) -> AutoModelMistral3FP8StateDictAdapter:
    """The leaf's adapter without a file."""
    return AutoModelMistral3FP8StateDictAdapter.for_vlm_full(AutoConfig.from_pretrained(source))


def documented(source: Path) -> Mistral3FP8StateDictAdapter:
    """The adapter without a file; the ranks find it by this name."""
    return Mistral3FP8StateDictAdapter.for_vlm_full()


@pytest.mark.parametrize("path", ["dcp", "streaming"])
def test_a_model_that_began_on_meta(path: str, sources: dict[str, Path], two_ranks: Ranks) -> None:
    """The host's order of things: meta, FSDP2, materialize, load."""
    adapter = OURS if path == "dcp" else OURS_IN_PARTS
    job = Job(sources["identity"], adapter, custom=path == "dcp", sharding="fsdp", on_meta=True)
    assert_right(two_ranks.run(carry_out, job), path)


@pytest.mark.parametrize("adapter", [OURS, OURS_IN_PARTS], ids=["single-process", "streaming"])
def test_a_float32_model_holds_the_same_values(adapter: Callable[[Path], Any], sources: dict[str, Path]) -> None:
    """Values of a float32 model are those of a bfloat16 one, by whichever path they came."""
    job = Job(sources["f32_scales"], adapter, dtype=torch.float32)
    assert_right([carry_out(job)], "streaming" if adapter is OURS_IN_PARTS else "single-process")


@pytest.mark.parametrize("variant", ["identity", "nested", "uneven"])
def test_many_parts(variant: str, sources: dict[str, Path], two_ranks: Ranks) -> None:
    """Parts so small that there are many, cut at the same places on all ranks."""
    job = job_for(variant, sources, OURS_IN_PARTS, part=1 << 14)
    single = carry_out(job)
    both = two_ranks.run(carry_out, replace(job, sharding="fsdp")) + two_ranks.run(
        carry_out, replace(job, sharding="tp")
    )
    assert_right([single, *both], "streaming")
    counts = {
        line.split(" in ")[1].split()[0]
        for o in (single, *both)
        for line in o.log
        if line.startswith("load_model: loaded a ")
    }
    assert len(counts) == 1
    assert 10 <= int(counts.pop()) <= 45


@pytest.mark.parametrize("variant", ["tied", "tied_nested"])
@pytest.mark.parametrize("part", [None, 1 << 14], ids=["one part", "many parts"])
def test_tied_embeddings_streaming(part: int | None, variant: str, sources: dict[str, Path], two_ranks: Ranks) -> None:
    """A checkpoint without a head fills both ends of a tied model, which stays tied: no parameter but those on disk is
    left.
    """
    job = Job(sources[variant], OURS_IN_PARTS, nested=variant == "tied_nested", part=part)
    assert_right([carry_out(job), *two_ranks.run(carry_out, replace(job, sharding="fsdp"))], "streaming")


@pytest.mark.parametrize("variant", ["tied", "tied_nested"])
@pytest.mark.parametrize("path", ["single-process", "dcp"])
def test_tied_embeddings_by_the_other_paths(
    path: str, variant: str, sources: dict[str, Path], two_ranks: Ranks
) -> None:
    """The same by the paths that know nothing of parts."""
    job = Job(sources[variant], OURS, nested=variant == "tied_nested")
    outcomes = (
        [carry_out(job)]
        if path == "single-process"
        else two_ranks.run(carry_out, replace(job, custom=True, sharding="fsdp"))
    )
    assert_right(outcomes, path)


@pytest.mark.parametrize(
    ("path", "adapter", "custom", "variant"),
    [
        ("streaming", OURS_IN_PARTS, False, "tied"),
        ("streaming", OURS_IN_PARTS, False, "tied_nested"),
        ("single-process", OURS, False, "tied"),
        ("single-process", OURS, False, "tied_nested"),
        ("dcp", OURS, True, "tied"),
    ],
    ids=["streaming-tied", "streaming-tied_nested", "single-process-tied", "single-process-tied_nested", "dcp-tied"],
)
def test_tied_embeddings_that_sharding_took_apart(
    path: str, adapter: Callable[[Path], Any], custom: bool, variant: str, sources: dict[str, Path], two_ranks: Ranks
) -> None:
    """TP makes two parameters of the tied ones; after the load both have the embedding's values."""
    job = Job(sources[variant], adapter, custom=custom, sharding="tp", nested=variant == "tied_nested")
    assert two_ranks.run(load_and_compare_ends, job) == [([path], True, True)] * 2


@pytest.mark.parametrize("adapter", ["ours", "the host's"])
def test_the_one_tied_model_that_the_hosts_dcp_path_refuses(
    adapter: str, sources: dict[str, Path], two_ranks: Ranks
) -> None:
    """Nested names, and ends that TP took apart: there it looks for the head by its native name. It says so, with any
    adapter.
    """
    make = OURS if adapter == "ours" else hosts_own_nested_adapter
    job = Job(sources["tied_nested"], make, custom=True, sharding="tp", nested=True)
    with pytest.raises(AssertionError, match=r"Missing key in checkpoint state_dict: language_model\.lm_head\.weight"):
        two_ranks.run(load_and_compare_ends, job)


def load_and_compare_ends(job: Job) -> tuple[list[str], bool, bool]:
    """(the path taken, whether the embedding has the file's bits, whether the head has)."""
    host, model = checkpointer(), prepared(job)
    assert model.get_parameter(EMBEDDING) is not model.get_parameter(HEAD)
    with logged() as log:
        host.load_model(model, str(job.source), is_init_step=True)
    host.close()
    expected = fp8ckpt.open_checkpoint(job.source).read(on_disk(EMBEDDING, job.nested))
    ends = [model.get_parameter(name).full_tensor() for name in (EMBEDDING, HEAD)]
    return log.paths(), *(torch.equal(end.view(torch.int16), expected.view(torch.int16)) for end in ends)


@pytest.mark.parametrize("variant", ["identity", "nested"])
@pytest.mark.parametrize("adapter", [OURS, OURS_IN_PARTS], ids=["adapter", "adapter in parts"])
def test_pipeline_stages(
    adapter: Callable[[Path], Any], variant: str, sources: dict[str, Path], two_ranks: Ranks
) -> None:
    """Stages have tensors, and would have parts, of different number: such a load goes by the DCP path, and ends."""
    job = job_for(variant, sources, adapter, custom=True, part=1 << 14)
    stages = two_ranks.run(load_stage, job)
    assert_right([outcome for outcome, _ in stages], "dcp")
    names = [name for _, held in stages for name in held]
    assert sorted(on_disk(name, job.nested) for name in names) == sorted(fp8ckpt.open_checkpoint(job.source).tensors)


def load_stage(job: Job) -> tuple[Outcome, list[str]]:
    """This rank's stage, loaded, and the names of its parameters."""
    host, model = checkpointer(), prepared(job)
    keep_stage(model, torch.distributed.get_rank())
    with logged() as log, parts_of(job.part):
        host.load_model(model, str(job.source), is_init_step=True)
    host.close()
    return Outcome(log.paths(), log.lines, wrong(model, job.source, job.nested, whole=False), 0), list(
        dict(model.named_parameters())
    )


@pytest.mark.parametrize("variant", ["identity", "nested", "f32_scales"])
@pytest.mark.parametrize("how", ["single-process", "streaming", "dcp fsdp", "dcp tp", "streaming fsdp"])
def test_save_consolidates_the_values_of_the_source(
    how: str, variant: str, sources: dict[str, Path], two_ranks: Ranks, tmp_path: Path
) -> None:
    """The host saves what it loaded: verify finds no difference from the FP8 source, and the configuration is a plain
    one.
    """
    path, _, sharding = how.partition(" ")
    adapter = OURS_IN_PARTS if path == "streaming" else OURS
    job = job_for(variant, sources, adapter, save=tmp_path / "saved", resume=True)
    many = replace(job, sharding=sharding, custom=path == "dcp")
    outcomes = two_ranks.run(carry_out, many) if sharding else [carry_out(job)]
    assert_right(outcomes, path)
    assert all(outcome.after_resume == [] for outcome in outcomes)
    assert_saved(sources[variant], tmp_path / "saved")


def test_save_in_the_files_of_the_source(sources: dict[str, Path], two_ranks: Ranks, tmp_path: Path) -> None:
    """With the source as its model repository, the host keeps the division into files."""
    source = sources["identity"]
    job = Job(source, OURS, custom=True, sharding="fsdp", save=tmp_path / "saved", base=source)
    assert_right(two_ranks.run(carry_out, job), "dcp")
    out = assert_saved(source, tmp_path / "saved")
    assert [file.name for file in sorted(out.glob("*.safetensors"))] == [
        file.name for file in sorted(source.glob("*.safetensors"))
    ]


def assert_saved(source: Path, saved: Path) -> Path:
    """A consolidated directory with the source's logical tensors, bit for bit, all bfloat16, from which the way back
    leads to the source itself, byte for byte; returns it.
    """
    out = saved / "model" / "consolidated"
    result = fp8ckpt.verify(source, out)
    assert (result.defects, result.tensor_differences) == ((), ())
    assert result.tensors == len(fp8ckpt.open_checkpoint(source).tensors) == 45
    checkpoint = fp8ckpt.open_checkpoint(out)
    assert checkpoint.quantized == []
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    fp8ckpt.convert(out, saved / "back", to="fp8", like=source)
    assert files_of(saved / "back") == files_of(source)
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def test_what_was_saved_starts_the_next_run(sources: dict[str, Path], tmp_path: Path) -> None:
    """The consolidated directory is a base checkpoint like any other, under an adapter made for it."""
    job = Job(sources["nested"], OURS, nested=True, save=tmp_path / "saved")
    carry_out(job)
    out = tmp_path / "saved" / "model" / "consolidated"
    assert_right([carry_out(replace(job, source=out, save=None))], "single-process")
    assert_right([carry_out(replace(job, source=out, save=None, adapter=OURS_IN_PARTS))], "single-process")


class Recorded(Mistral3FP8StateDictAdapter):
    """Our adapter, and what a host does with it."""

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("attributes", []).append((name, value))
        super().__setattr__(name, value)

    def to_hf(self, state_dict: dict[str, Any], *positional: Any, **keywords: Any) -> dict[str, Any]:
        """As ours."""
        self.__dict__.setdefault("calls", []).append(("to_hf", positional, keywords))
        return super().to_hf(state_dict, *positional, **keywords)

    def from_hf(self, hf_state_dict: dict[str, Any], *positional: Any, **keywords: Any) -> dict[str, Any]:
        """As ours."""
        self.__dict__.setdefault("calls", []).append(("from_hf", positional, keywords))
        return super().from_hf(hf_state_dict, *positional, **keywords)


def load_and_save_recorded(job: Job) -> tuple[list[Any], list[Any], list[str]]:
    """(calls, attributes that were set from outside, wrong parameters) of one load and one save."""
    host, model = checkpointer(), prepared(job)
    model.state_dict_adapter.__dict__.update(calls=[], attributes=[])
    host.load_model(model, str(job.source), is_init_step=True)
    host.save_model(model, str(job.save))
    host.close()
    adapter = model.state_dict_adapter
    return adapter.calls, adapter.attributes, wrong(model, job.source)


def test_keywords_and_attributes_of_the_host(sources: dict[str, Path], two_ranks: Ranks, tmp_path: Path) -> None:
    """The host passes keywords that the documentation does not have and sets an attribute; the result is the same."""
    job = Job(sources["identity"], Recorded.from_checkpoint, custom=True, sharding="fsdp", save=tmp_path / "saved")
    for calls, attributes, differing in two_ranks.run(load_and_save_recorded, job):
        assert differing == []
        assert [name for name, _, _ in calls] == ["to_hf", "from_hf", "to_hf"]
        (_, _, loading), (_, _, back), (_, _, saving) = calls
        assert loading.keys() == {"exclude_key_regex", "quantization", "device_mesh", "for_checkpoint_load"}
        assert loading["quantization"] is True
        assert back.keys() == {"device_mesh"}
        assert saving.keys() == {
            "exclude_key_regex",
            "quantization",
            "device_mesh",
            "v4_compatible",
            "legacy_paramwrapper_layout",
        }
        assert saving["quantization"] is False
        assert attributes == [("_paramwrapper_layout_hint", None)] * 2


@pytest.mark.parametrize("adapter", [OURS, OURS_IN_PARTS, documented])
def test_the_adapter_is_true(adapter: Callable[[Path], Any], sources: dict[str, Path]) -> None:
    """The host asks for the truth of an adapter, and would silently go without a false one."""
    assert bool(adapter(sources["identity"]))


def test_only_the_leaf_is_of_the_hosts_class(sources: dict[str, Path]) -> None:
    """That decides about streaming; and what the host asks of its own class is there."""
    assert not isinstance(OURS(sources["identity"]), HostStateDictAdapter)
    ours = OURS_IN_PARTS(sources["identity"])
    assert isinstance(ours, HostStateDictAdapter)
    assert isinstance(ours, fp8ckpt.StateDictAdapter)
    assert ours.supports_low_memory_dcp_load is False
    assert ours.checkpoint_key_aliases == {}
    assert ours.get_hf_state_dict_keys({EMBEDDING: torch.empty(1)}) == [EMBEDDING]


def test_the_comparison_can_fail(sources: dict[str, Path], two_ranks: Ranks) -> None:
    """The host's own adapter rounds float32 scales on its DCP path, and these tests see it: no path is compared with
    itself.
    """
    job = Job(sources["f32_scales"], hosts_own_adapter, custom=True, sharding="fsdp")
    for outcome in two_ranks.run(carry_out, job):
        assert outcome.path == ["dcp"]
        assert 0 < len(outcome.wrong) <= 14


def hosts_own_adapter(source: Path) -> HostAdapter:
    """The host's, for names that are the same on disk."""
    return HostAdapter(not_fp8_prefixes=("model.vision_tower", "model.multi_modal_projector"))


def hosts_own_nested_adapter(source: Path) -> HostAdapter:
    """The host's, for the other way of naming."""
    return HostAdapter.for_vlm_full()
