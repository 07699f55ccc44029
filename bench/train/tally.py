"""What each rank saw and measured, and what of all ranks is recorded."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.core.records import Spread
from bench.train.records import Settings

WARM_UP = 5  # untimed steps: kernels are compiled and the allocator fills
FEWEST_TIMED = 5


@dataclass(frozen=True)
class Tally:
    """Of one rank: tokens and checksum of each batch, seconds of each step (none on the CPU), peak memory, launches."""

    tokens: list[int]
    checksums: list[int]
    seconds: list[float]
    peak_bytes: int | None
    launches: int


def combined(ranks: Sequence[Tally], batches: Sequence[int]) -> dict[str, Any]:
    """The fields of a LaneRecord that are of all ranks. `batches`: how many each step of this process had."""
    tokens = list(zip(*(tally.tokens for tally in ranks), strict=True))  # [batch][rank]
    checksums = [sum(own) & 0xFFFFFFFF for own in zip(*(tally.checksums for tally in ranks), strict=True)]
    of_steps = list(_chunks(len(tokens), batches))
    step_tokens = [sum(sum(tokens[i]) for i in own) for own in of_steps]
    trained = [tokens[i] for own in of_steps for i in own]
    found: dict[str, Any] = {
        "ranks": len(ranks),
        "tokens": sum(step_tokens),
        "imbalance": imbalance(trained),
        "checksums": [zlib.crc32(repr([checksums[i] for i in own]).encode()) for own in of_steps],
        "launches": min(tally.launches for tally in ranks),
        "peak_bytes": max((tally.peak_bytes for tally in ranks if tally.peak_bytes is not None), default=None),
    }
    timed = [max(own) for own in zip(*(tally.seconds for tally in ranks), strict=True)][WARM_UP:]
    if len(timed) >= FEWEST_TIMED:
        found |= {"seconds": Spread.of(timed), "tokens_per_second": sum(step_tokens[WARM_UP:]) / sum(timed)}
    return found


def imbalance(tokens: Sequence[Sequence[int]]) -> float:
    """The most tokens of a rank over the mean of the ranks, averaged over batches: [batch][rank]."""
    return sum(max(own) * len(own) / sum(own) for own in tokens) / len(tokens) if tokens else 1.0


def batches_of_steps(rows: int | None, settings: Settings, first: int, last: int) -> list[int]:
    """The number of batches in each step from `first` up to `last`; the last step of an epoch takes what is left.

    `rows` None: of a stream, which has no such last step.
    """
    if rows is None:
        return [settings.accumulation] * (last - first)
    whole, left = divmod(math.ceil(rows / settings.batch), settings.accumulation)
    of_epoch = [settings.accumulation] * whole + ([left] if left else [])
    return [of_epoch[step % len(of_epoch)] for step in range(first, last)]


def _chunks(available: int, sizes: Sequence[int]) -> Iterator[range]:
    """Consecutive numbers from 0 on, in chunks. There may be more: batches that were made but not trained on."""
    start = 0
    for size in sizes:
        assert start + size <= available, (start, size, available)
        yield range(start, start + size)
        start += size
