"""What the audit compiles: for each op the variants that ship, and how to launch one of them.

A variant is launched through the op's own launchers with tensors on the meta device, forward then backward, so what
is compiled is what a training step would run. A new op adds one entry to CASES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert.testing.spec import ACTIVATIONS, DTYPES, FEED_FORWARD, HIDDEN, SEQLEN, TOKENS
from fastbert.testing.specs import SPECS

BATCH, HEADS, GROUP = 32, 12, 3  # attention's
SHORT_SEQLENS = 31, 63, 127  # one for each table of short sequences
EMBEDDED = 127  # the length of embedded sequences, of which TOKENS is a multiple


@dataclass(frozen=True)
class Variant:
    """dtype "mixed" is autocast: x in bf16, LayerNorm's input, output and weights in fp32.

    width is the row's, for attention the head size; mask is attention's: none, key, causal, general, packed or
    grouped, which is key with fewer heads of keys and values. length is that of attention's sequences, of which short ones
    have kernels of their own; with "sums" as activation they add up the projections' bias gradients, as in a layer.
    """

    op: str
    dtype: str
    width: int
    p: float = 0.0
    activation: str = "gelu"
    mask: str = "none"
    length: int = SEQLEN

    @property
    def name(self) -> str:
        dropped = self.op in ("dropout_add_layernorm", "embedding_layernorm") and self.activation == "gelu"
        extra = f"p={self.p}" if dropped else self.activation
        if self.op == "gather_rows":
            extra = "rows"
        if self.op == "attention":
            extra = f"{self.mask} p={self.p}" + (f" {self.length}" if self.length != SEQLEN else "")
            extra += " sums" if self.activation == "sums" else ""
        return f"{self.op} {self.dtype} {self.width} {extra}"


@dataclass(frozen=True)
class Case:
    variants: Callable[[], Iterator[Variant]]
    of: Callable[[Variant], None]

    def launch(self, variant: Variant, rows: int | None = None) -> None:
        self.of(variant)

    def variant(self, *arguments: Any, **options: Any) -> Variant:
        return Variant(next(self.variants()).op, *arguments, **options)

    def elements(self, spec: Any, variant: Variant) -> int:
        return TOKENS * variant.width


SHORT = (
    "feed_forward bf16 3072 gelu",
    "adamw fp32 1 plain",
    "linear_cross_entropy bf16 30522 gradient",
    "encoder_layer bf16 3072 gelu",
    "encoder_layer bf16 768 norm",
)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtypes(variant: Variant) -> tuple[torch.dtype, torch.dtype]:
    """Of x, and of the rest."""
    if variant.dtype == "mixed":
        return torch.bfloat16, torch.float32
    return DTYPES[variant.dtype], DTYPES[variant.dtype]


def _feed_forward_variants() -> Iterator[Variant]:
    variant = partial(Variant, "feed_forward")
    for dtype in ("bf16", "fp16"):
        for width in FEED_FORWARD[:3]:
            yield variant(dtype, width)
    yield variant("bf16", 3072, activation="relu")


def _feed_forward(variant: Variant) -> None:
    """The products with epilogues, which are off as shipped. All else that the op launches is bias_gelu's."""
    from fastbert.kernels import feed_forward as op

    hidden, inner = variant.width // 4, variant.width
    x, weight, bias = (_meta(*shape, dtype=DTYPES[variant.dtype]) for shape in ((TOKENS, hidden), (inner, hidden), (inner,)))
    _, h = op._launch_product(x, weight, bias, variant.activation, True)
    op._launch_gradient(x, weight.t(), bias, h, variant.activation)


def _adamw_variants() -> Iterator[Variant]:
    """Of dtype mixed: a bf16 parameter with float32 state and master. The variant's name stands as its `activation`."""
    variant = partial(Variant, "adamw", width=1)
    for dtype in ("bf16", "fp16", "fp32", "mixed"):
        for extra in ("plain", "amsgrad", "scaled"):
            yield variant(dtype, activation=extra)
    yield variant("fp64", activation="plain")


def _adamw(variant: Variant) -> None:
    from fastbert.kernels import adamw as op
    from fastbert.kernels.adamw.tables import Hyperparameters, Parameter

    dtype, state = _dtypes(variant)
    big = partial(_meta, TOKENS)
    parameter = Parameter(
        *(big(dtype=d) for d in (dtype, dtype, state, state)),
        _meta(),
        big(dtype=state) if variant.activation == "amsgrad" else None,
        big(dtype=state) if variant.dtype == "mixed" else None,
    )
    scale = _meta() if variant.activation == "scaled" else None
    op.adamw([parameter], [Hyperparameters()], grad_scale=scale, found_inf=scale)


def _linear_cross_entropy_variants() -> Iterator[Variant]:
    """BERT's vocabularies, uncased, cased and multilingual. The variant's name stands as its `activation`."""
    variant = partial(Variant, "linear_cross_entropy")
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        yield variant(dtype, 30522, activation="gradient")
        yield variant(dtype, 768, activation="scale")
    for extra in ("loss", "smoothing", "weights", "rows"):
        yield variant("bf16", 30522, activation=extra)
    for width in (28996, 119547):
        yield variant("bf16", width, activation="gradient")
    yield variant("bf16", 768, activation="sums")
    yield variant("fp32", 1, activation="reduce")


