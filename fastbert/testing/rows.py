"""Test support for the ops over rows, and the function with which tests call any op and its reference."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels.core.launch import INTERPRETED, counts
from fastbert.testing.numerics import assert_close

from .row_op import RowOp
from .specs import bias_gelu, dropout_add_layernorm, gelu_layernorm

# Compiled kernels on a GPU, Triton's interpreter elsewhere: the same tests cover both.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Inputs = dict[str, Tensor | None]


DROPOUT_ADD_LAYERNORM, BIAS_GELU, GELU_LAYERNORM = dropout_add_layernorm.SPEC, bias_gelu.SPEC, gelu_layernorm.SPEC
OPS = (DROPOUT_ADD_LAYERNORM, BIAS_GELU, GELU_LAYERNORM)


def make_inputs(
    op: RowOp,
    shape: Iterable[int],
    dtype: torch.dtype = torch.float32,
    *,
    optional: bool = True,
    scale: float = 1.0,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Inputs:
    """Random inputs: `scale` times a normal, LayerNorm's weight about 1; without `optional`, the optional one is None."""
    values = op.leaves(shape, lambda *shape: torch.randn(shape, dtype=torch.float64), scale)
    inputs: Inputs = {name: x.to(DEVICE, (dtypes or {}).get(name, dtype)) for name, x in values.items()}
    if not optional:
        inputs[op.optional] = None
    return inputs


def run(
    function: Callable[..., Tensor],
    inputs: Inputs,
    dy: Tensor | None,
    frozen: Iterable[str] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """{"y": output, "dx": gradient, ...}; a gradient is None for a frozen or absent input."""
    leaves = {k: t if t is None else t.detach().requires_grad_(k not in frozen) for k, t in inputs.items()}
    y = function(**leaves, **options)
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy) if wanted and dy is not None else ())
    results: dict[str, Tensor | None] = {"y": y.detach()}
    for name, leaf in leaves.items():
        results["d" + name] = next(grads, None) if leaf is not None and leaf.requires_grad else None
    return results


def assert_same(results: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None]) -> None:
    """Check for bitwise equality in the interpreter. Compiled, alignment or strides may change the order of a row's sum."""
    assert results.keys() == others.keys()
    for name, result in results.items():
        if INTERPRETED or result is None:
            assert result is others[name] or torch.equal(result, others[name]), name
        else:
            torch.testing.assert_close(result, others[name], msg=lambda text, name=name: f"{name}: {text}")


def double(inputs: Inputs) -> Inputs:
    """The inputs in float64."""
    return {name: t if t is None else t.double() for name, t in inputs.items()}


def seed_tensor(seed: int) -> Tensor:
    """A dropout seed, int64 [], on the device."""
    return torch.tensor(seed, dtype=torch.int64, device=DEVICE)


def drawn_mask(shape: Iterable[int], p: float, seed: Tensor) -> Tensor:
    """The keep mask (bool) that the kernel draws, read off the sum that it saves for x = 1 and residual = 0."""
    ones = torch.ones(tuple(shape), device=DEVICE)
    vector = ones.new_ones(ones.shape[-1:])
    _, z, _, _ = torch.ops.fastbert.dropout_add_layernorm(
        ones, torch.zeros_like(ones), vector, vector, None, seed, 1e-12, p, torch.float32, True
    )
    return z != 0


def check(
    op: RowOp,
    inputs: Inputs,
    dy: Tensor | None = None,
    *,
    frozen: Iterable[str] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """Check output and every gradient of the kernel against eager and float64, and one launch per kernel."""
    frozen = tuple(frozen)
    eager_options = {k: v for k, v in options.items() if k != "seed"}
    if options.get("p"):
        options.setdefault("seed", seed_tensor(1234))
        eager_options["keep"] = drawn_mask(inputs["x"].shape, options["p"], options["seed"])
    if dy is None:
        dtypes = [inputs[name].dtype for name in op.rows]
        dtype = options.get("out_dtype") or (torch.promote_types(*dtypes) if len(dtypes) == 2 else dtypes[0])
        dy = torch.randn(inputs["x"].shape, dtype=torch.float64).to(DEVICE, dtype)

    before = counts.copy()
    results = run(op.call, inputs, dy, frozen, **options)
    launched = counts - before
    differentiated = any(t is not None for name, t in results.items() if name != "y")
    summed = any(results["d" + name] is not None for name in op.vectors)
    backward = op.backward_kernels if summed else (op.backward_kernel,)
    expected = dict.fromkeys((op.forward_kernel, *(backward if differentiated else ())), 1)
    assert launched == (expected if dy.numel() else {}), launched

    eager = run(op.reference, inputs, dy, frozen, **eager_options)
    eager_options.pop("out_dtype", None)
    exact = run(op.reference, double(inputs), dy.double(), frozen, **eager_options)
    # A float32 gradient that went through a 16-bit input or sum has the accuracy of a 16-bit number, in eager too.
    rounded = any(t is not None and t.element_size() == 2 for t in (dy, *inputs.values()))
    assert_close(results, eager, exact, relative_fp32=None if rounded else 1e-5)
    return results
