"""What a head reads of its encoder's output: the head says so for the length of its forward, the encoder asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn

from fastbert.layers.packing import Rows


@dataclass
class Reading:
    """`positions`: bool [B, S], None for the first of each row. `alone`: nothing else of the output is read.

    `rows` is where they lie among the B x S, once the encoder has counted them: the head need not count again.
    """

    encoder: nn.Module | None
    positions: Tensor | None
    alone: bool
    rows: Rows | None = None


# A context variable, as a model may run in several threads at once (DataParallel).
_current: ContextVar[Reading | None] = ContextVar("fastbert_reading", default=None)


@contextmanager
def reading(encoder: nn.Module | None, positions: Tensor | None, alone: bool) -> Iterator[Reading]:
    """Within the block `encoder` may leave out what is not read; None: nobody may."""
    told = Reading(encoder, positions, alone)
    if encoder is None:
        yield told
        return
    token = _current.set(told)
    try:
        yield told
    finally:
        _current.reset(token)


def reading_of(encoder: nn.Module) -> Reading | None:
    """What the head around this call reads of `encoder`, if it said so."""
    told = _current.get()
    return told if told is not None and told.encoder is encoder else None
