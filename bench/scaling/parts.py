"""A model as the simulator sees it: its head, layers and embeddings, each with its parameters and operations.

The backward reaches them in this order. A layer of a patched model is one autograd function, so all gradients of a layer arrive
together; within it they arrive in the order of LAYER (tests/bench/scaling/test_real_run.py holds both against hooks).
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.flops import forward_flops

HEAD = (
    *("cls.seq_relationship.bias", "cls.seq_relationship.weight", "cls.predictions.bias"),
    *("cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"),
    *("cls.predictions.transform.dense.bias", "cls.predictions.transform.dense.weight"),
    *("bert.pooler.dense.bias", "bert.pooler.dense.weight"),
)
LAYER = (
    *("attention.self.query.weight", "attention.self.query.bias", "attention.self.value.bias", "output.dense.bias"),
    *("output.LayerNorm.bias", "output.dense.weight", "attention.self.value.weight", "intermediate.dense.weight"),
    *("intermediate.dense.bias", "attention.output.LayerNorm.bias", "attention.output.LayerNorm.weight"),
    *("attention.output.dense.bias", "output.LayerNorm.weight", "attention.self.key.weight"),
    *("attention.output.dense.weight", "attention.self.key.bias"),
)
EMBEDDINGS = (
    *("bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"),
    *("bert.embeddings.LayerNorm.bias", "bert.embeddings.position_embeddings.weight", "bert.embeddings.LayerNorm.weight"),
)


# The modules of a stock layer in the order of its backward, and their parameters in the order in which they arrive there.
MODULES = {
    f"{name}.": tuple(f"{name}.{parameter}" for parameter in parameters)
    for name, parameters in {
        "output": ("LayerNorm.weight", "LayerNorm.bias", "dense.bias", "dense.weight"),
        "intermediate": ("dense.bias", "dense.weight"),
        "attention.output": ("LayerNorm.weight", "LayerNorm.bias", "dense.bias", "dense.weight"),
        "attention.self": ("value.bias", "value.weight", "key.bias", "key.weight", "query.bias", "query.weight"),
    }.items()
}


@dataclass(frozen=True)
class Part:
    """Parameters whose gradients arrive together, by name and in the order of arrival. kind: which operations it has."""

    name: str
    parameters: dict[str, Tensor]
    kind: str = "layer"

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


@dataclass(frozen=True)
class Model:
    """A BertForPreTraining in parts, in the order of the backward: the head, the layers from the last, the embeddings.

    The decoder's weight is the word embeddings, whose gradient is complete with the embeddings' backward.
    """

    config: Any
    parts: tuple[Part, ...]

    @property
    def layers(self) -> tuple[Part, ...]:
        return self.parts[1:-1]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def forward_flops(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Operations of each part's forward for sequences of these lengths (bench.core.flops)."""
        whole = forward_flops(self.config, "pretraining", lengths)
        bare = copy(self.config)
        bare.num_hidden_layers = 0
        head = forward_flops(bare, "pretraining", lengths)
        layer = (whole - head) // self.config.num_hidden_layers
        of = {"head": head, "layer": layer, "embeddings": 0} | self._of_modules(layer, sum(lengths))
        return tuple(of[part.kind] for part in self.parts)

    def _of_modules(self, layer: int, tokens: int) -> dict[str, int]:
        square = 2 * tokens * self.config.hidden_size**2
        wide = 2 * tokens * self.config.hidden_size * self.config.intermediate_size
        found = {"output.": wide, "intermediate.": wide, "attention.output.": square}
        return found | {"attention.self.": layer - sum(found.values())}

    def by_module(self) -> "Model":
        """The same model if the gradients of each module of a layer arrive by themselves, as a stock model's do."""
        modules = [
            Part(f"{layer.name}.{kind}", {name: layer.parameters[name] for name in _named(layer, names)}, kind)
            for layer in self.layers
            for kind, names in MODULES.items()
        ]
        return Model(self.config, (self.parts[0], *modules, self.parts[-1]))


def _named(layer: Part, names: Sequence[str]) -> list[str]:
    return [f"{layer.name}.{name}" for name in names]


def of(model: nn.Module) -> Model:
    """The parts of a BertForPreTraining, on any device. Tied weights count once.

    Raises:
        ValueError: the model has other parameters.
    """
    left = dict(model.named_parameters())
    expected = {*HEAD, *EMBEDDINGS}
    prefixes = [f"bert.encoder.layer.{i}." for i in reversed(range(model.config.num_hidden_layers))]
    expected |= {prefix + name for prefix in prefixes for name in LAYER}
    if expected != left.keys():
        raise ValueError(f"expected the parameters of a BertForPreTraining, got others: {sorted(expected ^ left.keys())[:3]}")
    layers = [Part(prefix.rstrip("."), {prefix + name: left[prefix + name] for name in LAYER}) for prefix in prefixes]
    head, embeddings = ({name: left[name] for name in names} for names in (HEAD, EMBEDDINGS))
    return Model(model.config, (Part("head", head, "head"), *layers, Part("embeddings", embeddings, "embeddings")))


def bert(name: str) -> Model:
    """ "BERT-base" or "BERT-large" with parameters that have no memory."""
    from transformers import BertConfig, BertForPreTraining

    from bench.models.workloads import CONFIGS

    with torch.device("meta"):
        return of(BertForPreTraining(BertConfig(**CONFIGS[name])))
