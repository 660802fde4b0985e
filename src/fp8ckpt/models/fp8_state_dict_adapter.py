"""What the FP8 adapters of all families share, for hosts that own their reader.

``to_hf(quantization=True)`` emits placeholders for codes and scales, so that the host's reader fetches codes verbatim;
``from_hf`` pairs codes with scales, dequantizes, and drops the scales. Hosts that take a reader get `FP8StorageReader`
instead, and only need ``to_hf(quantization=False)``. Both ways give the same bits.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp8ckpt.checkpoint.quantized_dtensors import FLOAT8_DTYPES, dequantize, quantize
from fp8ckpt.checkpoint.state_dict_adapter import StateDictAdapter
from fp8ckpt.checkpoint.storage_reader import FP8StorageReader
from fp8ckpt.encodings.rule import Rule
from fp8ckpt.errors import UnsupportedFormatError
from fp8ckpt.families.tied import ties_embeddings
from fp8ckpt.numerics.geometry import tiled
from fp8ckpt.tensors.checkpoint import Checkpoint
from fp8ckpt.tensors.config import states_powers_of_two
from fp8ckpt.tensors.reading import load_scales, torch_dtype
from fp8ckpt.tensors.scaled import QuantizedTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SCALE_SUFFIX = "_scale_inv"
ACTIVATION_SUFFIX = ".activation_scale"


def identity(name: str) -> str:
    """A name that is the same on both sides."""
    return name


class Release(NamedTuple):
    """What an adapter takes from the checkpoint that it was made for.

    ``quantized``: its FP8 weights by native name; ``stored``: all names on disk; ``powers_of_two``: whether new scales
    must be powers of two.
    """

    quantized: Mapping[str, QuantizedTensor]
    stored: frozenset[str]
    powers_of_two: bool


class FP8StateDictAdapter(StateDictAdapter):
    """The base of FP8 adapters: a family says which weights are FP8, how scales tile them, and their default dtype."""

    logger: logging.Logger
    block_size: tuple[int, ...] | None = None  # None: one scale per tensor
    scale_dtype: str

    def __init__(
        self, native_to_hf: Callable[[str], str], hf_to_native: Callable[[str], str], layout_name: str
    ) -> None:
        self.native_to_hf = native_to_hf
        self.hf_to_native = hf_to_native
        self.layout_name = layout_name
        self._release: Release | None = None  # set by from_checkpoint()
        self.may_lack_head = False  # the file may lack a head that is tied to the embeddings

    def _take(self, checkpoint: Checkpoint) -> None:
        """Become the adapter of an open checkpoint, from its headers and configuration alone. Raises
        `UnsupportedFormatError` for scales of another shape or name than the family's.
        """
        for tensor in checkpoint.quantized:
            fits, expected = self._fits(tensor)
            if not fits or tensor.scale.name != tensor.name + SCALE_SUFFIX:
                scale, words = tensor.scale, f"{expected}, {SCALE_SUFFIX}"
                raise UnsupportedFormatError.of_grid(tensor.name, file=scale.file, scale=scale, fits=words)
        quantized = {self.hf_to_native(tensor.name): tensor for tensor in checkpoint.quantized}
        self._release = Release(quantized, frozenset(checkpoint.tensors), states_powers_of_two(checkpoint.config))
        self.may_lack_head = bool(ties_embeddings(checkpoint.config))
        self.hf_assets_path = str(checkpoint.path)
        if len(checkpoint.files) > 1:
            numbers = {header.file.name: number for number, header in enumerate(checkpoint.files, 1)}
            self.fqn_to_index_mapping = {
                name: numbers[tensor.span.file.name] for name, tensor in checkpoint.tensors.items()
            }
            if self.may_lack_head:  # a host may write the head that is not on disk
                self.fqn_to_index_mapping.setdefault(self.native_to_hf("lm_head.weight"), len(numbers))

    def is_fp8_weight(self, fqn: str) -> bool:
        """Whether a weight is FP8: by the file, if there is one; otherwise by the release's rule for names."""
        return self._is_named_fp8(fqn) if self._release is None else fqn in self._release.quantized

    @abstractmethod
    def _is_named_fp8(self, fqn: str) -> bool:
        """Whether the release's rule for names makes it an FP8 weight."""

    def _fits(self, tensor: QuantizedTensor) -> tuple[bool, str]:
        """Whether its scale has the family's shape, and that shape in words."""
        if self.block_size is None:
            return tensor.grid.per_tensor, "one scale a tensor"
        grid = tiled(tensor.shape, self.block_size)
        return (False, "a matrix") if grid is None else (tensor.scale.shape == grid.shape, f"{grid.shape}")

    def _scaled(self, fqn: str, weight: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Return (the shape of a weight's scale, its block size). A scale that spans the weight has no block size, and
        the file's shape, if there is a file.
        """
        if self.block_size is None:
            return () if (tensor := self._on_disk(fqn)) is None else tensor.scale.shape, None
        grid = tiled(tuple(weight.shape), self.block_size)
        if grid is None:
            raise UnsupportedFormatError.of_axes(fqn, shape=tuple(weight.shape))
        return grid.shape, grid.block_size

    def scale_placeholder(self, fqn: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the shape and dtype of the weight's scale on disk; whole on every rank."""
        tensor = self._on_disk(fqn)
        dtype = torch_dtype(self.scale_dtype if tensor is None else tensor.scale.dtype)
        return torch.ones(self._scaled(fqn, weight)[0], device=weight.device, dtype=torch.float32).to(dtype)

    def quantize(self, fqn: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (codes, scale) of a weight, with the checkpoint's scales where they fit; without a checkpoint, with
        new ones.

        Raises `ScaleValueError` if a scale on disk is invalid, `RangeError` if its dtype cannot hold a new one.
        """
        shape, block_size = self._scaled(fqn, weight)
        tensor, rule, before = self._on_disk(fqn), Rule(fqn, self.scale_dtype), None
        if self._release is not None and tensor is not None:
            powers_of_two, remedy = self._release.powers_of_two, "save it in bf16"
            rule = Rule(fqn, tensor.scale.dtype, powers_of_two=powers_of_two, file=tensor.scale.file, remedy=remedy)
            before = load_scales(tensor) if tuple(weight.shape) == tensor.shape else None
        codes, scale = quantize(rule, weight, block_size, before)
        return codes, scale.reshape(shape)

    def _on_disk(self, fqn: str) -> QuantizedTensor | None:
        return None if self._release is None else self._release.quantized.get(fqn)

    def to_hf(
        self,
        state_dict: dict[str, Any],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Convert a native state dict to the HF layout.

        With ``quantization``, each FP8 weight becomes a placeholder of its shape, device and placements, for codes that
        are still to be read, followed by one for its scale; everything else is the same object. Native names that match
        ``exclude_key_regex`` from their start are left out. Further keywords, which hosts pass, are ignored.
        """
        hf: dict[str, Any] = {}
        for fqn, value in state_dict.items():
            if exclude_key_regex is not None and re.match(exclude_key_regex, fqn):
                continue
            key = self.native_to_hf(fqn)
            if quantization and isinstance(value, torch.Tensor) and self.is_fp8_weight(fqn):
                hf[key] = torch.empty_like(value, dtype=torch.float8_e4m3fn, requires_grad=False)
                hf[key + SCALE_SUFFIX] = self.scale_placeholder(fqn, value)
            else:
                hf[key] = value
        return hf

    def from_hf(
        self, hf_state_dict: dict[str, Any], device_mesh: DeviceMesh | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Convert an HF state dict, FP8 or not, to the native one.

        An FP8 weight with its ``_scale_inv`` becomes bfloat16, and a DTensor stays a DTensor. Scales and activation
        scales are dropped. Everything else is passed on as the same object; so is an FP8 weight without a scale, which
        hosts rely on.
        """
        native: dict[str, Any] = {}
        dequantized = scales = activations = 0
        for key, value in hf_state_dict.items():
            if key.endswith(SCALE_SUFFIX):
                scales += 1
            elif key.endswith(ACTIVATION_SUFFIX):
                activations += 1
            else:
                scale = hf_state_dict.get(key + SCALE_SUFFIX)
                if isinstance(value, torch.Tensor) and value.dtype in FLOAT8_DTYPES and scale is not None:
                    value = self.dequantize(key, value, scale)
                    dequantized += 1
                native[self.hf_to_native(key)] = value
        self.logger.info(
            "%s[%s].from_hf: dequantized %d FP8 weights, dropped %d scale_inv + %d activation_scale keys",
            type(self).__name__, self.layout_name, dequantized, scales, activations,
        )  # fmt: skip
        return native

    def dequantize(self, key: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the bfloat16 values of codes."""
        return dequantize(key, weight, scale, self.block_size)

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        """Return the (HF name, tensor) pairs that are stored for a native tensor.

        One pair, with the same object; for an FP8 weight with ``quantization=True`` two: its codes, and a scale. They
        reproduce the tensor exactly if it is unchanged since it was loaded from the checkpoint that the adapter was
        made for (`from_checkpoint`), and otherwise within e4m3's rounding. All ranks that hold shards must call it.
        """
        key = self.native_to_hf(fqn)
        excluded = kwargs.get("exclude_key_regex")
        if excluded is not None and re.match(excluded, fqn):
            return []
        if kwargs.get("quantization", False) and isinstance(tensor, torch.Tensor) and self.is_fp8_weight(fqn):
            codes, scale = self.quantize(fqn, tensor)
            return [(key, codes), (key + SCALE_SUFFIX, scale)]
        return [(key, tensor)]

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> FP8StorageReader:
        """Return the reader that torchtitan asks its adapter for. The file itself says whether it is quantized."""
        return FP8StorageReader(path)
