"""How many rows to make room for when packing: counted on the device, told by the caller, or a fixed budget."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.layers.reading import Reading


@dataclass(frozen=True)
class Room:
    """`rows` in all and `longest` in one row of the batch; exact: so many there are, else at most."""

    rows: int
    longest: int
    exact: bool = True


@dataclass(frozen=True)
class Given:
    """What the caller knows, see `fastbert.lengths`; None where he does not."""

    lengths: tuple[int, ...] | None = None
    read: tuple[int, ...] | None = None
    bucket: int = 1
    token_budget: int | None = None
    read_budget: int | None = None

    def room(self, which: str, batch: int, seqlen: int) -> Room | None:
        """For the tokens ("lengths") or the rows that are read ("read"); None if that is not known."""
        budget = self.token_budget if which == "lengths" else self.read_budget
        if budget is not None:
            return Room(budget, seqlen, exact=False)
        counts = getattr(self, which)
        if counts is None:
            return None
        if len(counts) != batch or not all(0 <= n <= seqlen for n in counts):
            raise ValueError(f"{which}: expected {batch} numbers from 0 to {seqlen}, got {list(counts)}")
        rows = -(-sum(counts) // self.bucket) * self.bucket
        longest = seqlen if self.bucket > 1 else max(counts)  # a size that changes would spoil shapes that repeat
        return Room(rows, longest, exact=rows == sum(counts))


def count(mask: Tensor | None, read: Tensor | None, flag: Tensor | None) -> tuple[Room | None, Room | None, bool]:
    """The room that is needed for each that is not None, and what the flag says. One synchronisation."""
    chosen = [x.sum(1) for x in (mask, read) if x is not None]
    numbers = [f(x) for x in chosen for f in (torch.sum, torch.amax)]
    found = torch.stack(numbers if flag is None else [*numbers, flag.to(torch.int64)]).tolist()
    rooms = [Room(*found[2 * i : 2 * i + 2]) for i in range(len(chosen))]
    tokens = rooms.pop(0) if mask is not None else None
    return tokens, (rooms.pop(0) if read is not None else None), flag is not None and bool(found[-1])


def missing(mask: Tensor, told: Reading) -> Tensor:
    """Whether a position that is read is padding."""
    return (~mask[:, 0]).any() if told.positions is None else (told.positions & ~mask).any()


def check_room(name: str, chosen: Tensor, room: Room) -> None:
    """Stop, on the device and without waiting for it, if the caller was wrong: rows would be left out."""
    counts = chosen.sum(1)
    fits = counts.sum() == room.rows if room.exact else counts.sum() <= room.rows
    torch._assert_async(fits & (counts.amax() <= room.longest), f"{name}: fewer than there are, or not as many")
