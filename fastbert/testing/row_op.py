"""Describes ops over rows: inputs x [..., H] and others of that shape, and vectors [H], one of them optional."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spec import Draw, Given, Named, Normal, OpSpec, Size


@dataclass(frozen=True, eq=False)
class RowOp(OpSpec):
    """The spec of an op over rows.

    rows: the names of the inputs of x's shape.
    vectors: the names of the inputs of a row's shape, [H].
    optional: the one of `vectors` that may be None.
    """

    rows: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    optional: str = ""

    @property
    def forward_kernel(self) -> str:
        """The name of the kernel that a forward launches."""
        return f"{self.name}_fwd_kernel"

    @property
    def backward_kernel(self) -> str:
        """The name of the kernel that a backward launches."""
        return f"{self.name}_bwd_kernel"

    @property
    def backward_kernels(self) -> tuple[str, ...]:
        """The kernels of a backward that computes every gradient, in order."""
        return (self.backward_kernel, *(("column_sums_kernel",) if self.name == "gelu_layernorm" else ()))

    def leaves(self, shape: Iterable[int], normal: Normal, scale: float = 1.0) -> Named:
        """Inputs for x of `shape`: `scale` times a normal; LayerNorm's weight is about 1 and its bias unscaled."""
        shape = tuple(shape)
        found = {name: normal(*shape) * scale for name in self.rows}
        for name in self.vectors:
            values = normal(*shape[-1:])
            plain = name == "bias" and "weight" in self.vectors
            found[name] = 1.0 + 0.3 * values if name == "weight" else values if plain else scale * values
        return found


def row_op(
    name: str,
    call: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *,
    rows: tuple[str, ...],
    vectors: tuple[str, ...],
    optional: str,
    width: str = "hidden",
    **rest: Any,
) -> RowOp:
    """The RowOp with these inputs; its calls pass all of them."""

    def inputs(
        size: Size,
        draw: Draw,
        dtype: torch.dtype,
        *,
        x_dtype: torch.dtype | None = None,
        p: float = 0.0,
        **options: Any,
    ) -> Given:
        shape = size.batch, size.seqlen, getattr(size, width)
        dtypes = {"x": x_dtype or dtype}
        leaves = {name: x.to(dtypes.get(name, dtype)) for name, x in spec.leaves(shape, draw.normal).items()}
        context: Mapping[str, Any] = options | ({"p": p, "seed": draw.seed()} if p else {})
        if x_dtype:
            context = {**context, "out_dtype": dtype}
        return Given(leaves, dict(context), draw.normal(*shape, dtype=dtype))

    names = {"rows": rows, "vectors": vectors, "optional": optional, "width": width}
    spec = RowOp(name, call, reference, inputs, **names, **rest)
    return spec
