"""Builds optimizer parameter groups for BERT and its like: weight decay, a head learning rate, layer-wise rate decay."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:encoder|transformer)\.layer\.(\d+)\.")  # the second is DistilBERT's
# from_pretrained fills these; the other parameters of a model with a head are the head. The pretraining heads count as body,
# because they are not freshly initialised.
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings(?:_project)?\.")  # the second projects those of a small ELECTRA
_BODY = re.compile(r"(?:^|\.)(?:embeddings|embeddings_project|encoder|transformer\.layer|pooler)\.")
_PRETRAINED_HEAD = re.compile(
    r"(?:^|\.)(?:cls\.(?:predictions|seq_relationship)|lm_head|generator_predictions|generator_lm_head"
    r"|discriminator_predictions|vocab_(?:transform|layer_norm|projector))\."
)
# The names that transformers' Trainer excludes from weight decay, besides parameters of a LayerNorm. It copies
# Trainer.get_decay_parameter_names, which is the same in every 5.x release, because importing Trainer takes seconds.
_NEVER_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    head_lr: float | None = None,
    layer_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: no weight decay for biases and norms, a head rate, rates by depth.

    A tied weight appears once, in the group of the body. Frozen parameters are left out.

    Args:
        model: a model with a head, or any module; it may be wrapped (DDP, PEFT, SentenceTransformer).
        lr: the learning rate of the body, and of the head unless `head_lr` is given.
        weight_decay: the weight decay of every parameter that decays.
        head_lr: the learning rate of freshly initialised parameters: all but embeddings, encoder, pooler and the
            pretraining heads (BERT's cls.predictions and cls.seq_relationship, RoBERTa's lm_head, ELECTRA's generator
            and discriminator, DistilBERT's vocab_transform, vocab_layer_norm and vocab_projector).
        layer_decay: a factor in (0, 1]. The last encoder layer and the pooler get `lr`, each lower layer gets
            `layer_decay` times the rate of the layer above it, and the embeddings `layer_decay` times that of layer 0.
            It does not apply to heads.
        no_decay: name suffixes of the parameters without weight decay; all others decay. "bias" matches every parameter
            of that name, "LayerNorm.weight" those of every module called LayerNorm. The default is that of transformers'
            Trainer: no decay in an nn.LayerNorm, and none for names that contain "bias", "layernorm" or "rmsnorm" (in
            upper or lower case) or have a part that is "norm" or ends with "_norm".

    Returns:
        One dictionary per group with "params", "lr", "weight_decay" and a "name" such as "layer 3, no decay".

    Raises:
        TypeError: `model` is not a module, or `no_decay` is a string.
        ValueError: a rate or decay is out of range; nothing to train; `head_lr` without a head; `layer_decay` without
            encoder layers.
    """
    _check(model, lr, weight_decay, head_lr, layer_decay, no_decay)
    # named_parameters yields a shared tensor once, under its first name: BERT's tied decoder weight is the embedding.
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
    modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules(remove_duplicate=False))
    norms = [(at, norm) for at, norm in modules if isinstance(norm, nn.LayerNorm)]
    inside = {name for at, norm in norms for name, _ in norm.named_parameters(at, remove_duplicate=False)}
    return inside | {name for name in names if _NEVER_DECAYED.search(name)}


def _part(name: str, lr: float, head_lr: float | None, layer_decay: float | None, last: int) -> tuple[str, float]:
    """The name of the part that shares a rate with this parameter, and that rate."""
    if _is_head(name):
        return ("body", lr) if head_lr is None and layer_decay is None else ("head", lr if head_lr is None else head_lr)
    if layer_decay is None:
        return "body", lr
    if found := _LAYER.search(name):
        return f"layer {found[1]}", lr * layer_decay ** (last - int(found[1]))
    if _EMBEDDINGS.search(name):
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
