"""The parameter groups that a script for BERT builds by hand."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")
# What from_pretrained fills; everything beside it in a BertFor* is the head. The pretrained language-model head counts
# as body: it is not fresh.
_BODY = re.compile(r"(?:^|\.)(?:embeddings|encoder|pooler)\.")
_PRETRAINED_HEAD = re.compile(r"(?:^|\.)cls\.(?:predictions|seq_relationship)\.")
# What transformers' Trainer leaves out, beside what is in a LayerNorm: Trainer.get_decay_parameter_names, the same in all
# releases from 5.0 on. Its own is not called, for importing it takes seconds.
_NEVER_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    head_lr: float | None = None,
    layer_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: no decay for biases and norms, a rate for the head, rates that fall with depth.

    A tied weight comes once, with the body of the model it belongs to; frozen parameters are left out. Each group has
    "params", "lr" and "weight_decay", and "name" says what it holds, such as "layer 3, no decay".

    Args:
        model: a BertFor*, or any module; wrappers (DDP, PEFT, SentenceTransformer) may stand around it.
        lr: of the body, and of the head without `head_lr`.
        weight_decay: of every parameter that decays.
        head_lr: of what from_pretrained left freshly initialised: everything but embeddings, encoder, pooler and the
            pretraining heads (cls.predictions, cls.seq_relationship).
        layer_decay: in (0, 1]: the last encoder layer and the pooler get `lr`, each layer below it `layer_decay` times
            the rate above, the embeddings `layer_decay` times that of layer 0. Heads do not decay.
        no_decay: the last parts of names ("bias" is any parameter of that name, "LayerNorm.weight" those of a module
            so called) that get no weight decay, and all others do. By default those decay that transformers' Trainer
            decays: none in an nn.LayerNorm, and none whose name, in any case, contains "bias", "layernorm" or "rmsnorm"
            or has a part that is "norm" or ends with "_norm".

    Raises:
        TypeError: `model` is no module, `no_decay` is one string.
        ValueError: a rate or decay out of range; nothing to train; `head_lr` without a head; `layer_decay` without
            encoder layers.
    """
    _check(model, lr, weight_decay, head_lr, layer_decay, no_decay)
    # named_parameters gives a shared tensor once, under the first of its names: BERT's decoder weight is the embedding.
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError(f"model: expected a parameter that requires a gradient, {type(model).__name__} has none")
    depths = [int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name))]
    if layer_decay is not None and not depths:
        raise ValueError(f"layer_decay: expected encoder layers (encoder.layer.0. ...), {type(model).__name__} has none")
    if head_lr is not None and not any(_is_head(name) for name, _ in named):
        raise ValueError(f"head_lr: expected parameters beside the pretrained ones, {type(model).__name__} has none")

    without_decay = _without_decay(model, no_decay)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        part, rate = _part(name, lr, head_lr, layer_decay, max(depths, default=0))
        decays = name not in without_decay
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
                "name": part if decays else f"{part}, no decay",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _without_decay(model: nn.Module, no_decay: Sequence[str] | None) -> set[str]:
    """The names of the parameters that get no weight decay."""
    names = [name for name, _ in model.named_parameters()]
    if no_decay is not None:
        return {name for name in names if any(name == end or name.endswith("." + end) for end in no_decay)}
    norms = [(at, norm) for at, norm in model.named_modules(remove_duplicate=False) if isinstance(norm, nn.LayerNorm)]
    inside = {name for at, norm in norms for name, _ in norm.named_parameters(at, remove_duplicate=False)}
    return inside | {name for name in names if _NEVER_DECAYED.search(name)}


def _part(name: str, lr: float, head_lr: float | None, layer_decay: float | None, last: int) -> tuple[str, float]:
    """What the parameter belongs to, as far as rates tell parts apart, and its rate."""
    if _is_head(name):
        return ("body", lr) if head_lr is None and layer_decay is None else ("head", lr if head_lr is None else head_lr)
    if layer_decay is None:
        return "body", lr
    if found := _LAYER.search(name):
        return f"layer {found[1]}", lr * layer_decay ** (last - int(found[1]))
    if "embeddings." in name:
        return "embeddings", lr * layer_decay ** (last + 1)
    return "top", lr


def _is_head(name: str) -> bool:
    return not _BODY.search(name) and not _PRETRAINED_HEAD.search(name)


def _check(
    model: object, lr: float, weight_decay: float, head_lr: float | None, layer_decay: float | None, no_decay: object
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay: expected a sequence of names, got the string {no_decay!r}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("head_lr", head_lr)):
        if value is not None and not value >= 0.0:
            raise ValueError(f"{name}: expected 0 or more, got {value!r}")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay: expected a factor in (0, 1], got {layer_decay!r}")
