"""pool_rows: one row per sequence from its packed token rows, as sentence embeddings need it."""

from collections.abc import Iterator

import torch

from fastbert.kernels import reference
from fastbert.kernels.pool_rows import MODES, pool_rows

from ..spec import TOKENS, Draw, Given, OpSpec, Size, Variant

NAME = "pool_rows"
# The sizes at which the audit launches the tables: (batch, length).
SHAPES = {"long": (32, 511), "few": (2, 8191), "short": (128, 127)}


def _inputs(
    size: Size,
    draw: Draw,
    dtype: torch.dtype,
    *,
    mode: str = "mean",
    masked: bool = False,
    unread: int = 0,
    padded: int = 0,
    shape: str = "",
) -> Given:
    """The real rows of each sequence (all rows without lengths or `unread`), and `unread` spare rows in a sequence of their
    own. With `masked` some rows do not count. `padded`: a length to which the sequences are padded. `shape` names the size
    for the audit."""
    batch, seqlen = size.batch, max(size.seqlen, padded)
    lengths = torch.tensor(size.lengths or [size.seqlen] * batch)
    real = torch.arange(seqlen) < lengths[:, None]
    rows = torch.cat([real.flatten().nonzero().squeeze(1), torch.full((unread,), -1)])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0), torch.full((min(unread, 1),), len(rows))])
    context = {
        "cu_seqlens": bounds.to(draw.device, torch.int32),
        "mode": mode,
        "n_sequences": batch,
        "seqlen": seqlen,
        "index": rows.to(draw.device, torch.int32) if size.lengths or unread or padded else None,
        "mask": draw.mask(0.7, batch, seqlen) if masked else None,
    }
    x, dy = (draw.normal(n, size.hidden, dtype=dtype) for n in (len(rows), batch))
    peers = {"places": rows[: len(rows) - unread].to(draw.device), "tokens": real.to(draw.device)}
    return Given({"x": x}, context, dy, peers=peers)


def _variant(dtype: str, width: int, mode: str = "mean", shape: str = "long", masked: bool = False) -> Variant:
    label = " ".join([mode, shape, *(["masked"] * masked)])
    # The rows of a backward do not depend on the sequences' lengths.
    kernels = () if shape == "long" else ("pool_rows_fwd_kernel",)
    batch, seqlen = SHAPES[shape]
    options = {"mode": mode, "masked": masked, "unread": TOKENS - batch * seqlen, "shape": shape}
    return Variant(NAME, dtype, width, label, options, kernels)


def _variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for width in (384, 768, 1023, 1024):
            for mode in ("mean", "max"):
                yield _variant(dtype, width, mode)
    for dtype in ("bf16", "fp32"):
        for mode in MODES:
            if mode not in ("mean", "max"):
                yield _variant(dtype, 768, mode)
            yield _variant(dtype, 768, mode, masked=True)
            for shape in ("few", "short"):
                yield _variant(dtype, 768, mode, shape)


def _audited(spec: OpSpec, variant: Variant, rows: int) -> Size:
    batch, seqlen = SHAPES[variant.options["shape"]]
    return Size(batch if rows == spec.tokens else max(1, rows // seqlen), seqlen, hidden=variant.width)


SPEC = OpSpec(
    NAME,
    pool_rows,
    reference.pool_rows,
    _inputs,
    _variant,
    _variants,
    short=("bf16 768 mean long",),
    tensors={"forward": ("x",), "backward": ("dx",)},
    forms={
        "": {"unread": 2, "masked": True},
        "sqrt": {"mode": "sqrt", "unread": 2, "padded": 129},
        "weighted": {"mode": "weighted", "masked": True},
        "max": {"mode": "max", "unread": 2, "masked": True, "padded": 129},
    },
    tables={
        "": ("pool_rows_forward_128", "pool_rows_backward"),
        "sqrt": ("pool_rows_forward", "pool_rows_backward"),
        "max": ("pool_rows_forward_few", "pool_rows_backward"),
    },
    small=Size(2, 5, hidden=24, lengths=(3, 5)),
    large=Size(4, 1025, hidden=768, lengths=(1025, 3, 500, 801)),
    audited=_audited,
)
