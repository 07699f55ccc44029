"""attention: softmax(q k' / sqrt(D) + mask) v with dropout, on padded or packed sequences."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import attention as module
from fastbert.kernels import reference
from fastbert.kernels.attention import attention
from fastbert.kernels.core.configs import LENGTHS

from ..spec import SEQLEN, Draw, Given, OpSpec, Size, Variant

NAME = "attention"
BATCH, GROUP = 32, 3  # in the audit
SHORT = tuple(length - 1 for length in LENGTHS)  # odd lengths, one per table of short sequences
PRODUCTS = {"forward": 2, "backward": 5}  # matrix products, of 2 operations per score and column of a head, in exact arithmetic
Context = dict[str, Any]


def _inputs(
    size: Size,
    draw: Draw,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    mask: str | None = None,
    group: int = 1,
    length: int = 2**31,
    fused: bool = False,
) -> Given:
    """q, k and v of one length, with a key mask if lengths are given.

    mask: "none", "key", "causal", "general" (additive with `fused`, which is how the audit has it, else bool) or "packed".
    group: how many heads share one of k and v.
    length: the length of the longest sequence.
    fused: q, k and v are views of one product, as concatenated projections return them.
    """
    seqlen = min(size.seqlen, length)
    shape = size.batch, seqlen, size.heads, size.head_size
    heads = [size.heads, size.heads // group, size.heads // group]
    if fused:
        qkv = draw.normal(size.batch, seqlen, sum(heads), size.head_size, dtype=dtype).split(heads, -2)
    else:
        qkv = [draw.normal(size.batch, seqlen, n, size.head_size, dtype=dtype) for n in heads]
    leaves, dy = dict(zip("qkv", qkv, strict=True)), draw.normal(*shape, dtype=dtype)
    mask = mask or ("key" if size.lengths else "none")
    context: Context = {"p": p, "seed": draw.seed()} if p else {}
    if mask == "key":
        of_keys = _of_keys(size, seqlen, draw)
        context |= of_keys
        if "key_bounds" in of_keys:  # lengths are known: nothing reads the other rows
            dy = dy * of_keys["key_mask"][:, :, None, None]
    elif mask == "causal":
        context["causal"] = True
    elif mask == "general":
        rows = size.batch, 1, seqlen, seqlen
        context["mask"] = draw.normal(*rows, dtype=dtype) if fused else draw.mask(0.9, *rows)
    elif mask == "packed":
        leaves, dy = {name: x.flatten(0, 1) for name, x in leaves.items()}, dy.flatten(0, 1)
        bounds = torch.arange(0, size.batch * seqlen + 1, seqlen, dtype=torch.int32, device=draw.device)
        context |= {"cu_seqlens": bounds, "max_seqlen": seqlen}
    return Given(leaves, context, dy, peers=_for_peers(size, context, draw))


def _of_keys(size: Size, seqlen: int, draw: Draw) -> Context:
    """The key mask, with its bounds if lengths are known."""
    places = torch.arange(seqlen, device=draw.device)
    if size.lengths is None:
        return {"key_mask": places < draw.integers(1, seqlen + 1, size.batch, 1)}
    key_mask = places < torch.tensor(size.lengths, device=draw.device)[:, None]
    return {"key_mask": key_mask, "key_bounds": reference.key_bounds(key_mask)}


def _for_peers(size: Size, context: Context, draw: Draw) -> Context:
    """The lengths in the forms that other implementations take."""
    given = size.lengths or (size.seqlen,) * size.batch
    lengths = torch.tensor(given, device=draw.device)
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(torch.int32)
    key_mask = context.get("key_mask")
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return {"lengths": lengths, "cu_seqlens": starts, "max_seqlen": max(given), "mask": mask}


def _variant(dtype: str, width: int, p: float = 0.0, mask: str = "none", length: int = SEQLEN, sums: bool = False) -> Variant:
    """mask "grouped" is "key" with fewer heads of k and v. `sums`: the backward of short sequences also sums the projections'
    bias gradients, as in a layer."""
    label = f"{mask} p={p}" + (f" {length}" if length != SEQLEN else "") + (" sums" if sums else "")
    group = GROUP if mask == "grouped" else 1
    options = {"p": p, "mask": "key" if mask == "grouped" else mask, "length": length, "group": group, "fused": True}
    return Variant(NAME, dtype, width, label, options, launch=_launch_with_sums if sums else None)


def _variants() -> Iterator[Variant]:
    variant = _variant
    for mask in ("none", "key", "causal", "general", "packed"):
        for p in (0.0, 0.1):
            yield variant("bf16", 64, p=p, mask=mask)
        yield variant("bf16", 128, mask=mask)
    yield variant("bf16", 128, p=0.1, mask="key")
    for head_size in (32, 40, 96, 256):
        yield variant("bf16", head_size, p=0.1, mask="key")
    for head_size in (64, 128):
        for p in (0.0, 0.1):
            yield variant("bf16", head_size, p=p, mask="grouped")
    yield variant("bf16", 256, p=0.1, mask="grouped")
    yield variant("fp32", 64, p=0.1, mask="grouped")
    for head_size, p in ((24, 0.0), (40, 0.1), (72, 0.1)):
        yield variant("fp16", head_size, p=p, mask="key")
    for dtype in ("fp16", "fp32"):
        for head_size in (64, 128):
            for p in (0.0, 0.1):
                yield variant(dtype, head_size, p=p, mask="key")
    for mask in ("none", "key", "causal", "packed"):
        for p in (0.0, 0.1):
            yield variant("bf16", 64, p=p, mask=mask, length=SHORT[-1])
    for length in SHORT[:-1]:
        for p in (0.0, 0.1):
            yield variant("bf16", 64, p=p, mask="key", length=length)
    for head_size in (32, 40):
        yield variant("fp16", head_size, p=0.1, mask="key", length=SHORT[-1])
    for length in SHORT:
        yield variant("bf16", 64, p=0.1, mask="key", length=length, sums=True)
    yield variant("bf16", 64, p=0.1, mask="packed", length=SHORT[-1], sums=True)


def _launch_with_sums(variant: Variant, rows: int) -> None:
    given = SPEC.on_meta(variant, rows)
    q, k, v = given.leaves.values()
    options = dict.fromkeys(module.Inputs._fields) | {"causal": False, "scale": q.shape[-1] ** -0.5} | given.context
    bounds = options["cu_seqlens"]
    geometry = module.geometry_of(module.Inputs(**options | {"q": q, "k": k, "v": v, "p": variant.options["p"]}))
    dout, row = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.stride(-3)
    module.backward_short_work(geometry, q, module._strides(dout), row, row, False).launch(
        q,
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout, "dq_ptr": q, "dk_ptr": k, "dv_ptr": v},
        **{f"{name}_ptr": given.context.get(name) for name in ("key_mask", "key_bounds", "seed")},
        **dict.fromkeys(("cu_seqlens_q_ptr", "cu_seqlens_k_ptr"), bounds),
        logsumexp_ptr=q.new_empty(1, geometry.n_heads, geometry.n_rows, dtype=torch.float32),
        sums_ptr=q.new_empty(geometry.sequences, 3 * geometry.n_heads * geometry.head_size, dtype=torch.float32),
    )


def _audited(spec: OpSpec, variant: Variant, rows: int) -> Size:
    """BERT-base's heads, with lengths if there is a key mask."""
    length, of_keys = variant.options["length"], variant.options["mask"] == "key"
    return Size(rows, length, head_size=variant.width, lengths=(length,) * rows if of_keys else None)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, key_bounds: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """The op as transformers' eager attention computes it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), p)
    return (weights @ v).transpose(1, 2)


_TABLES = ("attention_forward", "attention_backward_kv", "attention_backward_q")
SPEC = OpSpec(
    NAME,
    attention,
    reference.attention,
    _inputs,
    _variant,
    _variants,
    short=tuple(f"bf16 64 key p={rest}" for rest in ("0.0", "0.1", "0.1 127", "0.1 127 sums")),
    width="head_size",
    eager=_eager,
    tensors={"forward": ("q", "k", "v", "out"), "backward": ("q", "k", "v", "out", "dout", "dq", "dk", "dv")},
    operations=lambda direction, size: PRODUCTS[direction] * 2 * size.tokens * size.seqlen * size.heads * size.head_size,
    forms={
        "padded, dropped": {"p": 0.1, "mask": "key"},
        "causal": {"mask": "causal"},
        "general mask": {"mask": "general"},
        "packed, dropped": {"p": 0.1, "mask": "packed"},
        "grouped, dropped": {"p": 0.1, "group": 2},
        "short, dropped": {"p": 0.1, "length": LENGTHS[-1]},
    },
    tables={
        "padded, dropped": (*_TABLES, "attention_forward_128"),  # at the lengths that it serves, "short, dropped" launches it
        "short, dropped": tuple(f"attention_backward_short_{length}" for length in LENGTHS),
        "general mask": tuple(f"{table}_masked" for table in _TABLES),
        "grouped, dropped": ("attention_forward", "attention_backward_kv_grouped", "attention_backward_q"),
    },
    dropout=True,
    small=Size(2, 5, heads=2, head_size=8),
    large=Size(8, 512),
    audited=_audited,
    tokens=BATCH,
    elements=lambda spec, variant: BATCH * variant.options["length"] * Size(1, 1).heads * variant.width,
)
