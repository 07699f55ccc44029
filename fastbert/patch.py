"""Put the fast classes into a model, and take them out again.

Patching a module sets its `__class__` to a subclass that overrides `forward`. Parameters, names, hooks, optimizer
references and `state_dict` are not touched, and going back is setting the class back.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from fastbert.errors import UnsupportedModelError

# fastbert.registry and fastbert.dispatch are imported inside the functions: they bring in triton, which reads
# TRITON_INTERPRET when it is first imported, and `python -m fastbert` must be able to set it after this import.

logger = logging.getLogger("fastbert")
Model = TypeVar("Model", bound=nn.Module)


# The switches that each patched model was given; `report` shows them.
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
) -> Model:
    """Swap the Triton kernels into `model`, in place, and return it.

    Outputs, losses and gradients stay those of the stock model at the same precision. Patching again replaces what
    the call before chose. A model that is patched on the CPU and moved to a GPU afterwards works; a call whose
    tensors no kernel takes runs stock code, and `fastbert.report` says why. With FASTBERT_DISABLE=1 in the
    environment nothing is changed.

    Args:
        model: a BertModel or BertFor*, or any module that holds one (PEFT, SentenceTransformer, CrossEncoder).
        attention: BertSelfAttention and BertCrossAttention, on `attention`, while the model's attention implementation
            is one of transformers' own (eager, SDPA, FlashAttention, flex attention), which goes on being named.
        residual_norm: BertSelfOutput and BertOutput, on `dropout_add_layernorm`.
        intermediate: BertIntermediate, on `bias_gelu`.
        mlm_head: BertPredictionHeadTransform, on `gelu_layernorm`, and the loss of BertForMaskedLM, BertForPreTraining
            and BertLMHeadModel, on `linear_cross_entropy`, from the positions that have a label.
        embeddings: BertEmbeddings, on `embedding_layernorm`.
        unpad: whether BertEncoder runs on the real tokens alone, packed before its first layer and unpacked after its
            last: "auto" where no output can show it (heads that read the first position only, and then the last layer
            runs for that position only), True everywhere, with zeros where padding is, False nowhere. One
            synchronisation a forward.
        mlm_logits: "full": outputs hold the logits, as stock's do. "none": training with labels gives None for them, and
            the head, with `unpad` the last layer too, runs for the positions that have a label only.
        strict: raise if any module that has a fast class (and is not switched off) would stay on stock code.
        untested: use the kernels also in place of forwards that fastbert was not tested against (a newer transformers, a
            forward replaced by hand), as they are now and for the rest of the process: for whoever has run
            `fastbert.verify(model, batch, untested=True)`. Such modules stay stock otherwise.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or a switch is not a bool.
        ValueError: `unpad` or `mlm_logits` is none of its values.
        UnsupportedModelError: nothing to patch, or `strict` and something would stay stock. The model is as before.
    """
    switches: dict[str, Any] = {
        "attention": attention,
        "residual_norm": residual_norm,
        "intermediate": intermediate,
        "mlm_head": mlm_head,
        "embeddings": embeddings,
    }
    _check_arguments(model, switches | {"strict": strict, "untested": untested}, unpad, mlm_logits)
    switches |= {"unpad": unpad, "mlm_logits": mlm_logits}
    if os.environ.get("FASTBERT_DISABLE", "0") not in ("", "0"):
        _log_disabled()
        return model

    classes, left_stock = _plan_classes(model, switches, untested)
    if strict and left_stock:
        raise UnsupportedModelError("strict=True, and these stay on stock code: " + "; ".join(left_stock))
    _swap_classes(classes)
    if untested:
        _accept(classes)
    _switches[model] = switches
    return model


def unpatch(model: Model) -> Model:
    """Give every patched module in `model` its stock class back, in place, and return the model.

    Nothing else changes; a model that was never patched comes back as it is.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    from fastbert.registry import BY_FAST

    _check_model(model)
    _swap_classes({module: BY_FAST[type(module)].stock for module in model.modules() if type(module) in BY_FAST})
    _switches.pop(model, None)
    return model


@contextmanager
def patched(model: Model, **keywords: object) -> Iterator[Model]:
    """`patch(model, **keywords)` for the length of a with block; then, also on an exception, all is as before it."""
    _check_model(model)
    before = {module: type(module) for module in model.modules()}
    switches_before = _switches.get(model)
    patch(model, **keywords)
    try:
        yield model
    finally:
        unpatch(model)
        _swap_classes(before)
        if switches_before is None:
            _switches.pop(model, None)
        else:
            _switches[model] = switches_before


