"""What a graph leaves in its outputs, cut to the caller's batch."""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

# Outputs with a position per token. Every other output has a row per row of the batch.
_PER_TOKEN = {"last_hidden_state", "start_logits", "end_logits", "prediction_logits"}
_LOGITS_PER_TOKEN = ("ForMaskedLM", "LMHeadModel", "ForCausalLM", "ForTokenClassification", "ElectraForPreTraining")
MOST_CUTS = 1024  # per graph


class Outputs:
    """The outputs of a captured forward.

    Raises:
        TypeError: an output is not a tensor, such as a cache, so it cannot be cut.
    """

    def __init__(self, output: Any, model_class: str) -> None:
        if not isinstance(output, ModelOutput):
            raise TypeError(f"a {type(output).__name__} as output")
        for name, value in output.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"a {type(value).__name__} as output {name!r}")
        self._class, self._tensors = type(output), dict(output.items())
        per_token = _PER_TOKEN | ({"logits"} if model_class.endswith(_LOGITS_PER_TOKEN) else set())
        self._per_token = per_token & self._tensors.keys()
        self._cuts: dict[torch.Size, tuple[Tensor, ...]] = {}

    def cut(self, shape: torch.Size, keep: bool) -> Any:
        """The outputs for a batch of this shape; with `keep` in memory of the caller's own."""
        parts = self._cuts.get(shape)
        if parts is None:
            if len(self._cuts) >= MOST_CUTS:
                self._cuts.clear()
            parts = self._cuts[shape] = tuple(self._part(name, tensor, shape) for name, tensor in self._tensors.items())
        if keep:
            parts = [part.clone() for part in parts]
        return self._class(**dict(zip(self._tensors, parts, strict=True)))

    def _part(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        part = tensor[: shape[0]]
        return part[:, : shape[-1]] if name in self._per_token else part