def _linear_cross_entropy(variant: Variant) -> None:
    """One of the kernels that stand between the products, on a chunk of TOKENS rows."""
    from fastbert.kernels.linear_cross_entropy import rows as op

    dtype, extra = DTYPES[variant.dtype], variant.activation
    weights = _meta(op.padded(variant.width)) if extra == "weights" else None
    smoothing = 0.1 if extra in ("smoothing", "weights") else 0.0
    targets = op.Targets(_meta(TOKENS, dtype=torch.int64), weights, None, -100, smoothing)
    if extra == "reduce":
        op.launch_reduce(_meta(TOKENS), targets, 30522, "mean", _meta(dtype=torch.bfloat16), _meta())
    elif extra in ("scale", "sums"):
        x = _meta(TOKENS, variant.width, dtype=torch.float32 if extra == "sums" else dtype)
        op.scaled(x, _meta(dtype=dtype), _meta(), dtype)
    else:
        stride = op.padded(variant.width)
        logits = _meta(TOKENS, stride, dtype=dtype)[:, : variant.width]
        losses = _meta(TOKENS)
        dlosses = _meta(TOKENS, dtype=dtype) if extra == "rows" else None
        bias = _meta(stride, dtype=dtype)
        op.launch_rows(logits, bias, targets, losses, dlosses, extra != "loss", op.gradient_scale(dtype))


def _encoder_layer_variants() -> Iterator[Variant]:
    variant = partial(Variant, "encoder_layer")
    for dtype in ("bf16", "fp16", "fp32", "mixed"):
        for width in HIDDEN:
            yield variant(dtype, width, p=0.1, activation="norm")
        for width in FEED_FORWARD:
            yield variant(dtype, width)
    for activation in ACTIVATIONS:
        yield variant("bf16", 3072, activation=activation)
        yield variant("fp32", 3072, activation=activation)
    yield variant("fp64", 3072)


def _norm_made_again(variant: Variant) -> None:
    from fastbert.kernels import dropout_add_layernorm as op
    from fastbert.kernels.core.launch import accumulator_torch

    low, dtype = _dtypes(variant)
    width, vector, wide = variant.width, _meta(variant.width, dtype=dtype), accumulator_torch(dtype)
    dy, z, dresidual = (_meta(TOKENS, width, dtype=dtype) for _ in range(3))
    dx, y = (_meta(TOKENS, width, dtype=low) for _ in range(2))
    statistics = {name: _meta(TOKENS, dtype=wide) for name in ("mean_ptr", "rstd_ptr")}
    work = op.backward_work(TOKENS, width, (width, 1), dy, dtype, variant.p)
    work.launch(
        dy,
        **{"dy_ptr": dy, "z_ptr": z, "weight_ptr": vector, "bias_ptr": vector, "seed_ptr": _meta(dtype=torch.int64)},
        **{"dx_ptr": dx, "dresidual_ptr": dresidual, "y_ptr": y, "sums_ptr": _meta(work.programs, 3, width, dtype=wide)},
        **statistics,
    )


def _encoder_layer(variant: Variant) -> None:
    """What no op launches alone: at the hidden size ("norm") the gradient of the first LayerNorm, which makes its output again;
    at the width of the feed-forward that of the activation, likewise, and the end of all column sums of a layer. All else
    that it launches is compiled with the other ops."""
    from fastbert.kernels import bias_gelu
    from fastbert.kernels.core import column_sums
    from fastbert.kernels.core.launch import accumulator_torch

    if variant.activation == "norm":
        return _norm_made_again(variant)
    low, dtype = _dtypes(variant)
    hidden, inner = -(-variant.width // 4), variant.width
    h, bias, wide = _meta(TOKENS, inner, dtype=low), _meta(inner, dtype=dtype), accumulator_torch(low)
    work, rows = bias_gelu.backward_work(TOKENS, inner, (inner, 1), (inner, 1), h, variant.activation)
    sums = _meta(rows, inner, dtype=wide)
    work.launch(h, dy_ptr=h, x_ptr=h, bias_ptr=bias, dx_ptr=h, y_ptr=_meta(TOKENS, inner, dtype=low), sums_ptr=sums)
    norms = _meta(rows, 3 * hidden, dtype=wide)
    vectors = _meta(6 * hidden + inner, dtype=dtype)
    work = column_sums.work((rows, rows, rows), (3 * hidden, inner, 3 * hidden), sums)
    work.launch(sums, a_ptr=norms, b_ptr=sums, c_ptr=norms, out_ptr=vectors)


CASES: dict[str, Any] = {
    **SPECS,
    "encoder_layer": Case(_encoder_layer_variants, _encoder_layer),
    "feed_forward": Case(_feed_forward_variants, _feed_forward),
    "adamw": Case(_adamw_variants, _adamw),
    "linear_cross_entropy": Case(_linear_cross_entropy_variants, _linear_cross_entropy),
}
