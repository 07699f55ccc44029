"""What the op and its backward read: their arguments as NamedTuples."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    words: Tensor
    positions: Tensor
    types: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    places: Tensor | None  # for packed rows: the place of each of the batch's positions among them
    seed: Tensor | None
    offset: int
    padding_idx: int | None
    position_padding_idx: int | None
    eps: float
    p: float
    out_dtype: torch.dtype
    save: bool


class Saved(NamedTuple):
    words: Tensor
    positions: Tensor
    types: Tensor
    weight: Tensor
    mean: Tensor
    rstd: Tensor
    ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    places: Tensor | None
    seed: Tensor | None
    offset: int
    padding_idx: int | None
    position_padding_idx: int | None
    p: float
    bias_dtype: torch.dtype


class Needs(NamedTuple):
    """Which gradients are asked for."""

    needs_words: bool
    needs_positions: bool
    needs_types: bool
    needs_weight: bool
    needs_bias: bool


def z_dtype(given: Inputs | Saved) -> torch.dtype:
    """The dtype of the sum of the three rows, promoted in eager's order."""
    return promote(promote(given.words.dtype, given.types.dtype), given.positions.dtype)


def promote(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return one if one == other else torch.promote_types(one, other)  # promote_types is dispatched as an op
