"""Plans the packing of a forward from its mask, from what the head reads and from what the caller knows.

One synchronisation counts everything that a forward needs to know: the tokens, the longest row, the positions that are read,
and whether one of those is padding. Counts that the caller passes are asserted on the device instead.
"""

import torch
from torch import Tensor

from fastbert import ops
from fastbert.layers.counts import CallerCounts, Capacity, count
from fastbert.layers.packing import Packing, pack
from fastbert.layers.reading import Reading

_COMPILED = "torch.compile needs sizes that do not depend on the mask: fastbert.lengths(model, token_budget=...)"
_WRONG = "less than the batch needs, or not equal to its count"


def plan_packing(
    mask: Tensor | None, reading: Reading | None, caller: CallerCounts, batch: int, seqlen: int, device: torch.device
) -> Packing | str:
    """The packing for a bool [B, S] mask, or the reason not to pack. At most one synchronisation, none if all is given."""
    if not batch * seqlen:
        return "an empty batch"
    alone = reading is not None and reading.alone
    # Whether it has to be made sure that what is read are tokens.
    watched = alone or (reading is not None and reading.positions is not None and reading.hides_padding)
    if mask is None and not alone:
        return "a batch without a mask"
    read = None if reading is None else reading.positions
    tokens = None if mask is None else caller.capacity("lengths", batch, seqlen)
    reads = None if read is None else caller.capacity("read", batch, seqlen)
    claims = tokens is not None, reads is not None
    counted = (mask is not None and not claims[0]) or (read is not None and not claims[1])
    if counted and torch.compiler.is_compiling():
        return (
            _COMPILED
            if alone or read is None
            else "torch.compile needs a read_budget for the labels: fastbert.lengths(model, read_budget=...)"
        )

    masked = mask is not None or read is not None
    counts = ops.row_counts(mask, read) if masked else torch.empty(3, batch, dtype=torch.int32, device=device)
    padding = False
    if counted:
        found = count(None if claims[0] else mask, None if claims[1] else read, counts)
        tokens, reads, padding = tokens or found[0], reads or found[1], found[2] and watched
    whole = mask is None or tokens == Capacity(batch * seqlen, seqlen)
    reason = None
    if tokens is not None and tokens.rows == 0:
        reason = "a batch of padding only"
    elif padding:
        reason = "a padded position is read"
    elif whole and not alone:
        reason = "a batch without padding"
    if reason is not None and read is None and not claims[0]:
        return reason

    if alone and read is None:
        reads = Capacity(batch, 1)
    checked = (*claims, watched and mask is not None and not counted)
    capacity = Capacity(batch * seqlen, seqlen) if whole else tokens
    packed, last, fits = pack(counts, None if whole else mask, read, seqlen, capacity, reads, any(checked))
    stop_unless(fits, checked)
    if read is not None:
        reading.rows = last  # so that the head need not count again
    return Packing(packed, last if alone else None) if reason is None else reason


def stop_unless(fits: Tensor | None, checked: tuple[bool, bool, bool]) -> None:
    """Assert, on the device and without waiting for it, that the caller's counts are right.

    With wrong counts rows would be left out, or zeros read.
    """
    wrong = f"lengths: {_WRONG}", f"read: {_WRONG}", "lengths: given, but a padded position is read"
    for i, message in enumerate(wrong):
        if checked[i]:
            torch._assert_async(fits[i], message)
