"""Packed rows as a padded batch and back, with the mask that makes attention over the batch equal to packed attention.

For what the kernel does not compute on packed rows: a window around each query.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def places(cu_seqlens: Tensor, longest: int, n_rows: int) -> Tensor:
    """The row of each packed row in a batch [sequences * longest], int64 [n_rows]; other rows come behind it."""
    bounds = cu_seqlens.long()
    sequences = len(bounds) - 1
    rows = torch.arange(n_rows, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), rows, right=True)
    start = bounds[sequence.clamp(max=sequences)]
    return torch.where(sequence < sequences, sequence * longest + rows - start, sequences * longest)


def pad(x: Tensor, places: Tensor, sequences: int, longest: int) -> Tensor:
    """Packed rows [T, ...] as a batch [sequences, longest, ...], with zeros elsewhere."""
    rows = x.new_zeros(sequences * longest + 1, *x.shape[1:]).index_copy(0, places, x)
    return rows[:-1].unflatten(0, (sequences, longest))


def unpad(x: Tensor, places: Tensor) -> Tensor:
    """The packed rows [T, ...] of a batch [sequences, longest, ...]; zeros for rows outside all sequences."""
    rows = x.flatten(0, 1)
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))).index_select(0, places)


class Padded(NamedTuple):
    """Packed queries, keys and values as a batch.

    q, k, v: [sequences, the longest, heads, D].
    visible: bool [sequences, 1, queries, keys], which keys each query sees.
    of_queries, of_keys: their `places`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    of_queries: Tensor
    of_keys: Tensor


def padded(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor, int, int], causal: bool, window: tuple[int, int]
) -> Padded:
    """Packed [T, heads, D] as a batch. bounds: cu_seqlens of queries and of keys, and the longest of both."""
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = bounds
    of_queries, of_keys = places(cu_seqlens_q, longest_q, q.shape[0]), places(cu_seqlens_k, longest_k, k.shape[0])
    sequences, lengths = len(cu_seqlens_k) - 1, (cu_seqlens_q.diff(), cu_seqlens_k.diff())
    q, k, v = pad(q, of_queries, sequences, longest_q), *(pad(x, of_keys, sequences, longest_k) for x in (k, v))
    return Padded(q, k, v, visible(longest_q, longest_k, causal, window, lengths, q.device), of_queries, of_keys)


def visible(
    n_queries: int,
    n_keys: int,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    lengths: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query sees: bool [sequences or 1, 1, queries, keys].

    Args:
        window: how many keys before and behind its own position a query sees; -1 for all. The last query of a sequence stands
            at its last key, as in FlashAttention.
        lengths: the numbers of queries and of keys in each sequence; None if all are full.
    """
    keys = torch.arange(n_keys, device=device)
    queries = torch.arange(n_queries, device=device)[:, None]
    if lengths is None:
        own, seen = queries + (n_keys - n_queries), torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=device)
    else:
        of_queries, of_keys = (x.view(-1, 1, 1, 1) for x in lengths)
        own = queries + (of_keys - of_queries)
        seen = (keys < of_keys).expand(-1, 1, n_queries, n_keys)
    before, behind = window
    if causal:
        behind = 0
    if before >= 0:
        seen = seen & (keys >= own - before)
    return seen & (keys <= own + behind) if behind >= 0 else seen


def covers(window: tuple[int, int], longest: int, causal: bool) -> bool:
    """Whether a window excludes no key of a sequence of this length that would otherwise be seen."""
    before, behind = window
    return (before < 0 or before >= longest - 1) and (causal or behind < 0 or behind >= longest - 1)
