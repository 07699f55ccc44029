"""The kernels' dropout bits in plain PyTorch: device_math.keep_mask and attention.tiles.keep_scores.

Unsigned 32-bit numbers are held in int64, which torch can multiply and shift.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def dropped(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """x / (1 - p) where kept, else 0."""
    return x if keep is None else torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def keep_mask(seed: Tensor | None, shape: torch.Size, p: float) -> Tensor | None:
    """The keep mask of a tensor of rows; None where nothing is dropped."""
    if seed is None:
        return None
    n_rows, n_cols = shape[:-1].numel(), shape[-1]
    rows = torch.arange(n_rows, device=seed.device)[:, None]
    cols = torch.arange(n_cols, device=seed.device)[None, :]
    words = torch.stack(_philox(seed, (cols >> 3) + 0 * rows, rows & _LOW, rows >> 32))
    pair = words.gather(0, ((cols >> 1) & 3).expand(1, n_rows, n_cols))[0]
    bits = torch.where((cols & 1) == 0, pair & 0xFFFF, pair >> 16)
    return (bits >= int(p * 65536 + 0.5)).view(shape)


def keep_scores(seed: Tensor, sequences: range, n_heads: int, n_queries: int, n_keys: int, p: float) -> Tensor:
    """The keep mask of attention's probabilities, [sequences, heads, queries, keys]."""
    first = sequences.start * n_heads
    head = torch.arange(first, sequences.stop * n_heads, device=seed.device).view(-1, n_heads, 1, 1)
    rows = torch.arange(n_queries, device=seed.device)[:, None]
    keys = torch.arange(n_keys, device=seed.device)
    row_key = _philox(seed, _group(rows) + 0 * head, head + 0 * rows, 0)[0]
    bits = (row_key + _low_product(_group(keys), 0x9E3779B9)) & _LOW
    bits = bits ^ bits >> 16
    bits = _low_product(bits, 0x7FEB352D)
    bits = bits ^ bits >> 15
    behind = (keys & 8) != 0
    even, odd = (torch.where(behind, b, a) for a, b in ((0x846CA68B, 0xC2B2AE35), (0x9E485565, 0xB5297A4D)))
    return _low_product(bits, torch.where((rows & 8) == 0, even, odd)) >= min(int(p * 4294967296 + 0.5), _LOW)


def _group(places: Tensor) -> Tensor:
    return (places & 7) | ((places >> 4) << 3)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor | int) -> tuple[Tensor, ...]:
    """Four random words for a counter whose last word is 0: Philox4x32 with seven rounds, as in the kernels."""
    c3 = torch.zeros_like(c0)
    c2 = c3 + c2
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        high0, low0 = _product(c0, 0xD2511F53)
        high2, low2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _product(a: Tensor, b: Tensor | int) -> tuple[Tensor, Tensor]:
    """The high and low words of a product, from 16-bit halves: the whole would overflow int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _low_product(a: Tensor, b: Tensor | int) -> Tensor:
    return _product(a, b)[1]
