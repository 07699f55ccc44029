"""Lists the configurations that `python -m bench tune` tries for each entry of kernels/core/configs.py.

Those closest to the present entry come first, so that a run that is cut short has tried the most likely ones.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from fastbert.kernels.core.configs import TABLES, Config, Table

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Entry:
    """A table of configs.py, or a possible table for one length: the op and direction whose time shows its effect, BERT's
    widths, and the values to try.

    extra: further properties of the audit's variant.
    lane: the op's lane that uses the table.
    promising: changes of the present entry that compile well on sm_90; they are tried first.
    """

    op: str
    direction: str
    widths: tuple[int, ...]
    choices: dict[str, tuple[int | None, ...]]
    function: str
    extra: dict[str, Any] = field(default_factory=dict)
    lane: str = "fastbert"
    promising: tuple[dict[str, int], ...] = ()


_HIDDEN, _FEED_FORWARD, _HEAD_SIZES, _VOCABULARY = (1024, 768, 384), (4096, 3072, 1536), (64,), (30522,)
_DROPPED = {"p": 0.1}
# programs_per_multiprocessor: with 1 or 2, persistent programs process tile after tile; with None, one program per tile.
_PRODUCT_TILES = {
    "maxnreg": (None, 128),
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
    "programs_per_multiprocessor": (None, 1, 2),
}
_TILES = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)}
_NORM_TILES = {
    "BLOCK_M": (2, 4, 8),
    "num_warps": (4, 8),
    "programs_per_multiprocessor": (1, 2, 3, 4),
    "chunk": (128, 256, 512),
}
_SHORT_TILES = {"BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3)}  # BLOCK_M covers all queries
ENTRIES = {
    "attention_forward": Entry(
        *("attention", "forward", _HEAD_SIZES, _TILES | {"num_stages": (2, 3, 4)}, "attention_fwd_kernel", _DROPPED),
        promising=({"num_warps": 8}, {"BLOCK_M": 64}, {"BLOCK_M": 64, "num_stages": 2}),
    ),
    "attention_backward_kv": Entry(
        *("attention", "backward", _HEAD_SIZES, _TILES | {"num_stages": (1, 2, 3)}, "attention_bwd_kv_kernel", _DROPPED),
        promising=({"BLOCK_M": 64, "num_stages": 2}, {"BLOCK_M": 128, "num_warps": 8}),
    ),
    "attention_backward_q": Entry(
        *("attention", "backward", _HEAD_SIZES, _TILES | {"num_stages": (1, 2, 3)}, "attention_bwd_q_kernel", _DROPPED),
        promising=({"BLOCK_N": 64, "num_stages": 2}, {"BLOCK_M": 128, "num_warps": 8}),
    ),
    # At the size of common tutorials, 32 sequences of 128.
    "attention_forward_128": Entry(
        *("attention", "forward", _HEAD_SIZES, _TILES | {"num_stages": (2, 3)}, "attention_fwd_kernel"),
        extra=_DROPPED | {"length": 127},
        promising=({"num_stages": 2}, {"BLOCK_M": 128}, {"num_warps": 8}),
    ),
    "attention_backward_short_128": Entry(
        *("attention", "backward", _HEAD_SIZES, _SHORT_TILES, "attention_bwd_short_kernel"), extra=_DROPPED | {"length": 127}
    ),
    "attention_backward_short_64": Entry(
        *("attention", "backward", _HEAD_SIZES, _SHORT_TILES, "attention_bwd_short_kernel"), extra=_DROPPED | {"length": 63}
    ),
    "layernorm_backward": Entry(
        "dropout_add_layernorm",
        "backward",
        _HIDDEN,
        _NORM_TILES,
        "dropout_add_layernorm_bwd_kernel",
        _DROPPED,
        promising=({"programs_per_multiprocessor": 3}, {"BLOCK_M": 8, "num_warps": 8}),
    ),
    "layernorm_forward": Entry(
        "dropout_add_layernorm",
        "forward",
        _HIDDEN,
        {"BLOCK_M": (1, 2, 4), "num_warps": (1, 2, 4, 8)},
        "dropout_add_layernorm_fwd_kernel",
        _DROPPED,
    ),
    "gelu_layernorm_backward": Entry(
        "gelu_layernorm",
        "backward",
        _HIDDEN,
        _NORM_TILES,
        "gelu_layernorm_bwd_kernel",
    ),
    "bias_gelu_backward": Entry(
        "bias_gelu",
        "backward",
        _FEED_FORWARD,
        {
            "BLOCK_M": (2, 4, 8),
            "BLOCK_N": (256, 512, 1024),
            "num_warps": (4, 8),
            "programs_per_multiprocessor": (2, 4, 6, 8),
        },
        "bias_gelu_bwd_kernel",
    ),
    "bias_gelu_forward": Entry(
        "bias_gelu",
        "forward",
        _FEED_FORWARD,
        {"BLOCK_M": (1, 2, 4, 8), "BLOCK_N": (256, 512, 1024), "num_warps": (2, 4, 8)},
        "bias_gelu_fwd_kernel",
    ),
    "feed_forward_product": Entry(
        *("feed_forward", "forward", _FEED_FORWARD, _PRODUCT_TILES, "feed_forward_fwd_kernel"), lane="fastbert, epilogues"
    ),
    "feed_forward_gradient": Entry(
        *("feed_forward", "backward", _FEED_FORWARD, _PRODUCT_TILES, "feed_forward_bwd_kernel"), lane="fastbert, epilogues"
    ),
    "gather_rows": Entry(
        "gather_rows",
        "forward",
        _HIDDEN,
        {"BLOCK_M": (1, 2, 4, 8), "BLOCK_N": (256, 512, 1024), "num_warps": (2, 4, 8)},
        "gather_rows_kernel",
    ),
    "pool_rows_forward": Entry(
        "pool_rows",
        "forward",
        _HIDDEN,
        {"BLOCK_M": (128, 256, 512), "BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8, 16)},
        "pool_rows_fwd_kernel",
    ),
    "pool_rows_backward": Entry(
        "pool_rows",
        "backward",
        _HIDDEN,
        {"BLOCK_M": (1, 2, 4, 8), "BLOCK_N": (256, 512, 1024), "num_warps": (2, 4, 8)},
        "pool_rows_bwd_kernel",
    ),
    "linear_cross_entropy": Entry(
        "linear_cross_entropy",
        "both",
        _VOCABULARY,
        {"BLOCK_N": (2048, 4096, 8192), "chunk": (1024, 2048), "num_warps": (4, 8, 16)},
        "linear_cross_entropy_fwd_kernel",
    ),
    "embedding_runs": Entry(
        "embedding_layernorm",
        "backward",
        _HIDDEN,
        {"BLOCK_N": (256, 512, 1024), "at_once": (4, 8, 16), "num_warps": (2, 4, 8)},
        "embedding_layernorm_bwd_runs_kernel",
        _DROPPED,
    ),
    "embedding_sums_backward": Entry(
        "embedding_layernorm",
        "backward",
        _HIDDEN,
        {"BLOCK_N": (128, 256, 512), "at_once": (4, 8, 16), "num_warps": (2, 4, 8)},
        "embedding_layernorm_bwd_sums_kernel",
        _DROPPED,
    ),
}


def bucket(kernel: str, architecture: str, dtype: str, width: int) -> int:
    """The table's row for this width, which is the head size for attention."""
    limits = _tables(kernel)[architecture][ITEMSIZES[dtype]]
    return next((limit for limit in limits if limit >= width), max(limits))


