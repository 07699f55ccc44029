"""Loads a rank's batches: worker processes run its readers ahead, and the state is that of the batches that were taken.

In each batch every reader of the run gives the same number of tokens as nearly as whole rows can, so all ranks have the same
number. Rank r of w has the readers r, r + w, ...; its rows stand in the order of the readers. So a global batch is the same
for every number of ranks that divides the readers, and for every number of workers.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bench.core.records import FromJson
from bench.core.schema import parse
from bench.stream.masking import Array, Batch, flat
from bench.stream.reader import Numbers, Reader, State, Stream
from bench.stream.shards import fingerprint
from fastbert.errors import InputError

AHEAD = 4  # batches that each worker prepares
KEPT = 1024  # batches whose states are remembered
States = dict[int, State]


@dataclass(frozen=True)
class _Share:
    """A reader's rows of a batch, one after another, and its state behind them."""

    reader: int
    columns: dict[str, Array]
    lengths: Array
    state: State


@dataclass(frozen=True)
class _Part:
    """What a worker adds to a batch; the numbers of all its readers so far, and its seconds. Or an error."""

    shares: list[_Share]
    numbers: Numbers
    error: str = ""


class _Parts(IterableDataset):
    """The parts of the batches behind `states` that this process's readers give."""

    def __init__(self, stream: Stream, states: States) -> None:
        self.stream, self.states = stream, states

    def __iter__(self) -> Iterator[_Part]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
        began = time.process_time()
        try:
            readers = [Reader(self.stream, number, self.states[number]) for number in sorted(self.states)[first::step]]
            while True:
                shares = [_Share(reader.number, *flat(reader.batch()), reader.state) for reader in readers]
                numbers = sum((reader.numbers for reader in readers), Counter(all=time.process_time() - began))
                yield _Part(shares, numbers)
        except InputError as error:  # raised again where it is one line, not a worker's traceback
            yield _Part([], Counter(), str(error))


class Loader(Iterable[Batch]):
    """The batches of rank `rank` of `world`, without end, behind `state`. Each iteration begins behind the last batch taken."""

    def __init__(
        self, stream: Stream, rank: int = 0, world: int = 1, workers: int = 0, state: Mapping[str, Any] | None = None
    ) -> None:
        """
        `state`: of all ranks, as `whole` makes it.

        Raises:
            InputError: readers, ranks and workers do not go together, or the state is that of another stream.
        """
        own = range(rank, stream.readers, world)
        if stream.readers % world:
            raise InputError(f"--readers: expected a multiple of the {world} ranks, got {stream.readers}")
        if workers > len(own):
            per = f"the {len(own)} readers of a rank" if world > 1 else f"the {len(own)} readers"
            raise InputError(f"--workers: expected at most {per} (--readers), got {workers}")
        self.stream, self.workers = stream, workers
        self.batches = 0  # taken, of the whole run
        self._numbers: list[Numbers] = []
        before: States = {}
        if state is not None:
            self.batches, before = _parsed(stream, state)
        self._states = deque([(self.batches, {number: before.get(number, State()) for number in own})], KEPT)

    def __iter__(self) -> Iterator[Batch]:
        number, states = self._states[-1]
        # A generator of its own: the seed of workers would be drawn from the one that draws dropout.
        options: dict[str, Any] = {"collate_fn": _unchanged, "generator": torch.Generator()}
        if self.workers:
            options |= {"num_workers": self.workers, "prefetch_factor": AHEAD}
        parts = iter(DataLoader(_Parts(self.stream, states), batch_size=None, **options))
        while True:
            # Workers take turns, and none ends.
            of_batch = [next(parts) for _ in range(max(self.workers, 1))]
            if error := next((part.error for part in of_batch if part.error), ""):
                del parts  # ends the workers now, not when the error's traceback is forgotten
                raise InputError(error)
            shares = sorted((share for part in of_batch for share in part.shares), key=lambda share: share.reader)
            number += 1
            self._states.append((number, {share.reader: share.state for share in shares}))
            self._numbers = [part.numbers for part in of_batch]
            self.batches = number
            columns = {name: numpy.concatenate([share.columns[name] for share in shares]) for name in shares[0].columns}
            yield self.stream.masking.padded(columns, numpy.concatenate([share.lengths for share in shares]))

    def numbers(self) -> list[Numbers]:
        """Of each worker up to the last batch taken: seconds of CPU by phase and in all, and what they were spent on."""
        return self._numbers

    def states(self, batches: int) -> dict[str, dict[str, Any]]:
        """The states of this rank's readers behind the first `batches` batches of the run, for JSON.

        Raises:
            KeyError: that batch is not one of the last.
        """
        found = dict(self._states)[batches]
        return {str(number): asdict(state) for number, state in found.items()}


def whole(stream: Stream, batches: int, of_ranks: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The state of a run behind `batches` batches, for JSON, from the `states` of all ranks."""
    readers = {number: state for states in of_ranks for number, state in states.items()}
    ordered = {number: readers[number] for number in sorted(readers, key=int)}
    return {"batches": batches, "readers": ordered, "stream": _description(stream)}


def _description(stream: Stream) -> dict[str, Any]:
    """What must be the same for a state to have its meaning."""
    return {
        "shards": fingerprint(stream.shards),
        "task": stream.task,
        "max_length": stream.max_length,
        "whole_words": stream.encoder.whole_words,
        "budget": stream.budget,
        "readers": stream.readers,
        "seed": stream.seed,
        "block": stream.block,
    }


def _parsed(stream: Stream, state: Mapping[str, Any]) -> tuple[int, States]:
    """The batches taken and the states of all readers, from what `whole` has made, if that is of this stream."""
    try:
        found = parse(_Whole, json.dumps(state), "state")
    except ValueError as error:
        raise InputError(f"--resume: the place in the stream cannot be read: {error}") from None
    for name, value in _description(stream).items():
        if found.stream.get(name) != value:
            raise InputError(f"--resume: the stream had {name} {found.stream.get(name)!r}, now it has {value!r}")
    if set(found.readers) != {str(number) for number in range(stream.readers)}:
        raise InputError(f"--resume: expected the places of {stream.readers} readers in the stream, got others")
    for number, place in found.readers.items():
        low = min(vars(replace(place, beyond=0)).values())
        if low < 0 or abs(place.beyond) > stream.max_length or asdict(place) != state["readers"][number]:
            raise InputError(f"--resume: reader {number} cannot have stood at {place}")
    return found.batches, {int(number): place for number, place in found.readers.items()}


@dataclass(frozen=True)
class _Whole(FromJson):
    """What `whole` makes."""

    batches: int
    readers: dict[str, State]
    stream: dict[str, Any]


def _unchanged(part: _Part) -> _Part:
    return part
