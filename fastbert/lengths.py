"""Passes row lengths that the host knows to the padding-free encoder, so that it need not wait for the device to count."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastbert.patch import _check_model, switches_of


@contextmanager
def lengths(
    model: nn.Module,
    lengths: Sequence[int] | None = None,
    *,
    read: Sequence[int] | None = None,
    bucket: int = 1,
    token_budget: int | None = None,
    read_budget: int | None = None,
) -> Iterator[None]:
    """Within the block, calls of the patched `model` pack by these counts instead of counting on the device.

    With `lengths` a forward has no synchronisation (an MLM head that trains with labels also needs `read`). With budgets
    its shapes do not depend on the batch: torch.compile compiles it once, and a CUDA graph can capture it. Counts are
    checked on the device; a count that is too small fails a device assertion, so no token is dropped silently.

    Args:
        model: a model patched with `unpad="auto"` or `unpad=True`.
        lengths: the number of tokens (ones in the attention mask) per row of the batch, each from 0 to S; for multiple
            choice, per choice of each row.
        read: the number of positions that the head reads per row: those with a label other than -100 (after the shift of
            a causal loss), and also the first position for BertForPreTraining.
        bucket: round the packed rows given by `lengths` and `read` up to a multiple of this, so that few shapes occur.
            The added rows are zeros and contribute nothing.
        token_budget: the number of packed rows, instead of `lengths`; at least the number of tokens.
        read_budget: the number of read rows, instead of `read`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no encoder that packs; a count or budget below 0 or a bucket below 1; no counts and no
            budget given. The model call raises it if the number of lengths is not the number of rows in the batch.
    """
    from fastbert.layers.counts import CallerCounts

    encoders = packing_encoders(model)
    if not encoders:
        raise ValueError(
            f"model: expected one whose encoder packs (unpad=True, or unpad='auto' and a head that reads some positions "
            f"only), got {type(model).__name__} without"
        )
    for name, value, least in (("bucket", bucket, 1), ("token_budget", token_budget, 0), ("read_budget", read_budget, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")
    if lengths is None and token_budget is None and read is None and read_budget is None:
        raise ValueError("lengths: expected the tokens of each row, or a token_budget, got neither")
    counts = CallerCounts(_counts("lengths", lengths), _counts("read", read), bucket, token_budget, read_budget)
    with _told(encoders, counts):
        yield


@contextmanager
def known_lengths(model: nn.Module, lengths: Sequence[int] | None) -> Iterator[None]:
    """As `lengths`, for a caller that does not know its model: nothing happens if the model does not pack.

    Nor does it inside a block of `lengths`, whose counts stay, or for a compiled model, which would be compiled for each batch.
    """
    from fastbert.layers.counts import CallerCounts

    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) or torch.compiler.is_compiling()
    encoders = [] if lengths is None or compiled else packing_encoders(model)
    if any(encoder.caller_counts is not None for encoder in encoders):
        encoders = []
    with _told(encoders, CallerCounts(_counts("lengths", lengths))):
        yield


@contextmanager
def _told(encoders: list[nn.Module], counts: object) -> Iterator[None]:
    before = [vars(encoder).get("caller_counts") for encoder in encoders]
    try:
        for encoder in encoders:
            # torch declares that modules hold tensors and modules alone.
            encoder.caller_counts = counts  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for encoder, former in zip(encoders, before, strict=True):
            if former is None:
                del encoder.caller_counts
            else:
                encoder.caller_counts = former


class Counted(list[int]):
    """The counts made by `LengthsCollator`. Its type tells them from a user's column of the same name, which is ignored."""


@dataclass(frozen=True)
class LengthsCollator:
    """A collator that adds row lengths to its batches, so that forwards of a patched model need no synchronisation.

    It adds `lengths` and, if there are token labels, `read_lengths`: lists of integers, which the model's forward takes
    as keywords. A stock model ignores them.

    Args:
        collator: any collator that returns an `attention_mask`; the rest of its batch is left unchanged.
        causal: the model shifts its labels by one, as BertLMHeadModel does.
    """

    collator: Callable[[list[Any]], MutableMapping[str, Any]]
    causal: bool = False

    def __call__(self, features: list[Any]) -> MutableMapping[str, Any]:
        batch = self.collator(features)
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if mask is not None:
            batch["lengths"] = Counted(mask.flatten(0, -2).sum(1).tolist())
        if isinstance(labels, Tensor) and mask is not None and labels.dim() == 2 and labels.shape == mask.shape:
            read = labels != -100
            if self.causal:
                read = read.roll(-1, 1)
                read[:, -1:] = False
            if "next_sentence_label" in batch:
                read = read.clone()
                read[:, :1] = True
            batch["read_lengths"] = Counted(read.sum(1).tolist())
        return batch


# Per model: its switches when its encoders were looked up, and the encoders that pack.
_encoders: WeakKeyDictionary[nn.Module, tuple[object, list[ReferenceType[nn.Module]]]] = WeakKeyDictionary()


def packing_encoders(model: nn.Module) -> list[nn.Module]:
    """The encoders of `model` that pack: none if it is stock, or was patched without.

    Raises:
        TypeError: `model` is not a module.
    """
    from fastbert.dispatch import kind_of
    from fastbert.registry import PACKING_CLASSES

    _check_model(model)
    patched_with, known = _encoders.get(model, (None, []))
    alive = [encoder for reference in known if (encoder := reference()) is not None]
    found = [encoder for encoder in alive if kind_of(encoder) in PACKING_CLASSES]
    if not found or len(found) != len(known) or patched_with is not switches_of(model):  # do not search in every step
        found = [module for module in model.modules() if kind_of(module) in PACKING_CLASSES]
        _encoders[model] = switches_of(model), [ref(encoder) for encoder in found]
    return found


def _counts(name: str, numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    if numbers is None:
        return None
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{name}: expected integers from 0 on, got {numbers}")
    return tuple(numbers)
