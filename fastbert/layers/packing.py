"""Where the real tokens of a padded batch lie, so that layers may run on them alone."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops


@dataclass(frozen=True)
class Packing:
    """How the rows of a padded [B, S, H] batch stand one behind the other as [1, T, H].

    index int32 [T] names the row of B x S that each packed row is, inverse int32 [B x S] says the same from the other
    side (-1: padding); cu_seqlens int32 [B + 1] and max_seqlen are attention's.
    """

    index: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def pack(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] -> [1, T, H]."""
        return ops.gather_rows(hidden_states.flatten(0, 1), self.index, self.inverse).unsqueeze(0)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """[1, T, H] -> [B, S, H], zeros where padding is."""
        return ops.gather_rows(packed.squeeze(0), self.inverse, self.index).view(*shape[:2], -1)


def packing_of(key_mask: Tensor, every_first: bool) -> Packing | str:
    """The packing of a bool [B, S] mask, or the reason not to pack. One synchronisation.

    every_first: the first position of each row is read whether it is padding or not, so it has to be a token.
    """
    if not key_mask.numel():
        return "an empty batch"
    lengths = key_mask.sum(1, dtype=torch.int32)
    facts = torch.stack([lengths.sum(), lengths.amax(), key_mask[:, 0].sum()])
    tokens, max_seqlen, firsts = facts.tolist()
    if tokens == key_mask.numel():
        return "a batch without padding"
    if tokens == 0:
        return "a batch of padding alone"
    if every_first and firsts < key_mask.shape[0]:
        return "a first position that is padding is read"
    valid = key_mask.flatten()
    places = valid.cumsum(0) - 1
    # Padding goes to a slot behind the tokens, which is cut off.
    slots = torch.where(valid, places, tokens)
    rows = torch.arange(len(valid), device=valid.device, dtype=torch.int32)
    index = rows.new_empty(tokens + 1).scatter_(0, slots, rows)[:tokens]
    inverse = torch.where(valid, places, -1).to(torch.int32)
    return Packing(index, inverse, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), max_seqlen)
