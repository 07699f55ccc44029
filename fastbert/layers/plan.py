"""From a mask, what a head reads and what the caller knows to a packing, with as few synchronisations as that allows."""

import torch
from torch import Tensor

from fastbert.layers.counts import Given, Room, check_room, count, missing
from fastbert.layers.packing import Packing, Rows, every_row, first_rows, rows_of
from fastbert.layers.reading import Reading

_COMPILED = "torch.compile needs sizes that do not depend on the mask: fastbert.lengths(model, token_budget=...)"


def packing_of(
    mask: Tensor | None, told: Reading | None, given: Given, batch: int, seqlen: int, device: torch.device
) -> Packing | str:
    """The packing of a bool [B, S] mask, or the reason not to pack. At most one synchronisation, none if all is given."""
    if not batch * seqlen:
        return "an empty batch"
    alone = told is not None and told.alone
    if mask is None and not alone:
        return "a batch without a mask"
    read = None if told is None else told.positions
    tokens = None if mask is None else given.room("lengths", batch, seqlen)
    reads = None if read is None else given.room("read", batch, seqlen)
    known = tokens is not None or mask is None
    if torch.compiler.is_compiling() and not (known and (read is None or reads is not None)):
        return _COMPILED if alone or read is None else "torch.compile, and the labels were not given a budget"
    _check(mask, tokens, read, reads)
    padding = False
    if not known or (read is not None and reads is None):
        tokens, reads, padding = _counted(mask, tokens, told, reads)
    elif mask is not None and alone:
        torch._assert_async(~missing(mask, told), "lengths: given, but a position that is padding is read")
    if tokens is not None and tokens.rows == 0:
        return "a batch of padding alone"
    if padding:
        return "a position that is padding is read"
    if read is not None:
        told.rows = _rows(read, reads)
    whole = mask is None or tokens == Room(batch * seqlen, seqlen)
    if whole and not alone:
        return "a batch without padding"
    last: Rows | None = None
    if alone:
        last = first_rows(batch, seqlen, device) if read is None else told.rows
    return Packing(every_row(batch, seqlen, device) if whole else _rows(mask, tokens), last)


def _rows(chosen: Tensor, room: Room) -> Rows:
    return rows_of(chosen, room.longest, room.rows, room.exact)


def _check(mask: Tensor | None, tokens: Room | None, read: Tensor | None, reads: Room | None) -> None:
    if tokens is not None:
        check_room("lengths", mask, tokens)
    if reads is not None:
        check_room("read", read, reads)


def _counted(
    mask: Tensor | None, tokens: Room | None, told: Reading | None, reads: Room | None
) -> tuple[Room | None, Room | None, bool]:
    """What is not known yet, and whether a position that is read is padding. One synchronisation."""
    read = None if told is None else told.positions
    unknown = (mask if tokens is None else None, read if reads is None else None)
    checked = mask is not None and told is not None and told.alone
    padding = missing(mask, told) if checked else None
    counted_tokens, counted_reads, found = count(*unknown, padding)
    return tokens or counted_tokens, reads or counted_reads, found
