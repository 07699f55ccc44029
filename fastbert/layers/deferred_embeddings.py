"""Embeddings that wait for the encoder: where it packs, they are of the rows that it packs alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.layers.packing import Rows


class AcceptsDeferredEmbeddings:
    """Of an encoder that can be given embeddings that wait."""

    def may_pack(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call with these keywords may be packed, as far as they say."""
        raise NotImplementedError


@dataclass
class DeferredEmbeddings:
    """What a BertModel gives its embeddings and its encoder in place of `position_ids`, which stock hands to both.

    The embeddings leave here how they are computed, [B, S, H] or of rows that are packed [1, N, H], and return a tensor that
    has their shape, dtype and device, but no values. Nothing but the model and its encoder is given that tensor, and these
    read nothing else of it.
    """

    position_ids: Tensor | None
    embed: Callable[[Rows | None], Tensor] | None = None
