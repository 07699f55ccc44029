"""Test support for the layer op: its inputs by name, its dropout masks, and the check of a call."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels.core.launch import counts
from fastbert.kernels.encoder_layer import encoder_layer, plain, reference, unchecked
from fastbert.kernels.encoder_layer.settings import Layout, Settings, Weights
from fastbert.testing.numerics import assert_close
from fastbert.verify import _compare_all

from .rows import DEVICE, Inputs, double, run
from .specs import encoder_layer as spec
from .specs.encoder_layer import PROJECTIONS, flat, weights

NAMES = Weights._fields
Results = dict[str, Tensor | None]

FORWARD = Counter({"attention_fwd_kernel": 1, "dropout_add_layernorm_fwd_kernel": 2, "bias_gelu_fwd_kernel": 1})
BACKWARD = Counter({"dropout_add_layernorm_bwd_kernel": 2, "bias_gelu_bwd_kernel": 1, "column_sums_kernel": 1})
OF_ATTENTION = Counter(["attention_bwd_q_kernel", "attention_bwd_kv_kernel"])
OF_SHORT_ATTENTION = Counter(["attention_bwd_short_kernel"])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A standard normal tensor, drawn in float64 and rounded."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def make_inputs(
    shape: Iterable[int],
    inner: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    queries: int | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Inputs:
    """x of `shape`, `queries` rows that are read, and weights for which products keep the magnitude of their input."""
    shape = tuple(shape)
    hidden = shape[-1]
    inputs: Inputs = {"x": normal(*shape, dtype=dtype)}
    inputs["queries"] = None if queries is None else normal(queries, hidden, dtype=dtype)
    drawn = weights(hidden, inner, lambda *shape: torch.randn(shape, dtype=torch.float64))
    inputs |= {name: values.to(DEVICE, weight_dtype or dtype) for name, values in drawn.items()}
    return inputs


def seeds(first: int = 1234) -> Tensor:
    """The seeds of a layer's dropouts, on the device."""
    return spec.seeds(DEVICE, first)


def direct(
    x: Tensor,
    weights: Weights,
    settings: Settings,
    *,
    product_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    **layout: Any,
) -> Tensor:
    """Call the layer op as a patched model does."""
    return unchecked(x, weights, settings, Layout(**layout), product_dtype, norm_dtype, seed)


def kept(inputs: Mapping[str, Tensor | None], settings: Settings, options: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """The keep mask of each dropout, drawn by plain PyTorch; tests/faults verifies that the kernels draw the same."""
    x, queries = inputs["x"], inputs["queries"]
    bounds, longest = options.get("cu_seqlens"), options.get("max_seqlen")
    sequences, longest = (len(bounds) - 1, longest) if bounds is not None else x.shape[:2]
    longest_q = longest if queries is None else options["max_seqlen_q"]
    shape = (x if queries is None else queries).shape
    if options.get("index") is not None:
        shape = torch.Size((len(options["index"]), shape[-1]))
    return plain.keeps(options.get("seed"), settings, sequences, longest_q, longest, shape)


def launched(inputs: Mapping[str, Tensor | None], frozen: Iterable[str], options: Mapping[str, Any]) -> Counter[str]:
    """The expected launches of a call with rows; attention's backward runs only if a gradient needs it."""
    needed = {name for name, tensor in inputs.items() if tensor is not None} - set(frozen)
    found = FORWARD + (BACKWARD if needed else Counter())
    through = bool(needed & {"x", "queries", *PROJECTIONS, *(f"{name}_bias" for name in PROJECTIONS)})
    if through:
        found += OF_SHORT_ATTENTION if _is_short(inputs["x"], options) else OF_ATTENTION
    if options.get("index") is not None:
        found["gather_rows_kernel"] = 2 + through + ("x" in needed)
    if options.get("key_mask") is not None and options.get("key_bounds") is None:
        found["key_bounds_kernel"] = 1
    return found


def _is_short(x: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether one kernel computes all gradients of attention; heads are small here."""
    longest = x.shape[1] if x.dim() == 3 else options["max_seqlen"]
    return (options.get("product_dtype") or x.dtype).itemsize == 2 and longest <= 128


def check(
    inputs: Inputs,
    settings: Settings,
    dy: Tensor | None = None,
    *,
    frozen: Iterable[str] = (),
    cancels: bool = False,
    **options: Any,
) -> Results:
    """Check output and every gradient against eager and float64 with the same dropout masks, and one launch per kernel.

    cancels: rows see a key or two, so that the gradients of query and key are roundings of what cancelled.
    """
    frozen = tuple(frozen)
    if settings.drops:
        options.setdefault("seed", seeds())
    plainly = {name: value for name, value in options.items() if name not in ("seed", "key_bounds")}
    plainly |= {"settings": settings, "keep": kept(inputs, settings, options)}
    if dy is None:
        dy = torch.randn_like(run(flat(reference.encoder_layer), inputs, None, NAMES, **plainly)["y"])

    before = counts.copy()
    results = run(flat(encoder_layer), inputs, dy, frozen, settings=settings, **options)
    found = counts - before
    if inputs["x"].numel() and dy.numel():
        assert found == launched(inputs, frozen, options), found

    eager = run(flat(reference.encoder_layer), inputs, dy, frozen, **plainly)
    exactly = plainly | {"product_dtype": None, "norm_dtype": None}
    exact = run(flat(reference.encoder_layer), double(inputs), dy.double(), frozen, **exactly)
    low = options.get("product_dtype") or inputs["x"].dtype
    rounded = low.itemsize == 2 or inputs["query"].element_size() == 2
    assert_right(*(together(found, cancels) for found in (results, eager, exact)), rounded=rounded)
    return results


def assert_right(results: Results, eager: Results, exact: Results, *, rounded: bool) -> None:
    """Apply the rule of fastbert.numerics; in 16 bits, in the form that `fastbert verify` applies to whole models.

    Among the seventeen tensors of a small 16-bit call, eager computes one nearly exactly by luck.
    """
    if not rounded:
        return assert_close(results, eager, exact)
    present = [name for name, tensor in results.items() if tensor is not None]
    assert present == [name for name, tensor in eager.items() if tensor is not None]
    compared = _compare_all(*({name: found[name] for name in present} for found in (results, eager, exact)))
    wrong = [f"{c.name}: {c.reason}" for c in compared if not c.ok]
    assert not wrong, "\n".join(wrong)


def together(results: Results, cancels: bool = False) -> Results:
    """Results with the gradients of the projections' biases joined into one tensor.

    The key bias's gradient cancels in the softmax, so it has no magnitude of its own. With `cancels`, for sequences of one
    or two keys, the gradients of the projections' weights are joined as well.
    """
    results = dict(results)
    for parts in ([f"d{name}_bias" for name in PROJECTIONS], *([[f"d{name}" for name in PROJECTIONS]] if cancels else [])):
        found = [results.pop(name) for name in parts]
        present = [gradient for gradient in found if gradient is not None]
        results["+".join(parts)] = torch.cat(present) if present else None
    return results
