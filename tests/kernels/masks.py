"""keep_mask by itself, at any rows: what the statistics of dropout are taken from."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.configs import Config
from fastbert.kernels.device_math import keep_mask, tile_offsets
from fastbert.kernels.launch import launch

from .ops import DEVICE, seed_tensor


@triton.jit
def keep_mask_kernel(
    seed_ptr, keep_ptr, first_row, N_COLS: tl.constexpr, P_DROP: tl.constexpr, BLOCK_M: tl.constexpr
):
    here = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, N_COLS)
    keep = keep_mask(tl.load(seed_ptr), here.to(tl.int64) + first_row, cols, P_DROP)
    tl.store(keep_ptr + tile_offsets(here, cols, N_COLS, 1), keep.to(tl.int8))


def keep_masks(p: float, rows: int, cols: int, *, seed: int = 0, first_row: int = 0) -> Tensor:
    """bool [rows, cols], what dropout keeps in rows first_row... of a tensor of that width. Powers of two only."""
    keep = torch.full((rows, cols), -1, dtype=torch.int8, device=DEVICE)
    block = min(rows, max(1, 2**18 // cols)) if DEVICE.type == "cpu" else 1
    arguments = {"seed_ptr": seed_tensor(seed), "keep_ptr": keep, "first_row": first_row}
    launch(keep_mask_kernel, rows // block, Config(block, 4), keep, **arguments, N_COLS=cols, P_DROP=p, BLOCK_M=block)
    return keep.bool()
