"""key_bounds: where the valid keys of each row of a mask begin and end."""

from collections.abc import Iterator

import torch

from fastbert.kernels import reference
from fastbert.kernels.key_bounds import key_bounds

from ..spec import SEQLEN, Draw, Given, OpSpec, Size, Variant

NAME = "key_bounds"


def _inputs(size: Size, draw: Draw, dtype: torch.dtype) -> Given:
    return Given({}, {"key_mask": draw.mask(0.7, size.batch, size.seqlen)})


def _variant(dtype: str = "bool", width: int = SEQLEN) -> Variant:
    return Variant(NAME, dtype, width, "rows")


def _variants() -> Iterator[Variant]:
    yield _variant()


SPEC = OpSpec(
    NAME,
    key_bounds,
    reference.key_bounds,
    _inputs,
    _variant,
    _variants,
    short=("bool 509 rows",),
    tables={"": ("mask_rows",)},
    small=Size(3, 7),
    large=Size(64, 1500),
    audited=lambda spec, variant, rows: Size(rows, variant.width),
)