def present(kernel: str, architecture: str, dtype: str, width: int) -> Config:
    """The shipped configuration."""
    return _tables(kernel)[architecture][ITEMSIZES[dtype]][bucket(kernel, architecture, dtype, width)]


def candidates(kernel: str, architecture: str, dtype: str, width: int) -> list[Config]:
    """The present configuration, the promising ones, then the others by the number of fields that differ from it."""
    now = present(kernel, architecture, dtype, width)
    choices = ENTRIES[kernel].choices
    first = [now, *(replace(now, **changes) for changes in ENTRIES[kernel].promising)]
    combined = [replace(now, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    others = [config for config in combined if config not in first]
    return list(dict.fromkeys([*first, *sorted(others, key=lambda config: _distance(now, config))]))


def _distance(a: Config, b: Config) -> int:
    return sum(getattr(a, name) != getattr(b, name) for name in vars(a))


def _tables(kernel: str) -> dict[str, Table]:
    """The tables of an entry. A length without tables of its own uses those for every length."""
    return TABLES[kernel] if kernel in TABLES else TABLES[kernel.rpartition("_")[0]]


@contextmanager
def shipped(kernel: str, architecture: str, dtype: str, config: Config) -> Iterator[None]:
    """Within the block, put `config` into the table for every width of this type."""
    tables, itemsize = _tables(kernel), ITEMSIZES[dtype]
    row = {max(tables[architecture][itemsize]): config}
    with patch.dict(TABLES, {kernel: tables | {architecture: tables[architecture] | {itemsize: row}}}):
        yield


def tune_jobs(
    architecture: str, kernels: tuple[str, ...] = tuple(ENTRIES), dtypes: tuple[str, ...] = ("bf16",)
) -> Iterator[dict[str, Any]]:
    """The arguments of bench.tune.run.run, one set per entry, BERT's own widths first."""
    for dtype in dtypes:
        for place in range(max(len(entry.widths) for entry in ENTRIES.values())):
            for kernel in kernels:
                if place < len(ENTRIES[kernel].widths):
                    yield {
                        "kernel": kernel,
                        "architecture": architecture,
                        "dtype": dtype,
                        "width": ENTRIES[kernel].widths[place],
                    }


def architecture_here(default: str = "sm_90") -> str:
    """The architecture of the GPU as the tables name it; `default` without a GPU."""
    if not torch.cuda.is_available():
        return default
    from fastbert.kernels.core.launch import architecture

    return architecture(torch.device("cuda", 0))
