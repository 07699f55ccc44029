"""Registers the attention kernel under a name with "flash" in it: "fastbert_flash".

transformers and sentence-transformers ask whether the name of an attention implementation contains "flash". If so, a
flattening collator's batches are allowed: the tokens of all texts as one row, with `cu_seq_lens_q` and its companions. The
attention here reads these, as transformers' FlashAttention does, and calls the kernel on packed rows.

Three things make a name work: the attention function, its mask function, and an answer to `lazy_import_flash_attention`, which
transformers calls for every such name and which otherwise looks for a package or a repository. For the last the function that
loads repositories is wrapped; it passes all other names on.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations import hub_kernels
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from fastbert import ops
from fastbert.dispatch import falls_back, run
from fastbert.hub import flash_attention, packed
from fastbert.integrations.attention import (
    OURS,
    _foreign_keyword,
    attention_forward,
    attention_reason,
    key_mask_or_general,
)

NAME = "fastbert_flash"
KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# The parts of transformers' masks that a model which supports FlashAttention also passes to its attention as keywords.
_BY_KEYWORD = ("sliding_window_overlay", "sliding_window_bidirectional_overlay", "packed_sequence_mask_function")
_PACKED = "packed_sequence_mask_function"


def flash_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature of transformers' AttentionInterface, over padded or packed sequences.

    Sequences are packed if the call has `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, or one row whose
    `position_ids` start again. A window that excludes keys makes a general mask, for which packed sequences are padded.

    Args:
        module: the attention module; its `is_causal` (default True) holds unless the argument is given.
        query: [batch, heads, queries, head size].
        key, value: [batch, kv heads, keys, head size]; each kv head serves a group of query heads.
        attention_mask: as `flash_mask` returns it, or an additive mask [batch or 1, 1 or heads, queries, keys].
        dropout: the dropout probability.
        scaling: multiplies the scores; by default head size ** -0.5.
        is_causal: mask keys that lie behind each query.
        sliding_window: a query sees the keys fewer than this many positions away.

    Returns:
        The output [batch, queries, heads, head size], and None, or for padded sequences the weights if they are requested.

    Raises:
        ValueError: a model that does not support FlashAttention, some but not all keywords of packed sequences, or packed
            sequences together with a keyword that changes the scores.
    """
    _check_model(getattr(module, "config", None))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    general = attention_mask is not None and attention_mask.dim() == 4  # it has the window in it, as for SDPA
    bounds = _bounds_of(query, key, attention_mask, kwargs)
    if bounds is not None:
        if reason := _foreign_keyword(kwargs):
            raise ValueError(f"attn_implementation {NAME!r} on packed sequences: {reason}")
        if not general:
            return _attend_packed(module, query, key, value, attention_mask, bounds, causal, window, scaling, dropout), None
        attention_mask = _within_sequences(attention_mask, *bounds[:2])
    elif not general and not packed.covers(window, max(query.shape[2], key.shape[2]), causal):
        seen = packed.visible(query.shape[2], key.shape[2], causal, window, device=query.device)
        attention_mask = seen if attention_mask is None else seen & attention_mask[:, None, None].bool()
    return attention_forward(module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs)


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bounds: tuple[Tensor, Tensor, int, int],
    causal: bool,
    window: tuple[int, int],
    scale: float | None,
    p: float,
) -> Tensor:
    """[batch, queries, heads, head size]; the batch is one row of packed sequences, or several that are read as one."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = bounds
    by_rows = mask is None and packed.covers(window, max(longest_q, longest_k), causal)
    if by_rows and attention_reason(query, key, value, None) is None:  # otherwise `attention_forward` counts the call
        falls_back(module, None)
        more = {"cu_seqlens": cu_seqlens_k, "max_seqlen": longest_k}
        if cu_seqlens_q is not cu_seqlens_k:
            more |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": longest_q}
        out = run(module, ops.attention, q, k, v, causal=causal, scale=scale, p=p, **more)
        return out.unflatten(0, (query.shape[0], -1))
    batch = packed.padded(q, k, v, bounds, causal, window)
    seen = batch.visible
    if mask is not None:
        seen = seen & packed.pad(mask.flatten().bool(), batch.of_keys, *batch.k.shape[:2])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (batch.q, batch.k, batch.v))
    out, _ = attention_forward(module, q, k, v, seen, p, scale, causal)
    return packed.unpad(out, batch.of_queries).unflatten(0, (query.shape[0], -1))


def _bounds_of(
    query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, int, int] | None:
    """(cu_seqlens of queries and keys, int32, and the longest of both) of packed sequences, or None."""
    given = [kwargs.get(name) for name in KEYWORDS]
    if any(value is not None for value in given):
        if missing := [name for name, value in zip(KEYWORDS, given, strict=True) if value is None]:
            raise ValueError(f"{', '.join(missing)}: expected with the other bounds of packed sequences, got None")
        of_queries, of_keys, longest_q, longest_k = given
        bounds = of_queries.to(torch.int32)
        return bounds, bounds if of_keys is of_queries else of_keys.to(torch.int32), int(longest_q), int(longest_k)
    position_ids = kwargs.get("position_ids")
    if mask is not None or position_ids is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        return None
    if position_ids.shape != (1, query.shape[2]) or query.shape[2] == 0:
        return None
    return _bounds_from_positions(position_ids)


@torch.compiler.disable
def _bounds_from_positions(position_ids: Tensor) -> tuple[Tensor, Tensor, int, int] | None:
    """The bounds of sequences whose positions [1, T] start again at the smallest one; None if there is only one sequence.

    It reads the device in each layer, as transformers' FlashAttention does: the caller may write other positions into the same
    tensor, and a CUDA graph that kept the bounds of an earlier call would be wrong.
    """
    positions = position_ids[0]
    starts = (positions == positions.min()).nonzero().flatten().tolist()
    edges = sorted({0, *starts}) + [len(positions)]
    if len(edges) == 2:
        return None
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=position_ids.device)
    longest = max(b - a for a, b in zip(edges, edges[1:], strict=False))
    return cu_seqlens, cu_seqlens, longest, longest


def _within_sequences(mask: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """A mask [1, heads or 1, queries, keys], bool or additive, that also masks the keys of other sequences."""
    of_query, of_key = (
        torch.searchsorted(bounds[1:].long(), torch.arange(n, device=mask.device), right=True)
        for bounds, n in ((cu_seqlens_q, mask.shape[-2]), (cu_seqlens_k, mask.shape[-1]))
    )
    same = of_query[:, None] == of_key
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _check_model(config: Any) -> None:
    """Raise unless the model supports FlashAttention: only then it passes on all that its masks would have."""
    if config is not None and (name := _without_flash(type(config))):
        raise ValueError(
            f"attn_implementation: {name} does not support FlashAttention, so {NAME!r} may leave out what its masks say; "
            'expected another implementation, such as "fastbert"'
        )


@torch.compiler.assume_constant_result
def _without_flash(config_class: type) -> str | None:
    return _model_without_flash(config_class)


@functools.cache
def _model_without_flash(config_class: type) -> str | None:
    """The name of the model class of this config if transformers says that it does not support FlashAttention."""
    from transformers import MODEL_MAPPING

    try:
        model = MODEL_MAPPING[config_class]
    except KeyError:  # a part of a model, or code from elsewhere
        return None
    model = model[0] if isinstance(model, tuple) else model
    return None if getattr(model, "_supports_flash_attn", True) else model.__name__


def flash_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `flash_attention_forward`: a bool [batch, keys] for padding, None, or as `key_mask_or_general` in general.

    What the model passes to its attention by keyword (causality, windows, packed sequences) is left out of it.
    """
    arguments = {"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, "attention_mask": attention_mask}
    simple = mask_function is bidirectional_mask_function or mask_function is causal_mask_function
    # torch.compile cannot look into the function, and gets the mask in general, of all pairs of tokens.
    readable = not simple and not torch.compiler.is_compiling()
    if readable and (plain := _without_keywords(mask_function, batch_size)) is not None:
        mask = key_mask_or_general(mask_function=plain, **arguments, **kwargs)
        if mask is None or mask.dim() == 2:
            return mask
    return key_mask_or_general(mask_function=mask_function, **arguments, **kwargs)


def _without_keywords(mask_function: Any, batch_size: int) -> Any:
    """The causal or bidirectional function to which `mask_function` adds only windows and packing; None for any other."""
    parts = _parts(mask_function)
    if any(name == _PACKED for name, _ in parts) and batch_size != 1:  # positions are read as packing in one row only
        return None
    base = [part for name, part in parts if name not in _BY_KEYWORD]
    known = all(part is causal_mask_function or part is bidirectional_mask_function for part in base)
    if not known or not base:
        return None
    return causal_mask_function if causal_mask_function in base else bidirectional_mask_function


def _parts(mask_function: Any) -> list[tuple[str, Any]]:
    """The functions that transformers' `and_masks` joined, each with the name of the function that made it."""
    maker, _, inner = getattr(mask_function, "__qualname__", "").partition(".<locals>.")
    if getattr(mask_function, "__module__", None) != causal_mask_function.__module__ or not inner:
        return [("", mask_function)]
    if maker != "and_masks":
        return [(maker, mask_function)]
    cells = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__, strict=True))
    return [part for function in cells["mask_functions"].cell_contents for part in _parts(function)]


def _answer_for_our_name(load: Any) -> Any:
    """Wrap transformers' loader of attention kernels: under our name it finds our functions, under all others what it did."""

    @functools.wraps(load)
    def load_or_ours(attn_implementation: str, *args: Any, **kwargs: Any) -> ModuleType | None:
        return flash_attention if attn_implementation == NAME else load(attn_implementation, *args, **kwargs)

    load_or_ours.answers = NAME
    return load_or_ours


OURS[NAME] = flash_attention_forward
AttentionInterface.register(NAME, flash_attention_forward)
AttentionMaskInterface.register(NAME, flash_mask)
if getattr(hub_kernels.load_and_register_attn_kernel, "answers", None) != NAME:
    hub_kernels.load_and_register_attn_kernel = _answer_for_our_name(hub_kernels.load_and_register_attn_kernel)
