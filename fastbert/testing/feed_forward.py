"""Test support for feed_forward: its inputs by name, and the check of a call."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.core.configs import TABLES, Config
from fastbert.kernels.core.launch import counts
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import GRADIENT, KERNELS, PRODUCT, decided
from fastbert.testing.numerics import assert_close

from .rows import DEVICE, Inputs, double, run

AFTER = ("bias_gelu_fwd_kernel", "bias_gelu_bwd_kernel")  # launched after cuBLAS products


def small_tiles(monkeypatch: Any, rows: int = 16, cols: int = 32, inner: int = 16, persistent: int | None = None) -> None:
    """Use tiles small enough that even a small product has several in every direction, in the interpreter."""
    config = Config(rows, 1, cols, persistent, BLOCK_K=inner)
    for table in (PRODUCT, GRADIENT):
        monkeypatch.setitem(TABLES[table], "interpreter", {size: {8192: config} for size in (2, 4, 8)})


def make_inputs(rows: int, hidden: int, inner: int, output: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """x [rows, hidden], and weights for which products keep the magnitude of their input."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype)

    return {
        "x": normal(rows, hidden),
        "weight": normal(inner, hidden, scale=hidden**-0.5),
        "bias": normal(inner, scale=0.3),
        "output_weight": normal(output, inner, scale=inner**-0.5),
    }


def check(
    inputs: Inputs,
    way: tuple[bool, bool],
    *,
    requested: tuple[bool, bool] | None = None,
    frozen: Iterable[str] = (),
    activation: str = "gelu",
) -> dict[str, Tensor | None]:
    """Check output and every gradient against eager and float64, and which epilogues ran.

    `way` says for forward and backward whether the epilogue must run; `requested`, by default `way`, is what is configured.
    """
    frozen = tuple(frozen)
    dy = torch.randn_like(reference.feed_forward(**inputs))
    before = counts.copy()
    with decided(*(requested or way)):
        results = run(feed_forward, inputs, dy, frozen, activation=activation)
    expected = {(KERNELS if on else AFTER)[i]: 1 for i, on in enumerate(way)}
    if not way[1] and "output_weight" not in frozen:  # the recomputed activation
        expected[AFTER[0]] = expected.get(AFTER[0], 0) + 1
    assert counts - before == expected
    eager = run(reference.feed_forward, inputs, dy, frozen, activation=activation)
    exact = run(reference.feed_forward, double(inputs), dy.double(), frozen, activation=activation)
    assert_close(results, eager, exact, relative_fp32=None if dy.element_size() == 2 else 1e-5)
    return results
