"""Defers the embeddings until the encoder knows which rows it packs, so that only those are embedded.

A BertModel gives its embeddings and its encoder a `DeferredEmbeddings` in place of `position_ids`. The embeddings store
their call in it, and the encoder makes the call, for the packed tokens only if it packs. Embeddings are not deferred if
other code could see what they return (hooks, replaced masks, untested code).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.layers.packing import Rows


class AcceptsDeferredEmbeddings:
    """Interface of an encoder that accepts deferred embeddings."""

    def may_pack(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call with these keywords may be packed, as far as the keywords tell."""
        raise NotImplementedError


@dataclass
class DeferredEmbeddings:
    """Passed by a BertModel to its embeddings and its encoder in place of `position_ids`, which stock passes to both.

    position_ids: the ids of the call.
    embed: set by the embeddings: embed(None) returns [B, S, H], embed(rows) the embeddings of packed rows, [1, N, H].

    The embeddings return a placeholder with their shape, dtype and device but no values. Only the model and its encoder
    get that placeholder, and they read nothing else from it.
    """

    position_ids: Tensor | None
    embed: Callable[[Rows | None], Tensor] | None = None


def given(position_ids: Any) -> Tensor | None:
    """The position ids of the call."""
    return position_ids.position_ids if isinstance(position_ids, DeferredEmbeddings) else position_ids
