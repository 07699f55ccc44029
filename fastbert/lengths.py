"""What the host knows of a batch, told to the padding-free encoder so that it need not wait for the device to count."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

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
    """Within the block, calls of the patched `model` pack by these numbers instead of counting on the device.

    With `lengths` a forward has no synchronisation (an MLM head that trains by labels needs `read` as well). With
    budgets its shapes do not depend on the batch at all: torch.compile compiles it once, a CUDA graph can hold it. A
    number that is too small stops the device with an assertion; nothing is left out silently.

    Args:
        model: patched, with `unpad` "auto" or True.
        lengths: for each row of the batch (of a multiple choice: for each choice of each row) the number of tokens, that
            is of ones in its mask; from 0 to S.
        read: for each row the number of positions that are read: those with a label that counts (for a causal loss after
            shifting), and for BertForPreTraining the first position too.
        bucket: with `lengths` and `read`: the rows that are packed are rounded up to a multiple of this, so that few
            shapes repeat. What is added are zeros, of which nothing comes out.
        token_budget: the number of rows to pack into, in place of `lengths`: at least as many as there are tokens.
        read_budget: the same in place of `read`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` has no encoder that packs; a number below 0, a bucket below 1; neither lengths nor a budget.
            In the call: as many lengths as the batch has no rows.
    """
    from fastbert.layers.counts import CallerCounts

    encoders = _packing_encoders(model)
    for name, value, least in (("bucket", bucket, 1), ("token_budget", token_budget, 0), ("read_budget", read_budget, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")
    if lengths is None and token_budget is None and read is None and read_budget is None:
        raise ValueError("lengths: expected the tokens of each row, or a token_budget, got neither")
    counts = CallerCounts(_counts("lengths", lengths), _counts("read", read), bucket, token_budget, read_budget)
    before = [vars(encoder).get("caller_counts") for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.caller_counts = counts
        yield
    finally:
        for encoder, former in zip(encoders, before, strict=True):
            if former is None:
                del encoder.caller_counts
            else:
                encoder.caller_counts = former


class Counted(list):
    """What `LengthsCollator` counted. A column of a user's own that has the same name is none, and stays unread."""


@dataclass(frozen=True)
class LengthsCollator:
    """A collator whose batches say how long their rows are: forwards of a patched model then need no synchronisation.

    It adds `lengths` (and, where there are token labels, `read_lengths`), lists of integers that the model's forward
    takes as keywords; a model that is not patched ignores them.

    Args:
        collator: any collator that makes an `attention_mask`; what it returns is otherwise left as it is.
        causal: labels are shifted by one, as BertLMHeadModel's are.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    causal: bool = False

    def __call__(self, features: list[Any]) -> Mapping[str, Any]:
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


# By model: what it was patched with when its encoders were looked for, and those that pack.
_encoders: WeakKeyDictionary[nn.Module, tuple[object, list[ReferenceType[nn.Module]]]] = WeakKeyDictionary()


def _packing_encoders(model: nn.Module) -> list[nn.Module]:
    from fastbert.registry import AUTO_PACKING, PACKING

    _check_model(model)
    packing = PACKING.fast, AUTO_PACKING.fast
    patched_with, known = _encoders.get(model, (None, []))
    found = [encoder for encoder in (reference() for reference in known) if type(encoder) in packing]
    if not found or len(found) != len(known) or patched_with is not switches_of(model):  # a step must not look each time
        found = [module for module in model.modules() if type(module) in packing]
        _encoders[model] = switches_of(model), [ref(encoder) for encoder in found]
    if not found:
        raise ValueError(
            f"model: expected one whose encoder packs (unpad=True, or unpad='auto' and a head that reads some positions "
            f"only), got {type(model).__name__} without"
        )
    return found


def _counts(name: str, numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    if numbers is None:
        return None
    numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{name}: expected integers from 0 on, got {numbers}")
    return tuple(numbers)
