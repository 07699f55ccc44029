"""How many rows to allocate when packing: counted on the device, given by the caller, or a fixed budget."""

from dataclasses import dataclass

from torch import Tensor

from fastbert import ops


@dataclass(frozen=True)
class Capacity:
    """`rows` in all and `longest` in one row of the batch; exact: so many there are, else at most."""

    rows: int
    longest: int
    exact: bool = True


@dataclass(frozen=True)
class CallerCounts:
    """What the caller knows, see `fastbert.lengths`; None where he does not."""

    lengths: tuple[int, ...] | None = None
    read: tuple[int, ...] | None = None
    bucket: int = 1
    token_budget: int | None = None
    read_budget: int | None = None

    def capacity(self, which: str, batch: int, seqlen: int) -> Capacity | None:
        """For the tokens ("lengths") or the rows that are read ("read"); None if that is not known."""
        budget = self.token_budget if which == "lengths" else self.read_budget
        if budget is not None:
            return Capacity(budget, seqlen, exact=False)
        counts = getattr(self, which)
        if counts is None:
            return None
        if len(counts) != batch or not all(0 <= n <= seqlen for n in counts):
            raise ValueError(f"{which}: expected {batch} numbers from 0 to {seqlen}, got {list(counts)}")
        rows = -(-sum(counts) // self.bucket) * self.bucket
        longest = seqlen if self.bucket > 1 else max(counts)  # a size that changes would spoil shapes that repeat
        return Capacity(rows, longest, exact=rows == sum(counts))


def count(
    mask: Tensor | None, read: Tensor | None, counts: Tensor | None = None
) -> tuple[Capacity | None, Capacity | None, bool]:
    """The capacity that is needed for each that is not None, and whether a position that is read is padding.

    `counts` is what ops.row_counts says, where it was asked. One synchronisation.
    """
    of_tokens, of_read, missing = (ops.row_counts(mask, read) if counts is None else counts).tolist()
    tokens = None if mask is None else Capacity(sum(of_tokens), max(of_tokens))
    return tokens, None if read is None else Capacity(sum(of_read), max(of_read)), any(missing)
