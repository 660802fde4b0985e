"""NeMo AutoModel: our adapter for its streaming path.

`Mistral3FP8StateDictAdapter` itself serves that trainer's single-process and DCP paths. Its streaming path needs more:
the adapter must be an instance of the trainer's own base class, and divide the load into parts, each finished before
the next begins. Written against nemo-automodel 0.7.0.

    model.state_dict_adapter = AutoModelMistral3FP8StateDictAdapter.from_checkpoint(path)
    checkpointer.load_model(model, path, is_init_step=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from nemo_automodel.components.checkpoint.state_dict_adapter import CheckpointLoadPart
from nemo_automodel.components.checkpoint.state_dict_adapter import StateDictAdapter as HostStateDictAdapter

from fp8ckpt.models.fp8_state_dict_adapter import SCALE_SUFFIX
from fp8ckpt.models.mistral3_vlm.state_dict_adapter import Mistral3FP8StateDictAdapter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PART = 1 << 28  # elements of full tensors, not of shards, so that every rank cuts at the same places
_ENDS = ("embed_tokens.weight", "model.norm.weight")  # of the text model; a pipeline stage lacks one or both


# The host is untyped.
class AutoModelMistral3FP8StateDictAdapter(Mistral3FP8StateDictAdapter, HostStateDictAdapter):  # type: ignore[misc]
    """The same adapter, as an instance of the host's base class."""

    def iter_checkpoint_load_parts(
        self, model_state_dict: dict[str, torch.Tensor], device_mesh: DeviceMesh | None = None
    ) -> Iterator[CheckpointLoadPart] | None:
        """Return parts of about a quarter of a billion elements: FP8 placeholders for a few weights, and what finishes
        them.

        Tensors that are BF16 on disk are filled in place. A head that is tied to the embedding, and not on disk, counts
        as done with the last part; the host ties the two after all parts. Returns None, and the host takes another
        path, in two cases: for a pipeline stage, since the host reads each part on all ranks together and stages have
        different numbers of parts; and for a tied model without a file, which may hold a head or not.
        """
        if not all(any(name.endswith(end) for name in model_state_dict) for end in _ENDS):
            return None
        if self.may_lack_head and self._release is None:
            return None
        tied = frozenset(name for name in model_state_dict if self._is_only_tied(name))
        parts: list[dict[str, torch.Tensor]] = [{}]
        size = 0
        for name, tensor in model_state_dict.items():
            if name in tied:
                continue
            if size >= _PART:
                parts.append({})
                size = 0
            parts[-1][name] = tensor
            size += tensor.numel()
        return (self._load_part(part, tied if part is parts[-1] else frozenset()) for part in parts)

    def _is_only_tied(self, name: str) -> bool:
        release = self._release
        return (
            release is not None
            and self.may_lack_head
            and name.endswith("lm_head.weight")
            and self.native_to_hf(name) not in release.stored
        )

    def _load_part(self, native: dict[str, torch.Tensor], tied: frozenset[str]) -> CheckpointLoadPart:
        placeholders = self.to_hf(native, quantization=True)
        fp8 = [self.native_to_hf(name) for name in native if self.is_fp8_weight(name)]
        temporary = frozenset(key for name in fp8 for key in (name, name + SCALE_SUFFIX))
        return CheckpointLoadPart(
            checkpoint_tensors=placeholders,
            model_keys=frozenset(native) | tied,
            temporary_checkpoint_keys=temporary,
            finish=self._finish({key: placeholders[key] for key in placeholders if key in temporary}, native),
        )

    def _finish(self, placeholders: dict[str, torch.Tensor], native: dict[str, torch.Tensor]) -> Callable[[], None]:
        def finish() -> None:
            with torch.no_grad():
                for name, values in self.from_hf(placeholders).items():
                    native[name].copy_(values)
            placeholders.clear()

        return finish