def switches_of(model: nn.Module) -> dict[str, bool] | None:
    """The switches `model` was patched with; None when it was not patched as a whole."""
    return _switches.get(model)


def _plan_classes(model: nn.Module, switches: dict[str, Any], untested: bool) -> tuple[dict[nn.Module, type], list[str]]:
    """The class that each module should have, and a line for each that would stay stock against the switches."""
    from fastbert.registry import AUTO_PACKING, BY_FAST, BY_STOCK, MLM_HEADS, PACKING, encoders_with_a_reader

    classes: dict[nn.Module, type] = {}
    left_stock: list[str] = []
    mlm_logits = switches["mlm_logits"]
    with_a_reader = encoders_with_a_reader(model, switches["mlm_head"] and mlm_logits == "none")
    mlm_heads = {entry.stock: entry for entry in MLM_HEADS[mlm_logits]}
    for name, module in model.named_modules():
        entry = BY_STOCK.get(type(module)) or BY_FAST.get(type(module))
        if entry is None:
            continue
        entry = mlm_heads.get(entry.stock, entry)
        wanted = entry.wanted(switches)
        if entry.stock is PACKING.stock:
            entry = AUTO_PACKING if wanted == "auto" else PACKING
            wanted = module in with_a_reader if wanted == "auto" else wanted
        reason = None
        if wanted:
            reason = (entry.stock_reason if type(module) is entry.stock else entry.inactive_reason)(module, untested)
        classes[module] = entry.fast if wanted and reason is None else entry.stock
        if reason is not None and reason == entry.code.untested(strict=True):
            _log_untested(reason)
        if reason is not None and entry.kernel is not None:
            left_stock.append(f"{name} ({entry.stock.__name__}): {reason}")
    if not classes:
        raise _nothing_found(model)
    return classes, left_stock


def _swap_classes(classes: dict[nn.Module, type]) -> None:
    """Set the class of every module, or, if one refuses, of none. Whose class changes, its calls start at 0."""
    from fastbert.dispatch import class_forward_on_instance, clear_calls
    from fastbert.layers import layer_state

    before = {module: type(module) for module in classes}
    for module in classes:
        if class_forward_on_instance(module):  # which would go on being the former class's
            del vars(module)["forward"]
    try:
        for module, cls in classes.items():
            module.__class__ = cls
    except BaseException:
        for module, cls in before.items():
            module.__class__ = cls
        raise
    for module, cls in classes.items():
        if before[module] is not cls:
            clear_calls(module)
            layer_state.clear(module)
            replaced_forward = vars(module).get("_old_forward")  # where accelerate's hooks keep the forward that they give back
            if getattr(replaced_forward, "__func__", None) is before[module].forward:
                module._old_forward = MethodType(cls.forward, module)


def _accept(classes: dict[nn.Module, type]) -> None:
    """Count the code that the fast classes of `classes` stand in for as tested."""
    from fastbert import forwards
    from fastbert.layers.stock import CODE
    from fastbert.registry import BY_FAST

    for cls in {cls for cls in classes.values() if cls in BY_FAST}:
        forwards.accept(BY_FAST[cls].code)
    forwards.accept(CODE["eager attention"])


def _nothing_found(model: nn.Module) -> UnsupportedModelError:
    from fastbert.registry import MODEL_CLASSES

    family = getattr(getattr(model, "config", None), "model_type", None)
    found = type(model).__name__ + (f" (model type {family!r})" if family else "")
    return UnsupportedModelError(
        f"model: found {found}, which holds no BERT module that has a kernel; "
        f"supported are {', '.join(MODEL_CLASSES)} and whatever holds one of them"
    )


def _check_arguments(model: object, flags: dict[str, object], unpad: object, mlm_logits: object) -> None:
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


@cache
def _log_disabled() -> None:
    logger.warning("FASTBERT_DISABLE is set: fastbert.patch leaves every model as it is")


@cache
def _log_untested(reason: str) -> None:
    logger.warning(
        "%s: such modules stay on stock code. fastbert.verify(model, batch, untested=True) tells whether the kernels compute "
        "the same; then patch(model, untested=True) uses them.",
        reason,
    )
