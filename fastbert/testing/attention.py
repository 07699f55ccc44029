"""Test support for attention: its inputs, its tiles, the dropout mask that it draws, and the check of a call."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from fastbert.kernels import attention as module
from fastbert.kernels import reference
from fastbert.kernels.attention import attention
from fastbert.kernels.attention.checks import MAX_HEAD_SIZE
from fastbert.kernels.core.configs import ARCHITECTURES, TABLES, Config
from fastbert.kernels.core.launch import INTERPRETED, counts
from fastbert.testing.numerics import assert_close

from .rows import DEVICE, Inputs, double, run, seed_tensor

FORWARD = "attention_fwd_kernel"
BACKWARD = ("attention_bwd_q_kernel", "attention_bwd_kv_kernel")
SHORT = ("attention_bwd_short_kernel",)
Tile = tuple[int, int]


def make_inputs(
    batch: int,
    seqlen: int | tuple[int, int],
    heads: int,
    head_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
) -> Inputs:
    """Random q, k and v [batch, length, heads, head size]; `seqlen` is one length for both, or those of q and of k."""
    seqlen_q, seqlen_k = (seqlen, seqlen) if isinstance(seqlen, int) else seqlen
    lengths = {"q": seqlen_q, "k": seqlen_k, "v": seqlen_k}
    return {name: normal(batch, n, heads, head_size, dtype=dtype) * scale for name, n in lengths.items()}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A standard normal tensor, drawn in float64 and rounded."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


@contextmanager
def tiles(forward: Tile, kv: Tile | None = None, q: Tile | None = None) -> Iterator[None]:
    """Launch with tiles of (queries, keys), and without the kernel for short sequences.

    Compiled kernels keep the shipped tiles, because others may not fit a GPU.
    """
    shapes = {"attention_forward": forward, "attention_backward_kv": kv or forward, "attention_backward_q": q or kv or forward}

    def choose(kernel: str, like: Tensor, width: int, length: int) -> Config:
        shape = shapes[kernel.removesuffix("_masked").removesuffix("_grouped")]
        return Config(shape[0], 1, shape[1])

    with patch.object(module, "choose", choose if INTERPRETED else module.choose), short_tiles(None):
        yield


@contextmanager
def short_tiles(tile: Tile | None) -> Iterator[None]:
    """Launch the backward of short sequences with this tile; None: never."""
    config = None if tile is None else Config(tile[0], 1, tile[1])
    with patch.object(module, "choose_short", lambda *_: config):
        yield


def shipped_tiles() -> list[tuple[Tile, Tile, Tile]]:
    """Every combination of tiles that a GPU may use, of the forward and of the two kernels of the backward."""
    found = set()
    for architecture in ARCHITECTURES:
        tables = [TABLES[f"attention_{name}"][architecture] for name in ("forward", "backward_kv", "backward_q")]
        for itemsize in (2, 4, 8):
            rows = [table[itemsize] for table in tables]
            for width in sorted({limit for row in rows for limit in row}):
                configs = [row[min(limit for limit in row if limit >= width)] for row in rows]
                found.add(tuple((config.BLOCK_M, config.BLOCK_N) for config in configs))
    return sorted(found)


def drawn_keep(batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float, seed: Tensor) -> Tensor:
    """The dropout mask, bool [batch, heads, seqlen_q, seqlen_k], true where a score is kept.

    It is read off the output of attention with equal weights and one-hot values. One tile covers a whole head, so a mask
    that depended on the tiles of a call would differ from this one.
    """
    sides = (max(16, triton.next_power_of_2(seqlen_q)), max(16, triton.next_power_of_2(seqlen_k)))
    kept = []
    for first in range(0, seqlen_k, MAX_HEAD_SIZE):
        one_hot = torch.eye(seqlen_k, device=DEVICE)[:, first : first + MAX_HEAD_SIZE]
        v = one_hot[None, :, None].expand(batch, -1, heads, -1)
        q = v.new_zeros(1, 1, 1, 1).expand(batch, seqlen_q, heads, v.shape[-1])
        with tiles(sides):
            kept.append(attention(q, torch.zeros_like(v), v, p=p, seed=seed) > 0)
    return torch.cat(kept, dim=-1).transpose(1, 2)


def check(
    inputs: Inputs,
    dy: Tensor | None = None,
    *,
    frozen: Iterable[str] = (),
    relative_fp32: float | None = 1e-5,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Check output and every gradient against eager and float64 with the same dropout mask, and one launch per kernel."""
    dy = normal(*inputs["q"].shape, dtype=inputs["q"].dtype) if dy is None else dy
    if options.get("p"):
        options.setdefault("seed", seed_tensor(1234))
    eager_options = {name: value for name, value in options.items() if name != "seed"}
    if options.get("p"):
        eager_options["keep"] = _keep_for(inputs, options)

    before = counts.copy()
    results = run(attention, inputs, dy, frozen, **options)
    launched = counts - before
    key_mask = options.get("key_mask")
    bounds = key_mask is not None and len(key_mask) > 0 and options.get("key_bounds") is None
    assert launched.pop("key_bounds_kernel", 0) == bounds
    assert launched == launches_of(inputs, len(tuple(frozen)) < 3, options), launched

    eager = run(reference.attention, inputs, dy, frozen, **eager_options)
    eager_options["mask"] = _exact_mask(options.get("mask"))
    exact = run(reference.attention, double(inputs), dy.double(), frozen, **eager_options)
    assert_close(results, eager, exact, relative_fp32=relative_fp32)
    return results


def launches_of(inputs: Inputs, differentiated: bool, options: dict[str, Any]) -> Counter[str]:
    """The expected launches of a call, per kernel name."""
    if not inputs["q"].numel() or not inputs["k"].numel():
        return Counter()
    return Counter([FORWARD, *(backward_of(inputs, options) if differentiated else ())])


def backward_of(inputs: Inputs, options: dict[str, Any]) -> tuple[str, ...]:
    """The kernels of a backward: one for short sequences with small, ungrouped heads and a key mask only, else two."""
    q, k = inputs["q"], inputs["k"]
    lengths = [q.shape[1], k.shape[1]] if q.dim() == 4 else [options["max_seqlen"], options.get("max_seqlen_q") or 0]
    if options.get("mask") is not None or q.shape[-2] != k.shape[-2]:
        return BACKWARD
    return SHORT if module.choose_short("attention_backward_short", q, q.shape[-1], max(lengths)) else BACKWARD


def _keep_for(inputs: Inputs, options: dict[str, Any]) -> Tensor:
    """The dropout mask of a call; a packed sequence draws the same mask as its row of a padded batch."""
    cu_seqlens, longest = options.get("cu_seqlens"), options.get("max_seqlen")
    batch = inputs["q"].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    longest_q = options.get("max_seqlen_q", longest)
    lengths = [inputs["q"].shape[1] if longest_q is None else longest_q, inputs["k"].shape[1] if longest is None else longest]
    lengths = [max(1, n) for n in lengths]
    return drawn_keep(batch, inputs["q"].shape[-2], *lengths, options["p"], options["seed"])


def _exact_mask(mask: Tensor | None) -> Tensor | None:
    """The mask in float64: a dtype's lowest number means masked, so it becomes the lowest float64."""
    if mask is None or not mask.is_floating_point():
        return mask
    lowest = torch.finfo(mask.dtype).min
    return mask.double().masked_fill(mask == lowest, torch.finfo(torch.float64).min)
