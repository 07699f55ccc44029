"""packed_rows: which rows of a batch are packed and which are read, as an index and its inverse."""

from collections.abc import Iterator

import torch

from fastbert.kernels import reference
from fastbert.kernels.packed_rows import packed_rows

from ..spec import SEQLEN, Draw, Given, OpSpec, Size, Variant

NAME = "packed_rows"
BATCH = 32  # the audit's; an int32 counts the rows of a batch


def _inputs(size: Size, draw: Draw, dtype: torch.dtype) -> Given:
    """Both masks, capacity for every row, and the comparison with the counts."""
    tokens, read = (draw.mask(0.7, size.batch, size.seqlen) for _ in range(2))
    masks = {"counts": reference.row_counts(tokens, read), "tokens": tokens, "read": read}
    capacities = {"capacity": size.tokens, "longest": size.seqlen, "exact": False}
    of_read = {f"read_{name}": value for name, value in capacities.items()}
    return Given({}, {**masks, "seqlen": size.seqlen, **capacities, **of_read, "first": False, "check": True})


def _variant(dtype: str = "bool", width: int = SEQLEN) -> Variant:
    return Variant(NAME, dtype, width, "rows")


def _variants() -> Iterator[Variant]:
    yield _variant()


SPEC = OpSpec(
    NAME,
    packed_rows,
    reference.packed_rows,
    _inputs,
    _variant,
    _variants,
    short=("bool 509 rows",),
    tables={"": ("packed_rows",)},
    small=Size(3, 7),
    large=Size(64, 1500),
    audited=lambda spec, variant, rows: Size(BATCH, variant.width),
)
