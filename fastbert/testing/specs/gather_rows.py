"""gather_rows: the tokens of a padded batch, packed; its backward writes gradients back, and zeros between them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.gather_rows import gather_rows

from ..spec import Draw, Given, OpSpec, Size, Variant

NAME = "gather_rows"


def _inputs(size: Size, draw: Draw, dtype: torch.dtype, *, unread: int = 0) -> Given:
    """The real rows of each sequence (all rows without lengths), and `unread` index entries that name no row."""
    x = draw.normal(size.tokens, size.hidden, dtype=dtype)
    if size.lengths is None:
        index = inverse = torch.arange(size.tokens, dtype=torch.int32, device=draw.device)
    else:
        real = (torch.arange(size.seqlen) < torch.tensor(size.lengths)[:, None]).flatten()
        index = real.nonzero().squeeze(1).to(draw.device, torch.int32)
        inverse = torch.where(real, real.cumsum(0) - 1, -1).to(draw.device, torch.int32)
    index = torch.cat([index, index.new_full((unread,), -1)])
    return Given({"x": x}, {"index": index, "inverse": inverse}, draw.normal(len(index), size.hidden, dtype=dtype))


def _variant(dtype: str, width: int) -> Variant:
    return Variant(NAME, dtype, width, "rows")


def _variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (384, 768, 1023, 1024):
            yield _variant(dtype, width)


def _eager(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """The op as transformers' own unpadding does it; the backward of indexing scatters."""
    return x[index]


SPEC = OpSpec(
    NAME,
    gather_rows,
    reference.gather_rows,
    _inputs,
    _variant,
    _variants,
    eager=_eager,
    short=("bf16 768 rows",),
    tensors={"forward": ("x", "y"), "backward": ("dy", "dx")},
    forms={"": {"unread": 2}},
    tables={"": ("gather_rows",)},
    small=Size(2, 5, hidden=24, lengths=(3, 4)),
    large=Size(4, 1025, hidden=768, lengths=(1025, 3, 500, 801)),
)
