"""Global batches, and the part of each that a rank trains on: the same number of real tokens, as nearly as whole rows allow.

The global batches of an epoch depend on the seed, the epoch, the number of rows and the batch only, so that a run has the
same batches on any number of ranks. Every rank works out all parts by itself: nothing is sent.
"""

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from zlib import crc32

import torch
from torch.utils.data import Sampler

from bench.train.batches import Rows
from fastbert.errors import InputError


def global_batches(rows: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each batch of an epoch: ceil(rows / batch) batches, whose sizes differ by one row at most.

    Equal sizes leave no small batch at the end, which many ranks could not share.
    """
    generator = torch.Generator().manual_seed(crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(rows, generator=generator)
    return [part.tolist() for part in order.tensor_split(-(-rows // batch))]


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal rows of these lengths to ranks: the longest row left goes to the rank with the fewest tokens.

    The fullest rank then has at most 4/3 of the tokens that it would have in the best division (Graham 1969, Bounds on
    Multiprocessing Timing Anomalies, https://doi.org/10.1137/0117039). With as many rows as ranks, each rank gets one.

    Returns:
        For each rank the places of its rows in `lengths`, ascending.
    """
    loads = [(0, 0, rank) for rank in range(ranks)]  # tokens; rows, so that empty rows are dealt round as well; rank
    heapify(loads)
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        tokens, count, rank = loads[0]
        heapreplace(loads, (tokens + lengths[place], count + 1, rank))
        parts[rank].append(place)
    return [sorted(part) for part in parts]


def check(rows: int, batch: int, ranks: int) -> None:
    """Raise InputError unless every batch has a row for every rank."""
    fewest = rows // -(-rows // batch)
    if fewest < ranks:
        raise InputError(
            f"--batch: expected a row for each of {ranks} ranks in every batch, got batches of {fewest} ({rows} rows, "
            f"--batch {batch})"
        )


class Parts(Sampler[list[tuple[int, int]]]):
    """The rows of one rank in each global batch of the rows' epoch, in order: a batch sampler.

    With each row comes the length of the longest in the global batch, which one rank would pad it to.
    """

    def __init__(self, rows: Rows, batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.batch, self.rank, self.ranks = rows, batch, rank, ranks
        self.lengths = rows.lengths()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in global_batches(len(self.rows), self.batch, self.rows.seed, self.rows.epoch):
            lengths = [self.lengths[row] for row in batch]
            longest = max(lengths)
            yield [(batch[place], longest) for place in deal(lengths, self.ranks)[self.rank]]
