"""What sentence-transformers' Pooling reads of a batch, and the pooling of packed rows.

Stock's `Pooling._forward_padded` is the reference. Rows whose mask is 0 are not packed, so its sums and maxima over the mask
are those over a sequence's rows; a prompt that is left out is a second mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import run
from fastbert.layers.packing import Rows
from fastbert.layers.reading import PooledReading

# Per mode of Pooling, that of ops.pool_rows; the other modes read one position per row.
_REDUCED = {"mean": "mean", "mean_sqrt_len_tokens": "sqrt", "weightedmean": "weighted", "max": "max"}
_AT_A_POSITION = ("cls", "lasttoken")


def modes_of(pooling: nn.Module) -> tuple[str, ...]:
    """The modes of `pooling`, in the order of its output."""
    mode = pooling.pooling_mode
    return (mode,) if isinstance(mode, str) else tuple(mode)


def prompt_length(pooling: nn.Module, features: dict[str, Any]) -> int:
    """How many tokens at the start of each row `pooling` leaves out. A length on the device is waited for, as in stock."""
    length = None if pooling.include_prompt else features.get("prompt_length")
    return int(length[0].item() if isinstance(length, Tensor) else length or 0)


@dataclass(kw_only=True)
class PoolingPlan(PooledReading):
    """What a Pooling reads of one batch, from its settings at the time of the forward.

    mask: the attention mask, [B, S].
    version: the mask's version when the plan was made.
    modes, left_out: the settings: the modes, and the length of the prompt that is left out.
    counted: bool [B, S], the tokens that are pooled; None for all.
    first, last: int64 [B], the positions that "cls" and "lasttoken" read, where they are not simply a row's ends.
    """

    mask: Tensor
    version: int | None
    modes: tuple[str, ...]
    left_out: int
    counted: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None

    def is_current(self, pooling: nn.Module, features: dict[str, Any]) -> bool:
        """Whether stock's Pooling would pool by the mask and settings of this plan."""
        return (
            features.get("attention_mask") is self.mask
            and version_of(self.mask) == self.version
            and not _OTHER_INPUTS.intersection(features)
            and modes_of(pooling) == self.modes
            and prompt_length(pooling, features) == self.left_out
        )


# Inputs of Pooling by which it computes something else: a flattened batch, weights of the tokens, a CLS embedding.
_OTHER_INPUTS = frozenset({"cu_seq_lens_q", "token_weights_sum", "cls_token_embeddings"})


def version_of(tensor: Tensor) -> int | None:
    """The version of `tensor`, which each write to it raises; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def plan_pooling(pooling: nn.Module, features: dict[str, Any], mask: Tensor) -> PoolingPlan | str:
    """What `pooling` will read of a batch with this [B, S] mask, or why it must not get packed rows."""
    if found := _OTHER_INPUTS.intersection(features):
        return f"{min(found)} among the features"
    modes, left_out = modes_of(pooling), prompt_length(pooling, features)
    unknown = [mode for mode in modes if mode not in _REDUCED and mode not in _AT_A_POSITION]
    if unknown or not modes:
        return f"pooling_mode {pooling.pooling_mode!r}"
    if left_out < 0:
        return f"a prompt of {left_out} tokens"
    alone = len(set(modes)) == 1 and modes[0] in _AT_A_POSITION
    plan = PoolingPlan(None, alone, mask=mask, version=version_of(mask), modes=modes, left_out=left_out)
    asked = [mode for mode in _AT_A_POSITION if mode in modes]
    if not (left_out or asked) or modes == ("cls",) and not left_out:  # the encoder knows a row's first position
        plan.per_row = 1 if alone else None
        return plan
    positions = torch.arange(mask.shape[1], device=mask.device)
    tokens = mask != 0
    if left_out:
        padding_before = mask.to(torch.int32).argmax(1, keepdim=True)
        plan.counted = tokens = tokens & (positions >= padding_before + left_out)
    if "cls" in modes:
        plan.first = tokens.to(torch.int32).argmax(1, keepdim=True) if left_out else torch.zeros_like(positions[:1, None])
        plan.positions = positions == plan.first
    if "lasttoken" in modes:
        plan.last = (tokens * positions).amax(1, keepdim=True)
        at_last = positions == plan.last
        plan.positions = at_last if plan.positions is None else plan.positions | at_last
    if asked and plan.positions.shape != mask.shape:
        plan.positions = plan.positions.expand(mask.shape)
    plan.per_row = 1 if len(asked) == 1 else None
    return plan


def pool(pooling: nn.Module, plan: PoolingPlan) -> Tensor:
    """The sentence embeddings [B, modes * H] of the rows that the encoder left in `plan`."""
    vectors = [_pooled(pooling, plan, mode) for mode in plan.modes]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


def _pooled(pooling: nn.Module, plan: PoolingPlan, mode: str) -> Tensor:
    rows, tokens = plan.hidden, plan.tokens
    batch, seqlen = plan.mask.shape
    if mode in _REDUCED:
        sizes = {"n_sequences": batch, "seqlen": seqlen, "index": tokens.index, "mask": plan.counted}
        return run(pooling, ops.pool_rows, rows, tokens.cu_seqlens, _REDUCED[mode], **sizes)
    if not plan.alone:
        place = plan.first if mode == "cls" else plan.last
        rows = rows.index_select(0, _places(tokens, place.expand(batch, 1), seqlen))
    if mode == "lasttoken" and plan.counted is not None:  # zeros where the whole row is left out
        rows = rows * plan.counted.gather(1, plan.last)
    return rows


def _places(tokens: Rows, positions: Tensor, seqlen: int) -> Tensor:
    """The places among the packed `tokens` of one position [B, 1] in each row of the batch: [B]."""
    batch = torch.arange(len(positions), device=positions.device)
    places = batch * seqlen + positions.squeeze(1)
    return places if tokens.inverse is None else tokens.inverse.index_select(0, places)
