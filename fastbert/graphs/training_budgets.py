"""Chooses the budgets of a training step: fixed numbers of packed rows, so that its shapes do not depend on the batch.

A model that packs needs to know how many tokens a batch has, and an MLM head how many positions have a label. Without
budgets both are counted on the device in the middle of the forward, which a graph cannot do.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.lengths import Counted

# fastbert.registry and the layers are imported inside functions: they import triton (see fastbert/patch.py).

STEPS = 8  # budgets that are chosen here: so many per doubling
LEAST = 8  # and multiples of this
OVER_BUDGET = "more {} than the largest budget"


def rounded(count: int) -> int:
    """The budget for `count` rows: the next multiple of 1/16 of the power of two above, at most 12.5 % more."""
    step = max(LEAST, (1 << max(count - 1, 0).bit_length()) // (2 * STEPS))
    return max(step, -(-count // step) * step)


class Budgets(NamedTuple):
    """The rows of one step: of packed tokens, and of positions that the head reads. None where nothing is counted."""

    tokens: int | None = None
    reads: int | None = None


@dataclass(frozen=True)
class Packers:
    """The modules of a model that count rows.

    encoder: the one that packs, or None.
    head: the one that computes an MLM loss from the labelled rows, or None.
    alone: no position is visible but those that the head reads.
    reason: why no budgets can be given, or None.
    """

    encoder: nn.Module | None
    head: nn.Module | None
    alone: bool
    reason: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Packers":
        from fastbert.registry import MLM_HEADS, PACKING_CLASSES, POOLED_HEADS

        losses = {entry.fast for heads in MLM_HEADS.values() for entry in heads}
        pooled = {entry.fast for entry in POOLED_HEADS}
        modules = list(model.modules())
        encoders = [module for module in modules if type(module) in PACKING_CLASSES]
        heads = [module for module in modules if type(module) in losses]
        if len(encoders) > 1 or len(heads) > 1:
            return cls(None, None, False, "several encoders that pack, or several heads: patch with unpad=False")
        encoder, head = (*encoders, None)[0], (*heads, None)[0]
        alone = head.WITHOUT_LOGITS if head is not None else any(type(module) in pooled for module in modules)
        return cls(encoder, head, alone)

    @contextmanager
    def using(self, budgets: Budgets) -> Iterator[None]:
        """Within it, calls of the model use these budgets and count nothing."""
        from fastbert.layers.counts import CallerCounts

        modules = [module for module in (self.encoder, self.head) if module is not None] if any(budgets) else []
        counts = CallerCounts(token_budget=budgets.tokens, read_budget=budgets.reads)
        for module in modules:
            module.caller_counts = counts
        try:
            yield
        finally:
            for module in modules:
                del module.caller_counts

    def given_outside(self) -> bool:
        """Whether the caller is inside `fastbert.lengths`."""
        return self.encoder is not None and "caller_counts" in vars(self.encoder)


@dataclass(frozen=True)
class Chooser:
    """Chooses the budgets of a batch from those that the user gave, in ascending order; from a grid if there are none."""

    tokens: tuple[int, ...] | None = None
    reads: tuple[int, ...] | None = None

    def choose(self, packers: Packers, batch: Mapping[str, Any]) -> Budgets | str:
        """The budgets for `batch`, or why it must be counted in the forward.

        It synchronises once with the device, unless the batch brings what a LengthsCollator counted.
        """
        mask = batch.get("attention_mask") if packers.encoder is not None else None
        mask = mask.flatten(0, -2) if isinstance(mask, Tensor) and mask.dim() in (2, 3) else None
        read = None if packers.head is None else _read(packers, batch)
        if mask is None and read is None:
            return Budgets()
        if read is not None and mask is not None and read.shape != mask.shape:
            return "labels that do not have the shape of the mask"
        tokens, reads, padding = _counted(mask, read, batch)
        if padding and packers.alone:
            return "a padded position is read"
        if tokens == 0:
            return "a batch of padding only"
        rows = (read if mask is None else mask).numel()
        if tokens is not None and (tokens := _budget(tokens, self.tokens, rows)) is None:
            return OVER_BUDGET.format("tokens")
        if reads is not None and (reads := _budget(reads, self.reads, rows)) is None:
            return OVER_BUDGET.format("labels")
        return Budgets(tokens, reads)


def _read(packers: Packers, batch: Mapping[str, Any]) -> Tensor | None:
    """bool [B, S]: the positions that the MLM head reads, as in fastbert/layers/mlm_heads.py."""
    labels, shifted, ignored = batch.get("labels"), batch.get("shift_labels"), batch.get("ignore_index", -100)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    name = type(packers.head).__name__
    if name.endswith(("LMHeadModel", "ForCausalLM")):
        if isinstance(shifted, Tensor):
            return shifted != ignored
        read = (labels != ignored).roll(-1, 1)
        read[:, -1:] = False
        return read
    read = labels != ignored
    if name.endswith("ForPreTraining"):
        read[:, :1] = True
    return read


def _counted(mask: Tensor | None, read: Tensor | None, batch: Mapping[str, Any]) -> tuple[int | None, int | None, bool]:
    """The number of tokens and of positions that are read, and whether one of those is padding."""
    from fastbert.layers.counts import count

    lengths, reads = batch.get("lengths"), batch.get("read_lengths")
    if (mask is None or isinstance(lengths, Counted)) and (read is None or isinstance(reads, Counted)):
        # As in fastbert.lengths, the device asserts that no padded position is read.
        return None if mask is None else sum(lengths), None if read is None else sum(reads), False
    with torch.no_grad():
        tokens, found, padding = count(None if mask is None else mask.bool(), read)
    return None if mask is None else tokens.rows, None if read is None else found.rows, padding


def _budget(count: int, given: Sequence[int] | None, rows: int) -> int | None:
    """The smallest of the `given` budgets that holds `count`, None if none does; from the grid, at most `rows`, without any."""
    if given is None:
        return min(rounded(count), rows)
    place = bisect_left(given, count)
    return given[place] if place < len(given) else None
