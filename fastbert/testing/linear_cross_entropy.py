"""Test support for linear_cross_entropy: its inputs, which of its three ways a call takes, and the check of a call.

A float32 loss from 16-bit logits is judged as a 16-bit number, because eager may round that one number well by luck.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.core.launch import counts
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.testing.numerics import assert_close

from .rows import DEVICE
from .specs.linear_cross_entropy import chunks_of

NAMES = ("hidden", "weight", "bias")
FORWARD, REDUCE, SCALE = (f"linear_cross_entropy_{part}_kernel" for part in ("fwd", "reduce", "bwd_scale"))
WAYS = ("kept", "formed")  # how a mean or a sum is differentiated; reduction "none" is the third way

Inputs = dict[str, Tensor | None]


def chunk_rows(way: str, rows: int) -> int | None:
    """The argument of chunks_of that makes a call go this way: `rows`, or None if logits are kept."""
    return None if way == "kept" else rows


def make_inputs(
    n_rows: int | tuple[int, ...],
    n_cols: int,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    scale: float = 1.0,
    ignored: float = 0.3,
) -> tuple[Inputs, Tensor]:
    """Random inputs and labels: logits of standard deviation `scale`; a fraction `ignored` of the labels is -100."""
    shape = (n_rows,) if isinstance(n_rows, int) else n_rows
    inputs: Inputs = {
        "hidden": torch.randn(*shape, width, dtype=torch.float64),
        "weight": torch.randn(n_cols, width, dtype=torch.float64) * scale / max(width, 1) ** 0.5,
        "bias": torch.randn(n_cols, dtype=torch.float64) * scale if bias else None,
    }
    labels = torch.randint(0, max(n_cols, 1), shape)
    labels[torch.rand(shape) < ignored] = -100
    return {name: t if t is None else t.to(DEVICE, dtype) for name, t in inputs.items()}, labels.to(DEVICE)


def make_weights(n_cols: int, dtype: torch.dtype = torch.float32, *, zeros: float = 0.1) -> Tensor:
    """Class weights over three orders of magnitude, a fraction `zeros` of them 0."""
    weights = 10.0 ** (3.0 * torch.rand(n_cols, dtype=torch.float64) - 2.0)
    weights[torch.rand(n_cols) < zeros] = 0.0
    return weights.to(DEVICE, dtype)


def run(
    function: Callable[..., Tensor],
    inputs: Inputs,
    labels: Tensor,
    dy: Tensor | None = None,
    frozen: Iterable[str] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """{"y": the loss, "dhidden": ..., "dweight": ..., "dbias": ...}; without dy, gradients of the sum of the loss."""
    leaves = {k: t if t is None else t.detach().requires_grad_(k not in frozen) for k, t in inputs.items()}
    y = function(**leaves, labels=labels, **options)
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy) if wanted else ())
    results: dict[str, Tensor | None] = {"y": y.detach()}
    for name, leaf in leaves.items():
        results["d" + name] = next(grads) if leaf is not None and leaf.requires_grad else None
    return results


def double(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float64, None for None."""
    return None if tensor is None else tensor.double()


def expected_launches(inputs: Inputs, frozen: Iterable[str], options: dict[str, Any], rows: int | None) -> dict[str, int]:
    """One kernel per chunk, the reduction, and one scaling per gradient that is multiplied by the loss's gradient."""
    n_rows = inputs["hidden"].shape[:-1].numel()
    needed = [name for name, t in inputs.items() if t is not None and name not in frozen]
    none = options.get("reduction") == "none"
    chunks = -(-n_rows // (rows or max(n_rows, 1)))
    scaled = [] if none else needed if inputs["hidden"].numel() else [name for name in needed if name == "bias"]
    expected = {FORWARD: chunks * (2 if none and needed else 1), REDUCE: 1, SCALE: len(scaled)}
    return {kernel: n for kernel, n in expected.items() if n}


def check(
    inputs: Inputs,
    labels: Tensor,
    dy: Tensor | None = None,
    *,
    rows: int | None = None,
    frozen: Iterable[str] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """Check loss and every gradient against eager and float64, and the launches; `rows` as in chunks_of."""
    frozen, before = tuple(frozen), counts.copy()
    with chunks_of(rows):
        results = run(linear_cross_entropy, inputs, labels, dy, frozen, **options)
    assert counts - before == expected_launches(inputs, frozen, options, rows), counts - before

    eager = run(reference.linear_cross_entropy, inputs, labels, dy, frozen, **options)
    exact_options = {k: double(v) if k == "class_weights" else v for k, v in options.items() if k != "out_dtype"}
    doubles = {name: double(t) for name, t in inputs.items()}
    exact = run(reference.linear_cross_entropy, doubles, labels, double(dy), frozen, **exact_options)
    dtype = inputs["weight"].dtype
    judged = results, eager, exact
    if dtype.itemsize == 2:
        # A loss from 16-bit logits has the accuracy of a 16-bit number, in eager too, whatever its dtype.
        judged = tuple(found | {"y": found["y"].to(dtype)} for found in judged)
    assert_close(*judged, relative_fp32=None if dtype.itemsize == 2 else 1e-5)
    return results
