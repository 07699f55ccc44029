"""The table of patchable modules: each stock class with its fast class, its kernel and the switch of `patch`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastbert import forwards, ops
from fastbert.dispatch import forward_replaced, kind_of
from fastbert.layers import (
    attention,
    embeddings,
    encoder,
    intermediate,
    layer,
    mlm_heads,
    model,
    pooled_heads,
    prediction_head,
    residual_norm,
)
from fastbert.layers.family import FAMILIES
from fastbert.layers.stock import CODE, part_of, stock_class


@dataclass(frozen=True)
class Entry:
    """A stock class and its fast subclass.

    stock, fast: the stock class, and the subclass that replaces it.
    kernel: the names of the ops that it launches, for the report; None if it launches nothing itself.
    switch: the argument of `patch` that controls it.
    unsupported: unsupported(module) is the reason why that module must stay stock, or None.
    switches: all the arguments that must be on, if there are several.
    own_code: the stock functions that it replaces or depends on, if they are not in `CODE`.
    """

    stock: type[nn.Module]
    fast: type[nn.Module]
    kernel: str | None
    switch: str
    unsupported: Callable[[nn.Module], str | None]
    switches: tuple[str, ...] = ()
    own_code: forwards.Code | None = None

    def wanted(self, switches: dict[str, Any]) -> Any:
        """The value of the switch; with several, whether all are on."""
        return all(switches[name] for name in self.switches) if self.switches else switches[self.switch]

    def disabled_switch(self, switches: dict[str, Any]) -> str:
        """The switch that is off."""
        return next((name for name in self.switches if not switches[name]), self.switch)

    def stock_reason(self, module: nn.Module, untested: bool = False) -> str | None:
        """Why a stock `module` would not use the kernel if it got the fast class, or None.

        With `untested`, the stock code need not be one that fastbert was tested against.
        """
        if ops.MISSING:  # first, because kernels that cannot be imported have limits of 0
            return ops.MISSING
        if forward_replaced(module):  # accelerate's hooks do that, and keep the stock forward to call
            return "its forward was replaced on the module itself"
        return self.inactive_reason(module, untested)

    def inactive_reason(self, module: nn.Module, untested: bool = False) -> str | None:
        """Like `stock_reason`, for a module that may already have the fast class."""
        reason = None if untested else self.code.untested(strict=True)
        return reason or self.unsupported(module)

    @property
    def code(self) -> forwards.Code:
        """The stock functions that the fast class replaces or depends on."""
        return self.own_code or CODE[self.stock.__name__]


# The layer op launches the kernels of these ops.
LAYER = "attention, dropout_add_layernorm, bias_gelu"
_INSIDE_LAYERS = ("attention", "residual_norm", "intermediate")


def _entries(
    fast: dict[str, type[nn.Module]],
    kernel: str | None,
    switch: str,
    unsupported: Callable[[nn.Module], str | None] = lambda module: None,
    switches: tuple[str, ...] = (),
) -> tuple[Entry, ...]:
    """The entries of fast classes, given by name."""
    return tuple(Entry(stock_class(name), cls, kernel, switch, unsupported, switches) for name, cls in fast.items())


def _of(part: str, fast: dict[str, Any]) -> dict[str, type[nn.Module]]:
    return {name: cls for name, cls in fast.items() if cls.PART.part == part}


ENTRIES = (
    *_entries(embeddings.FAST, "embedding_layernorm", "embeddings", embeddings.unsupported),
    *_entries(attention.FAST, "attention", "attention", attention.unsupported),
    *_entries(residual_norm.FAST, "dropout_add_layernorm", "residual_norm", residual_norm.unsupported),
    *_entries(layer.FAST, LAYER, "attention", switches=_INSIDE_LAYERS),
    *_entries(_of("Intermediate", intermediate.FAST), "bias_gelu", "intermediate", intermediate.unsupported),
    *_entries(
        _of("DiscriminatorPredictions", intermediate.FAST), "bias_gelu", "intermediate", intermediate.discriminator_unsupported
    ),
    *_entries(prediction_head.FAST, "gelu_layernorm", "mlm_head", prediction_head.unsupported),
    # It makes masks and launches nothing itself, so the report omits it.
    *_entries(model.FAST, None, "attention"),
)


def _encoders(namespace: type) -> dict[type[nn.Module], Entry]:
    """The entries of the encoders that pack, by stock class."""
    fast = {name: cls for name, cls in vars(namespace).items() if isinstance(cls, type)}
    return {entry.stock: entry for entry in _entries(fast, "gather_rows", "unpad", encoder.unsupported)}


# For unpad=True, and for unpad="auto" with a head that says what it reads.
PACKING, AUTO_PACKING = _encoders(encoder.Always), _encoders(encoder.Unseen)
PACKING_CLASSES = frozenset(entry.fast for entries in (PACKING, AUTO_PACKING) for entry in entries.values())
# Heads that say what they read. They launch nothing themselves.
POOLED_HEADS = _entries(pooled_heads.FAST, None, "unpad")
# Per value of mlm_logits.
MLM_HEADS = {
    value: _entries(
        {name: getattr(fast, name) for name in mlm_heads.NAMES}, "linear_cross_entropy", "mlm_head", mlm_heads.unsupported
    )
    for value, fast in (("full", mlm_heads.Full), ("none", mlm_heads.WithoutLogits))
}
# Keyed by exact type: a user's subclass may override forward.
BY_STOCK = {entry.stock: entry for entry in (*ENTRIES, *PACKING.values(), *POOLED_HEADS, *MLM_HEADS["full"])}
BY_FAST = {
    entry.fast: entry
    for entry in (
        *(*ENTRIES, *PACKING.values(), *AUTO_PACKING.values()),
        *(*POOLED_HEADS, *MLM_HEADS["full"], *MLM_HEADS["none"]),
    )
}

# Parts that compute something but have no kernel; `report` lists them for completeness.
STOCK_ONLY = tuple(family["Pooler"] for family in FAMILIES if family.find("Pooler"))


def sentence_transformers() -> Any | None:
    """The module with the fast classes for sentence-transformers, whose entries are in the tables then; None if that library
    is not imported, so no module of its classes exists."""
    if "sentence_transformers" not in sys.modules:
        return None
    from fastbert.integrations import sentence_transformers as integration

    for stock_cls, fast, kernel in integration.CLASSES:
        if fast not in BY_FAST:
            code = integration.CODE[stock_cls.__name__]
            entry = Entry(stock_cls, fast, kernel, "unpad", lambda module: None, own_code=code)
            BY_STOCK[stock_cls] = BY_FAST[fast] = entry
    return integration


def pooled_modules(model: nn.Module) -> set[nn.Module]:
    """The Transformers of sentence-transformers in `model` that a Pooling follows, and those poolings."""
    integration = sentence_transformers()
    pairs = {} if integration is None else integration.pairs(model)
    return {*pairs, *pairs.values()}


def encoders_with_a_reader(model: nn.Module, mlm: bool) -> set[nn.Module]:
    """The encoders in `model` whose head reads only some positions, or a pooling; MLM heads count if `mlm`."""
    entries = (*POOLED_HEADS, *(entry for heads in MLM_HEADS.values() if mlm for entry in heads))
    heads = {cls for entry in entries for cls in (entry.stock, entry.fast)}
    bodies = (encoder.body_of(module) for module in model.modules() if kind_of(module) in heads)
    found = {body_encoder for body in bodies if (body_encoder := encoder.encoder_of(body)) is not None}
    pooled = (module for transformer in pooled_modules(model) for module in transformer.modules())
    return found | {module for module in pooled if kind_of(module) in PACKING or kind_of(module) in PACKING_CLASSES}


@cache
def model_classes() -> tuple[type[nn.Module], ...]:
    """The models that `patch` supports: of each family the bare model and the models with a head that transformers has."""
    return tuple(
        cls
        for family in FAMILIES
        if family.module is not None
        for name, cls in vars(family.module).items()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and (found := part_of(cls)).family is family
        if not found.fast and (found.part in ("Model", "LMHeadModel") or found.part.startswith("For"))
    )


def families_text() -> str:
    """The supported families and how their models are called, for messages."""
    names = [
        f"{family.title} ({family.prefix}Model, {family.prefix}For...)" for family in FAMILIES if family.module is not None
    ]
    return ", ".join(names)


def families_table() -> list[list[str]]:
    """Per supported family, for the docs: its name, its model, its heads, which of them `unpad="auto"` packs for, and which
    compute their loss from the labelled rows. Heads are named by what follows the family's prefix and "For"."""
    packing = {entry.stock for entry in POOLED_HEADS}
    losses = {entry.stock for entry in MLM_HEADS["full"]}
    rows = []
    for family in (family for family in FAMILIES if family.module is not None):
        heads = {cls: part_of(cls).part for cls in model_classes() if part_of(cls).family is family}
        columns = [[name for cls, name in heads.items() if cls in chosen] for chosen in (heads, packing, losses)]
        named = [", ".join(sorted(name.removeprefix("For") for name in names if name != "Model")) for names in columns]
        rows.append([family.title, f"`{family.name('Model')}`", *named])
    return rows
