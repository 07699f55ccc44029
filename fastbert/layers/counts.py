"""Determines how many rows to allocate when packing: counted on the device, given by the caller, or a fixed budget."""

from dataclasses import dataclass

from torch import Tensor

from fastbert import ops


@dataclass(frozen=True)
class Capacity:
    """`rows` in total and at most `longest` per row of the batch; `rows` is the exact number if `exact`, else a maximum."""

    rows: int
    longest: int
    exact: bool = True


@dataclass(frozen=True)
class TokenBudget:
    """The capacity for tokens of one call, which a graph passes as the keyword `lengths`."""

    tokens: int


@dataclass(frozen=True)
class CallerCounts:
    """The counts and budgets that the caller passed (see `fastbert.lengths`), None for those not passed."""

    lengths: tuple[int, ...] | None = None
    read: tuple[int, ...] | None = None
    bucket: int = 1
    token_budget: int | None = None
    read_budget: int | None = None

    def capacity(self, which: str, batch: int, seqlen: int) -> Capacity | None:
        """The capacity for tokens (`which`="lengths") or rows that are read ("read"), or None if the caller gave none.

        Raises:
            ValueError: the counts do not fit a [batch, seqlen] batch.
        """
        budget = self.token_budget if which == "lengths" else self.read_budget
        if budget is not None:
            return Capacity(budget, seqlen, exact=False)
        counts = getattr(self, which)
        if counts is None:
            return None
        if len(counts) != batch or not all(0 <= n <= seqlen for n in counts):
            raise ValueError(f"{which}: expected {batch} numbers from 0 to {seqlen}, got {list(counts)}")
        rows = -(-sum(counts) // self.bucket) * self.bucket
        longest = seqlen if self.bucket > 1 else max(counts)  # a varying max_seqlen would defeat repeated shapes
        return Capacity(rows, longest, exact=rows == sum(counts))


def count(
    mask: Tensor | None, read: Tensor | None, counts: Tensor | None = None
) -> tuple[Capacity | None, Capacity | None, bool]:
    """The capacities that the bool [B, S] `mask` and `read` need (None for None), and whether a padded position is read.

    `counts` is the result of ops.row_counts(mask, read) if it is already known. Takes one synchronisation.
    """
    of_tokens, of_read, missing = (ops.row_counts(mask, read) if counts is None else counts).tolist()
    tokens = None if mask is None else Capacity(sum(of_tokens), max(of_tokens))
    return tokens, None if read is None else Capacity(sum(of_read), max(of_read)), any(missing)
