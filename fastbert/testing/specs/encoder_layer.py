"""encoder_layer: a whole BertLayer as one op."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import bias_gelu, dropout_add_layernorm
from fastbert.kernels.core import column_sums
from fastbert.kernels.core.launch import accumulator_torch
from fastbert.kernels.encoder_layer import encoder_layer, reference
from fastbert.kernels.encoder_layer.settings import Settings, Weights

from ..spec import ACTIVATIONS, FEED_FORWARD, HIDDEN, Draw, Given, Named, Normal, OpSpec, Size, Variant

NAME = "encoder_layer"
NORMS = ("attention_norm", "output_norm")
PROJECTIONS = ("query", "key", "value")


def flat(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, taking its weights by name."""

    def call(*, x: Tensor, settings: Settings, **rest: Any) -> Tensor:
        weights = Weights(*(rest.pop(name) for name in Weights._fields))
        return function(x, weights, settings, **rest)

    return call


def weights(hidden: int, inner: int, normal: Normal) -> Named:
    """A layer's weights by name, for which products keep the magnitude of their input."""
    of_products = {"intermediate": (inner, hidden), "output": (hidden, inner)}
    of_products |= dict.fromkeys((*PROJECTIONS, "attention_output"), (hidden, hidden))
    found = {}
    for name in Weights._fields:
        if name in of_products:
            found[name] = normal(*of_products[name]) * of_products[name][1] ** -0.5
        else:
            width = inner if name == "intermediate_bias" else hidden
            found[name] = (1.0 if name in NORMS else 0.0) + 0.3 * normal(width)
    return found


def seeds(device: torch.device | str, first: int = 1234) -> Tensor:
    """The seeds of a layer's dropouts."""
    return torch.arange(first, first + 6, dtype=torch.int64, device=device) * 0x9E3779B97F4A7C


def _inputs(size: Size, draw: Draw, dtype: torch.dtype, *, p: float = 0.0, mask: str = "none", packed: bool = False) -> Given:
    """mask: "none", "key" (random lengths) or "causal"; packed: all sequences have the full length."""
    batch, length = size.batch, size.seqlen
    shape = (size.tokens, size.hidden) if packed else (batch, length, size.hidden)
    leaves = {"x": draw.normal(*shape), **weights(size.hidden, size.inner, draw.normal)}
    settings = Settings(size.heads, attention_p=p, attention_output_p=p, output_p=p, causal=mask == "causal")
    context: dict[str, Any] = {"queries": None, "settings": settings}
    if p:
        context["seed"] = seeds(draw.device)
    if mask == "key":
        context["key_mask"] = torch.arange(length, device=draw.device) < draw.integers(1, length + 1, batch, 1)
    if packed:
        bounds = torch.arange(0, size.tokens + 1, length, dtype=torch.int32, device=draw.device)
        context |= {"cu_seqlens": bounds, "max_seqlen": length}
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    return Given(leaves, context, draw.normal(*shape, dtype=dtype))


def _variant(dtype: str, width: int, part: str = "gelu") -> Variant:
    """`part`: an activation, at the width of the feed-forward, or "norm", at the hidden size."""
    launch = _launch_norm if part == "norm" else _launch_activation
    return Variant(NAME, dtype, width, part, {"part": part}, launch=launch)


def _variants() -> Iterator[Variant]:
    """The kernels' variants that no single op launches. All others are compiled with the single ops."""
    for dtype in ("bf16", "fp16", "fp32", "mixed"):
        for width in HIDDEN:
            yield _variant(dtype, width, "norm")
        for width in FEED_FORWARD:
            yield _variant(dtype, width)
    for activation in ACTIVATIONS:
        yield _variant("bf16", 3072, activation)
        yield _variant("fp32", 3072, activation)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch_norm(variant: Variant, rows: int) -> None:
    """The gradient of the first LayerNorm, which also recomputes its output."""
    (low, dtype), width = variant.dtypes, variant.width
    vector, wide = _meta(width, dtype=dtype), accumulator_torch(dtype)
    dy, z, dresidual = (_meta(rows, width, dtype=dtype) for _ in range(3))
    dx, y = (_meta(rows, width, dtype=low) for _ in range(2))
    statistics = {name: _meta(rows, dtype=wide) for name in ("mean_ptr", "rstd_ptr")}
    work = dropout_add_layernorm.backward_work(rows, width, (width, 1), dy, dtype, 0.1)
    work.launch(
        dy,
        **{"dy_ptr": dy, "z_ptr": z, "weight_ptr": vector, "bias_ptr": vector, "seed_ptr": _meta(dtype=torch.int64)},
        **{"dx_ptr": dx, "dresidual_ptr": dresidual, "y_ptr": y, "sums_ptr": _meta(work.programs, 3, width, dtype=wide)},
        **statistics,
    )


def _launch_activation(variant: Variant, rows: int) -> None:
    """The gradient of the activation, which also recomputes its output, and the final launch of a layer's column sums."""
    (low, dtype), inner, hidden = variant.dtypes, variant.width, -(-variant.width // 4)
    h, bias, wide = _meta(rows, inner, dtype=low), _meta(inner, dtype=dtype), accumulator_torch(low)
    work, n = bias_gelu.backward_work(rows, inner, (inner, 1), (inner, 1), h, variant.options["part"])
    sums = _meta(n, inner, dtype=wide)
    work.launch(h, dy_ptr=h, x_ptr=h, bias_ptr=bias, dx_ptr=h, y_ptr=_meta(rows, inner, dtype=low), sums_ptr=sums)
    norms = _meta(n, 3 * hidden, dtype=wide)
    vectors = _meta(6 * hidden + inner, dtype=dtype)
    work = column_sums.work((n, n, n), (3 * hidden, inner, 3 * hidden), sums)
    work.launch(sums, a_ptr=norms, b_ptr=sums, c_ptr=norms, out_ptr=vectors)


SPEC = OpSpec(
    NAME,
    flat(encoder_layer),
    flat(reference.encoder_layer),
    _inputs,
    _variant,
    _variants,
    short=("bf16 3072 gelu", "bf16 768 norm"),
    width="inner",
    forms={
        "padded, dropped": {"p": 0.1, "mask": "key"},
        "causal": {"mask": "causal"},
        "packed, dropped": {"p": 0.1, "packed": True},
    },
    tables={"padded, dropped": ("column_sums",)},
    small=Size(2, 5, hidden=24, heads=3, inner=40),
    large=Size(8, 512),
)
