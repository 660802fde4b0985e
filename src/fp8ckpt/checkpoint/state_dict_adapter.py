"""The contract between a model's own state dict (native) and the names and dtypes on disk (HF)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from fp8ckpt.tensors.assembly import Assembly


class StateDictAdapter(ABC):
    """A translator of state dicts. Hosts pass further keywords to each method; it ignores unknown ones.

    ``hf_assets_path``: the directory of the checkpoint that it was made for; torchtitan loads from it if it is given no
    path. ``fqn_to_index_mapping``: the number of each tensor's file there, from 1 on, by its name on disk; torchtitan
    writes as many files. None without a checkpoint, and for a checkpoint of one file.

    >>> class Prefixed(fp8ckpt.StateDictAdapter):
    ...     def to_hf(self, state_dict, **_):
    ...         return {f"model.{name}": tensor for name, tensor in state_dict.items()}
    ...
    ...     def from_hf(self, hf_state_dict, device_mesh=None, **_):
    ...         return {name.removeprefix("model."): tensor for name, tensor in hf_state_dict.items()}
    ...
    ...     def convert_single_tensor_to_hf(self, fqn, tensor, **_):
    ...         return [(f"model.{fqn}", tensor)]
    >>> model = torch.nn.Module()
    >>> model.language_model = torch.nn.Module()
    >>> model.language_model.norm = torch.nn.RMSNorm(128, dtype=torch.bfloat16)
    >>> model.state_dict_adapter = Prefixed()
    >>> fp8ckpt.load_model(model, "sample-fp8", partial=True)
    >>> expected = fp8ckpt.open_checkpoint("sample-fp8").read("model.language_model.norm.weight")
    >>> model.language_model.norm.weight.equal(expected)
    True
    """

    hf_assets_path: str | None = None
    fqn_to_index_mapping: dict[str, int] | None = None

    @abstractmethod
    def to_hf(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Convert a model-native state dict to the HF (on-disk) layout."""

    @abstractmethod
    def from_hf(
        self, hf_state_dict: dict[str, Any], device_mesh: DeviceMesh | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Convert an HF-layout state dict to the model's own."""

    @abstractmethod
    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        """Convert one native tensor; return the (HF name, tensor) pairs that are stored for it."""

    def assemblies(
        self, own: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
    ) -> Mapping[str, Assembly] | None:
        """Return how each tensor of the model is made of those on disk, by the model's names; None leaves it to
        ``to_hf``.

        ``own``, ``stored``: the shapes of the model's tensors and of those on disk, by name. With assemblies, tensors
        are cut, stacked and transposed on their way between disk and shards, without a second copy, and ``to_hf`` and
        ``from_hf`` are not called.
        """
        return None
