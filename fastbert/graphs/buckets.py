"""Rounds the shape of a batch up to one of few, so that few graphs serve batches of many shapes.

    rows      1, 2, 3, 4, 6, 8, 12, 16, ...           two steps to an octave
    length    16, 24, 32, 48, 64, 96, 128, ...        likewise, up to the longest that the model takes
    tokens    16, 24, 32, 40, 48, 56, 64, 80, ...     four steps to an octave, where a batch is packed

A packed batch costs what its tokens cost, so only its tokens are rounded finely: on average by a tenth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

LEAST = 16  # of a length, and of tokens: a tile of a matrix product has no fewer rows


class Bucket(NamedTuple):
    """The shape of a graph: rows of a batch and positions per row."""

    rows: int
    length: int


def stepped(n: int, steps: int, least: int = 1) -> int:
    """The smallest of least * 2^k (1 + i / steps) from n on, in steps of at least half of `least`."""
    if n <= least:
        return least
    octave = least << ((n - 1) // least).bit_length() - 1  # the largest below n
    step = max(octave // steps, least // 2, 1)
    return octave + -(-(n - octave) // step) * step


@dataclass(frozen=True)
class Buckets:
    """Chooses buckets: from those that are given, or by the rule above if there are none."""

    given: tuple[Bucket, ...] = ()

    @cached_property
    def _by_size(self) -> list[Bucket]:
        return sorted(self.given, key=lambda bucket: (bucket.rows * bucket.length, bucket))

    def of(self, rows: int, length: int, longest: int) -> Bucket | None:
        """The smallest bucket for a batch [rows, length] of a model that takes `longest` positions; None if there is none."""
        if not self.given:
            return Bucket(stepped(rows, 2), max(min(stepped(length, 2, LEAST), longest), length))
        return next((one for one in self._by_size if one.rows >= rows and length <= one.length <= longest), None)


def token_capacity(n: int) -> int:
    """For how many packed tokens a graph is captured that serves a batch with n."""
    return stepped(n, 4, LEAST)


def checked(buckets: Sequence[Sequence[int]] | None) -> Buckets:
    """The caller's buckets.

    Raises:
        ValueError: anything but pairs of integers from 1 on.
    """
    if buckets is None:
        return Buckets()
    return Buckets(tuple(shapes("buckets", buckets)))


def shapes(name: str, pairs: Sequence[Sequence[int]]) -> list[Bucket]:
    """The caller's (rows, length) pairs; `name` is the argument that held them.

    Raises:
        ValueError: anything but pairs of integers from 1 on.
    """
    expected = f"{name}: expected (rows, length) pairs of integers from 1 on"
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence) or not pairs:
        raise ValueError(f"{expected}, got {pairs!r}")
    for pair in pairs:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(n) is int and n >= 1 for n in pair)
        if not whole:
            raise ValueError(f"{expected}, got {pair!r}")
    return [Bucket(*pair) for pair in pairs]
