"""row_counts: how many tokens of each sequence are real, and how many are read."""

from collections.abc import Iterator

import torch

from fastbert.kernels import reference
from fastbert.kernels.row_counts import row_counts

from ..spec import SEQLEN, Draw, Given, OpSpec, Size, Variant

NAME = "row_counts"


def _inputs(size: Size, draw: Draw, dtype: torch.dtype) -> Given:
    masks = (draw.mask(rate, size.batch, size.seqlen) for rate in (0.7, 0.7))
    return Given({}, dict(zip(("tokens", "read"), masks, strict=True)))


def _variant(dtype: str = "bool", width: int = SEQLEN) -> Variant:
    return Variant(NAME, dtype, width, "rows")


def _variants() -> Iterator[Variant]:
    yield _variant()


SPEC = OpSpec(
    NAME,
    row_counts,
    reference.row_counts,
    _inputs,
    _variant,
    _variants,
    short=("bool 509 rows",),
    tables={"": ("mask_rows",)},
    small=Size(3, 7),
    large=Size(64, 1500),
    audited=lambda spec, variant, rows: Size(rows, variant.width),
)
