"""linear_cross_entropy: BERT's decoder over labelled rows and its loss, including the bias."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import linear_cross_entropy as module
from fastbert.kernels import reference
from fastbert.kernels.linear_cross_entropy import chunked, linear_cross_entropy
from fastbert.kernels.linear_cross_entropy import rows as kernels

from ..spec import Draw, Given, OpSpec, Size, Variant

NAME = "linear_cross_entropy"
VOCABULARY, MULTILINGUAL, CASED = 30522, 119547, 28996  # BERT's models
PRODUCTS = {"forward": 1, "backward": 2}  # of 2 operations per token, element of hidden and class


@contextmanager
def chunks_of(rows: int | None) -> Iterator[None]:
    """With a number, use chunks of so many rows whose gradients are formed in the forward, as for a batch of thousands."""
    if rows is None:
        yield
        return
    with (
        patch.object(module, "max_kept_rows", lambda *sizes: -1),
        patch.object(chunked, "rows_per_chunk", lambda *sizes: rows),
    ):
        yield


def _inputs(size: Size, draw: Draw, dtype: torch.dtype, *, ignored: float = 0.0, formed: bool = False, **options: Any) -> Given:
    """One row per token, each with a label: a head has already left out rows without one.

    ignored: the fraction of labels that are -100.
    formed: three chunks, whose gradients are formed in the forward.
    """
    rows, classes = size.tokens, size.vocabulary
    leaves = {
        "hidden": draw.normal(rows, size.hidden),
        "weight": draw.normal(classes, size.hidden) / size.hidden**0.5,
        "bias": draw.normal(classes),
    }
    labels = draw.integers(0, classes, rows)
    if ignored:
        labels = labels.masked_fill(draw.mask(ignored, rows), -100)
    of_losses = (rows,) if options.get("reduction") == "none" else ()
    dy = torch.ones(of_losses, dtype=dtype, device=draw.device)
    within = partial(chunks_of, -(-rows // 3) if formed else None)
    return Given({name: x.to(dtype) for name, x in leaves.items()}, {"labels": labels, **options}, dy, within)


def _variant(dtype: str, width: int, part: str = "gradient") -> Variant:
    """`part`: one of the kernels between the products, with its options."""
    return Variant(NAME, dtype, width, part, {"part": part}, launch=_launch)


def _variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        yield _variant(dtype, VOCABULARY)
        yield _variant(dtype, 768, "scale")
    for part in ("loss", "smoothing", "weights", "rows"):
        yield _variant("bf16", VOCABULARY, part)
    for width in (CASED, MULTILINGUAL):
        yield _variant("bf16", width)
    yield _variant("bf16", 768, "sums")
    yield _variant("fp32", 1, "reduce")


def _launch(variant: Variant, rows: int) -> None:
    """Launch the variant's kernel on a chunk of so many rows."""
    part, width, (_, dtype) = variant.options["part"], variant.width, variant.dtypes

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = meta(kernels.padded(width)) if part == "weights" else None
    smoothing = 0.1 if part in ("smoothing", "weights") else 0.0
    targets = kernels.Targets(meta(rows, dtype=torch.int64), weights, None, -100, smoothing)
    if part == "reduce":
        kernels.launch_reduce(meta(rows), targets, VOCABULARY, "mean", meta(dtype=torch.bfloat16), meta())
    elif part in ("scale", "sums"):
        x = meta(rows, width, dtype=torch.float32 if part == "sums" else dtype)
        kernels.scaled(x, meta(dtype=dtype), meta(), dtype)
    else:
        stride = kernels.padded(width)
        logits, bias = meta(rows, stride, dtype=dtype)[:, :width], meta(stride, dtype=dtype)
        dlosses = meta(rows, dtype=dtype) if part == "rows" else None
        scale = kernels.gradient_scale(dtype)
        kernels.launch_rows(logits, bias, targets, meta(rows), dlosses, part != "loss", scale)


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The op as BertForMaskedLM computes it."""
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


SPEC = OpSpec(
    NAME,
    linear_cross_entropy,
    reference.linear_cross_entropy,
    _inputs,
    _variant,
    _variants,
    short=("bf16 30522 gradient",),
    width="vocabulary",
    eager=_eager,
    # The weight is not among them, but the op's floor is that of its operations.
    tensors={"forward": ("hidden",), "backward": ("hidden", "dhidden")},
    operations=lambda direction, size: PRODUCTS[direction] * 2 * size.tokens * size.hidden * size.vocabulary,
    forms={
        "kept": {"ignored": 0.3},
        "formed": {"ignored": 0.3, "formed": True},
        "none": {"ignored": 0.3, "reduction": "none"},
    },
    tables={
        "kept": ("linear_cross_entropy", "linear_cross_entropy_scale"),
        "none": ("linear_cross_entropy", "linear_cross_entropy_reduce"),
    },
    large=Size(1, 1500, hidden=128),
)
