"""Patches and unpatches a model: `patch`, `unpatch` and the context manager `patched`.

Patching a module sets its `__class__` to a subclass that overrides `forward`. Parameters, names, hooks, optimizer
references and `state_dict` are not touched. Unpatching sets the class back.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from fastbert.errors import UnsupportedModelError

# fastbert.registry and fastbert.dispatch are imported inside the functions: they import triton, which reads
# TRITON_INTERPRET at its first import, and `python -m fastbert` must be able to set it after this import.

logger = logging.getLogger("fastbert")
Model = TypeVar("Model", bound=nn.Module)


# The switches with which each model was patched; `report` shows them.
_switches: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def patch(
    model: Model,
    *,
    attention: bool = True,
    residual_norm: bool = True,
    intermediate: bool = True,
    mlm_head: bool = True,
    embeddings: bool = True,
    unpad: bool | str = "auto",
    mlm_logits: str = "full",
    strict: bool = False,
    untested: bool = False,
    cuda_graphs: bool = False,
) -> Model:
    """Patch `model` in place to use the Triton kernels, and return it.

    Outputs, losses and gradients stay those of the stock model at the same precision. Patching again replaces the
    previous switches. A model may be patched on the CPU and moved to a GPU afterwards. A call whose tensors no kernel
    takes falls back to stock code, and `fastbert.report` says why. With FASTBERT_DISABLE=1 in the environment, `patch`
    changes nothing.

    Args:
        model: a BertModel or BertFor*, the like of another family with BERT's encoder (RoBERTa, XLM-RoBERTa, CamemBERT,
            Data2VecText, ELECTRA, ERNIE, DistilBERT), or any module that contains one (PEFT, SentenceTransformer,
            CrossEncoder). BERT's class names below stand for those of every family.
        attention: run BertSelfAttention and BertCrossAttention on the `attention` kernel, if the model's attention
            implementation is one of transformers' own (eager, SDPA, FlashAttention, flex attention). The config keeps
            naming that implementation.
        residual_norm: run BertSelfOutput and BertOutput on `dropout_add_layernorm`.
        intermediate: run BertIntermediate on `bias_gelu`.
        mlm_head: run BertPredictionHeadTransform on `gelu_layernorm`, and compute the loss of BertForMaskedLM,
            BertForPreTraining and BertLMHeadModel with `linear_cross_entropy` from the positions that have a label.
        embeddings: run BertEmbeddings on `embedding_layernorm`.
        unpad: run BertEncoder on the real tokens only, packed before its first layer and unpacked after its last.
            "auto": only if no output shows it, that is for heads that read nothing but the first position (the last
            layer then runs for that position only) and before a Pooling of sentence-transformers, which takes packed rows.
            True: always, with zeros at padded positions. False: never. Packing takes one synchronisation per forward.
        mlm_logits: "full": outputs hold the logits, as in stock. "none": training with labels returns None for them, and
            the head, and with `unpad` also the last layer, runs only for the positions that have a label.
        strict: raise if any module that has a fast class (and is not switched off) would stay on stock code.
        untested: use the kernels also in place of forwards that fastbert was not tested against (a newer transformers, a
            replaced forward), as they are now and for the rest of the process; check the model with
            `fastbert.verify(model, batch, untested=True)` before. By default such modules stay on stock code.
        cuda_graphs: replay inference from CUDA graphs, as `fastbert.graphed(model)` does with its defaults.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or a switch is not a bool.
        ValueError: `unpad` or `mlm_logits` has an unknown value.
        UnsupportedModelError: there is nothing to patch, or with `strict` a module would stay stock. The model is unchanged.
    """
    switches: dict[str, Any] = {
        "attention": attention,
        "residual_norm": residual_norm,
        "intermediate": intermediate,
        "mlm_head": mlm_head,
        "embeddings": embeddings,
    }
    flags = {"strict": strict, "untested": untested, "cuda_graphs": cuda_graphs}
    _check_arguments(model, switches | flags, unpad, mlm_logits)
    switches |= {"unpad": unpad, "mlm_logits": mlm_logits}
    if is_disabled():
        return model

    classes, left_stock = _plan_classes(model, switches, untested)
    if strict and left_stock:
        raise UnsupportedModelError("strict=True, and these stay on stock code: " + "; ".join(left_stock))
    roots = _roots(model) if cuda_graphs else []
    _take_graphs(model)
    _swap_classes(classes)
    _link_poolings(model)
    if untested:
        _accept(classes)
    _give_graphs(roots)
    _switches[model] = switches
    return model


def unpatch(model: Model) -> Model:
    """Restore the stock class of every patched module in `model`, in place, and return the model.

    Nothing else changes. A model that was never patched is returned unchanged.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    from fastbert.dispatch import kind_of
    from fastbert.registry import BY_FAST, sentence_transformers

    _check_model(model)
    _take_graphs(model)
    sentence_transformers()
    _swap_classes({module: BY_FAST[kind].stock for module in model.modules() if (kind := kind_of(module)) in BY_FAST})
    _switches.pop(model, None)
    _link_poolings(model)
    return model


