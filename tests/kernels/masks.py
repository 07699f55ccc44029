"""keep_mask alone, for any rows, and the random numbers behind it."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.core.configs import Config
from fastbert.kernels.core.device_math import keep_mask, tile_offsets
from fastbert.kernels.core.launch import launch
from fastbert.testing.rows import DEVICE, seed_tensor


@triton.jit
def keep_mask_kernel(seed_ptr, keep_ptr, first_row, N_COLS: tl.constexpr, P_DROP: tl.constexpr, BLOCK_M: tl.constexpr):
    here = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, N_COLS)
    keep = keep_mask(tl.load(seed_ptr), (here.to(tl.int64) + first_row)[:, None], cols[None, :], P_DROP)
    tl.store(keep_ptr + tile_offsets(here, cols, N_COLS, 1), keep.to(tl.int8))


def keep_masks(p: float, rows: int, cols: int, *, seed: int = 0, first_row: int = 0) -> Tensor:
    """bool [rows, cols]: what dropout keeps in the rows from first_row on of a tensor of that width. Powers of two only."""
    keep = torch.full((rows, cols), -1, dtype=torch.int8, device=DEVICE)
    block = min(rows, max(1, 2**18 // cols)) if DEVICE.type == "cpu" else 1
    arguments = {"seed_ptr": seed_tensor(seed), "keep_ptr": keep, "first_row": first_row}
    launch(keep_mask_kernel, rows // block, Config(block, 4), keep, **arguments, N_COLS=cols, P_DROP=p, BLOCK_M=block)
    return keep.bool()


def philox(counter, key, rounds=7):
    """Philox4x32 in NumPy: four counter words (arrays) and two key words -> four words (Salmon et al., SC'11)."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(rounds):
        k0, k1 = (np.uint64((key[0] + i * 0x9E3779B9) % 2**32), np.uint64((key[1] + i * 0xBB67AE85) % 2**32))
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & low, (a >> half) ^ c3 ^ k1, a & low
    return c0, c1, c2, c3


def draws(rows: int, cols: int, *, seed: int = 0, first_row: int = 0) -> np.ndarray:
    """The 16-bit number behind each decision, uint16 [rows, cols]: eight adjacent ones per Philox call."""
    row = np.arange(rows, dtype=np.uint64)[:, None] + np.uint64(first_row)
    group = np.arange(-(-cols // 8), dtype=np.uint64)[None, :]
    words = philox((group, row % 2**32, row >> np.uint64(32), 0), (seed % 2**32, seed >> 32))
    halves = [(word >> np.uint64(shift)) & np.uint64(0xFFFF) for word in words for shift in (0, 16)]
    return np.stack(np.broadcast_arrays(*halves), axis=-1).reshape(rows, -1)[:, :cols].astype(np.uint16)
