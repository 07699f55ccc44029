"""The ops under test, each beside its reference, and the way a test calls both."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.bias_gelu import bias_gelu
from fastbert.kernels.core.launch import INTERPRETED, counts
from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
from fastbert.kernels.gelu_layernorm import gelu_layernorm
from fastbert.testing.numerics import assert_close

# Compiled where there is a GPU, Triton's interpreter elsewhere: the same tests prove both.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Inputs = dict[str, Tensor | None]


@dataclass(frozen=True)
class Op:
    """A public function, its plain-PyTorch reference, and its inputs by name: [..., H] ones, then [H] ones."""

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    rows: tuple[str, ...]
    vectors: tuple[str, ...]
    optional: str

    def __str__(self) -> str:
        return self.name

    @property
    def forward_kernel(self) -> str:
        return f"{self.name}_fwd_kernel"

    @property
    def backward_kernel(self) -> str:
        return f"{self.name}_bwd_kernel"

    @property
    def backward_kernels(self) -> tuple[str, ...]:
        """In their order, where every gradient is asked for."""
        return (self.backward_kernel, *(("column_sums_kernel",) if self.name == "gelu_layernorm" else ()))


DROPOUT_ADD_LAYERNORM = Op(
    "dropout_add_layernorm",
    dropout_add_layernorm,
    reference.dropout_add_layernorm,
    ("x", "residual"),
    ("weight", "bias", "x_bias"),
    "x_bias",
)
BIAS_GELU = Op("bias_gelu", bias_gelu, reference.bias_gelu, ("x",), ("bias",), "bias")
GELU_LAYERNORM = Op("gelu_layernorm", gelu_layernorm, reference.gelu_layernorm, ("x",), ("weight", "bias", "x_bias"), "x_bias")
OPS = (DROPOUT_ADD_LAYERNORM, BIAS_GELU, GELU_LAYERNORM)


def make_inputs(
    op: Op,
    shape: Iterable[int],
    dtype: torch.dtype = torch.float32,
    *,
    optional: bool = True,
    scale: float = 1.0,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Inputs:
    """Random inputs: `scale` times a normal, LayerNorm's weight round 1; `optional` says whether x_bias is there."""
    shape = tuple(shape)
    inputs: Inputs = {}
    for name in (*op.rows, *op.vectors):
        values = torch.randn(shape if name in op.rows else shape[-1:], dtype=torch.float64)
        if name == "weight":
            values = 1.0 + 0.3 * values
        elif name != "bias" or op is BIAS_GELU:
            values = scale * values
        inputs[name] = values.to(DEVICE, (dtypes or {}).get(name, dtype))
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
    """Bitwise equal in the interpreter. Compiled, another alignment or stride may add a row up in another order."""
    assert results.keys() == others.keys()
    for name, result in results.items():
        if INTERPRETED or result is None:
            assert result is others[name] or torch.equal(result, others[name]), name
        else:
            torch.testing.assert_close(result, others[name], msg=lambda text, name=name: f"{name}: {text}")


def double(inputs: Inputs) -> Inputs:
    return {name: t if t is None else t.double() for name, t in inputs.items()}


def seed_tensor(seed: int) -> Tensor:
    return torch.tensor(seed, dtype=torch.int64, device=DEVICE)


def drawn_mask(shape: Iterable[int], p: float, seed: Tensor) -> Tensor:
    """The keep mask (bool) that the kernel draws, read off the sum it saves: x is 1, the residual 0."""
    ones = torch.ones(tuple(shape), device=DEVICE)
    vector = ones.new_ones(ones.shape[-1:])
    _, z, _, _ = torch.ops.fastbert.dropout_add_layernorm(
        ones, torch.zeros_like(ones), vector, vector, None, seed, 1e-12, p, torch.float32, True
    )
    return z != 0


def check(
    op: Op,
    inputs: Inputs,
    dy: Tensor | None = None,
    *,
    frozen: Iterable[str] = (),
    **options: Any,
) -> dict[str, Tensor | None]:
    """Output and every gradient of the kernel against eager and float64, and one launch of each kernel."""
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
    # A float32 gradient that went through a 16-bit input or sum is a 16-bit number, in eager too.
    rounded = any(t is not None and t.element_size() == 2 for t in (dy, *inputs.values()))
    assert_close(results, eager, exact, relative_fp32=None if rounded else 1e-5)
    return results