@contextmanager
def patched(model: Model, **keywords: Any) -> Iterator[Model]:
    """Context manager: `patch(model, **keywords)` within the block; afterwards, even on an exception, as before it."""
    _check_model(model)
    from fastbert.dispatch import kind_of
    from fastbert.graphs import classes

    before = {module: kind_of(module) for module in model.modules()}
    graphs_before = classes.all_options(model)
    switches_before = _switches.get(model)
    patch(model, **keywords)
    try:
        yield model
    finally:
        unpatch(model)
        _swap_classes(before)
        _link_poolings(model)
        for root, options in graphs_before.items():
            classes.set_graphs(root, options)
        if switches_before is None:
            _switches.pop(model, None)
        else:
            _switches[model] = switches_before


def switches_of(model: nn.Module) -> dict[str, bool] | None:
    """The switches with which `model` was patched, or None if it was not patched as a whole."""
    return _switches.get(model)


def _plan_classes(model: nn.Module, switches: dict[str, Any], untested: bool) -> tuple[dict[nn.Module, type], list[str]]:
    """The class that each module should have, and one line per module that stays stock although its switch is on."""
    from fastbert.dispatch import kind_of
    from fastbert.registry import AUTO_PACKING, BY_FAST, BY_STOCK, MLM_HEADS, PACKING, encoders_with_a_reader, pooled_modules

    classes: dict[nn.Module, type] = {}
    left_stock: list[str] = []
    found = False
    mlm_logits = switches["mlm_logits"]
    with_a_reader = encoders_with_a_reader(model, switches["mlm_head"] and mlm_logits == "none")
    pooled = pooled_modules(model)
    mlm_heads = {entry.stock: entry for entry in MLM_HEADS[mlm_logits]}
    for name, module in model.named_modules():
        entry = BY_STOCK.get(kind_of(module)) or BY_FAST.get(kind_of(module))
        if entry is None:
            continue
        found = found or entry.own_code is None
        entry = mlm_heads.get(entry.stock, entry)
        wanted = entry.wanted(switches)
        if entry.stock in PACKING:
            entry = (AUTO_PACKING if wanted == "auto" else PACKING)[entry.stock]
            wanted = module in with_a_reader if wanted == "auto" else wanted
        elif entry.own_code is not None:  # of sentence-transformers
            wanted = wanted and module in pooled
        reason = None
        if wanted:
            reason = (entry.stock_reason if kind_of(module) is entry.stock else entry.inactive_reason)(module, untested)
        classes[module] = entry.fast if wanted and reason is None else entry.stock
        if reason is not None and reason == entry.code.untested(strict=True):
            _log_untested(reason)
        if reason is not None and entry.kernel is not None:
            left_stock.append(f"{name} ({entry.stock.__name__}): {reason}")
    if not found:
        raise _nothing_found(model)
    return classes, left_stock


def _link_poolings(model: nn.Module) -> None:
    """Tell the fast Transformers of sentence-transformers which pooling reads their output."""
    from fastbert.registry import sentence_transformers

    if (integration := sentence_transformers()) is not None:
        integration.link(model)


def _roots(model: nn.Module) -> list[nn.Module]:
    from fastbert.graphs.classes import checked_roots

    return checked_roots(model)


def _give_graphs(roots: list[nn.Module]) -> None:
    """Let the forwards of these models be replayed, with the default options."""
    from fastbert.graphs.classes import set_graphs
    from fastbert.graphs.options import Options

    for root in roots:
        set_graphs(root, Options())


def _take_graphs(model: nn.Module) -> None:
    """Let no forward in `model` be replayed any more."""
    from fastbert.graphs import classes

    for module in classes.graphed_modules(model):
        classes.set_graphs(module, None)


def _swap_classes(classes: dict[nn.Module, type]) -> None:
    """Set the class of every module, or of none if one assignment fails. If any changes, all tallies start again."""
    from fastbert.dispatch import class_forward_on_instance, clear_calls, kind_of, set_kind
    from fastbert.layers import layer_state

    before = {module: type(module) for module in classes}
    kinds = {module: kind_of(module) for module in classes}
    for module in classes:
        if class_forward_on_instance(module):  # it would keep the former class's forward
            del vars(module)["forward"]
    try:
        for module, cls in classes.items():
            set_kind(module, cls)
    except BaseException:
        for module, cls in before.items():
            module.__class__ = cls
        raise
    changed = {module: cls for module, cls in classes.items() if kinds[module] is not cls}
    if changed:
        for module in classes:  # also those that keep their class: their calls were counted beside other modules
            clear_calls(module)
    for module, cls in changed.items():
        layer_state.clear(module)
        replaced_forward = vars(module).get("_old_forward")  # accelerate's hooks restore this forward
        if getattr(replaced_forward, "__func__", None) is before[module].forward:
            # torch declares that modules hold tensors and modules alone.
            module._old_forward = MethodType(cls.forward, module)  # pyright: ignore[reportArgumentType]


def _accept(classes: dict[nn.Module, type]) -> None:
    """Treat the stock code behind the fast classes in `classes` as tested."""
    from fastbert import forwards
    from fastbert.layers.stock import CODE
    from fastbert.registry import BY_FAST

    for cls in {cls for cls in classes.values() if cls in BY_FAST}:
        forwards.accept(BY_FAST[cls].code)
    forwards.accept(CODE["eager attention"])


def _nothing_found(model: nn.Module) -> UnsupportedModelError:
    from fastbert.registry import families_text

    family = getattr(getattr(model, "config", None), "model_type", None)
    found = type(model).__name__ + (f" (model type {family!r})" if family else "")
    return UnsupportedModelError(
        f"model: found {found}, which contains no module that has a kernel; supported are the models of {families_text()}, and "
        "modules that contain one of them"
    )


def _check_arguments(model: object, flags: Mapping[str, object], unpad: object, mlm_logits: object) -> None:
    _check_model(model)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    if not (unpad == "auto" or isinstance(unpad, bool)):
        raise ValueError(f"unpad: expected 'auto', True or False, got {unpad!r}")
    if mlm_logits not in ("full", "none"):
        raise ValueError(f"mlm_logits: expected 'full' or 'none', got {mlm_logits!r}")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def is_disabled() -> bool:
    """Whether FASTBERT_DISABLE is set, by which fastbert leaves every model as it is. Logs it once."""
    disabled = os.environ.get("FASTBERT_DISABLE", "0") not in ("", "0")
    if disabled:
        _log_disabled()
    return disabled


@cache
def _log_disabled() -> None:
    logger.warning("FASTBERT_DISABLE is set: fastbert.patch leaves every model as it is")


@cache
def _log_untested(reason: str) -> None:
    logger.warning(
        "%s: such modules stay on stock code. fastbert.verify(model, batch, untested=True) checks whether the kernels compute "
        "the same; patch(model, untested=True) then uses them.",
        reason,
    )
