"""A reader: the endless rows of its share of the corpus, block by block, and the state that continues behind any of them."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bench.stream.documents import Place, blocks, generator
from bench.stream.masking import Masking
from bench.stream.sequences import NEXT, full_sentences, pairs, tokenised
from bench.stream.shards import Shard
from bench.stream.tokens import Encoder, Row
from fastbert.errors import InputError

BLOCK = 1 << 19  # characters; of English 110,000 tokens, or 220 rows of 512
EMPTY = 50  # blocks without a row, after which there is none
ENOUGH = 16  # rows of a block of which one at least has a B that follows A
READERS = 8  # unless the user says otherwise
Numbers = Counter[str]


@dataclass(frozen=True)
class Stream:
    """What all readers of a run share. `budget`: tokens of a reader in a batch."""

    shards: tuple[Shard, ...]
    encoder: Encoder
    masking: Masking
    task: str
    max_length: int
    budget: int
    readers: int
    seed: int
    block: int = BLOCK


@dataclass(frozen=True)
class State:
    """Where a reader stands: the beginning of its block, the block's number, rows taken from it, and the tokens that it has
    given beyond its budget so far. Numbers only, for JSON."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    epoch: int = 0
    piece: int = 0
    row: int = 0
    documents: int = 0
    inside: bool = False
    block: int = 0
    taken: int = 0
    beyond: int = 0

    @property
    def place(self) -> Place:
        return Place(self.epoch, self.piece, self.row, self.documents, self.inside)

    def at(self, place: Place) -> "State":
        """The state at the beginning of the next block."""
        return replace(self, **vars(place), block=self.block + 1, taken=0)


class Reader:
    """Reader `number` of a stream, from `state` on."""

    def __init__(self, stream: Stream, number: int, state: State) -> None:
        self.stream, self.number, self.state = stream, number, state
        # Seconds of this process by phase, and what they were spent on: tokens of blocks, and rows and tokens of batches.
        self.numbers: Numbers = Counter()
        self._blocks = made(stream, number, state, self.numbers)
        self._rows, self._draws, self._following = next(self._blocks)
        if state.taken > len(self._rows):
            raise InputError(f"--resume: reader {number} had taken {state.taken} rows of a block of {len(self._rows)}")

    def batch(self) -> list[Row]:
        """The masked rows of the next batch: whole rows, one at least, as near to the budget as over all batches can be.

        Raises:
            InputError: a shard cannot be read.
        """
        beyond = self.state.beyond - self.stream.budget
        rows: list[Row] = []
        while True:
            while self.state.taken == len(self._rows):
                self.state = self._following
                self._rows, self._draws, self._following = next(self._blocks)
            row = self._rows[self.state.taken]
            tokens = len(row["input_ids"])
            if rows and 2 * beyond + tokens > 0:  # without it the sum is nearer
                break
            began = time.process_time()
            rows.append(self.stream.masking.masked(row, self._draws[self.state.taken]))
            self.numbers.update(mask=time.process_time() - began, rows=1, tokens=tokens)
            self.state = replace(self.state, taken=self.state.taken + 1)
            beyond += tokens
        self.state = replace(self.state, beyond=beyond)
        return rows


def made(stream: Stream, number: int, state: State, numbers: Numbers) -> Iterator[tuple[list[Row], Sequence[int], State]]:
    """The rows of each block of a reader from that of `state` on, in the order of the batches, their draws, and the state
    behind it. Counts in `numbers`.

    Raises:
        InputError: a shard cannot be read, or its text makes no rows.
    """
    empty = 0
    texts = blocks(stream.shards, number, stream.readers, stream.seed, stream.block, state.place)
    while True:
        began = time.process_time()
        documents, place = next(texts)
        read = time.process_time()
        drawn = generator(stream.seed, 1, number, state.block)
        block = tokenised(stream.encoder, documents)
        tokenise = time.process_time()
        if stream.task == "pretraining":
            rows = pairs(stream.encoder, block, stream.max_length, drawn)
            if len(rows) >= ENOUGH and all(row[NEXT] for row in rows):
                wanted = "next-sentence pairs need documents of two or more sentences"
                raise InputError(f"--data: {wanted}, found none in {len(documents)} documents")
        else:
            rows = full_sentences(stream.encoder, block, stream.max_length)
        order = drawn.permutation(len(rows))
        draws: Any = drawn.integers(2**63, size=len(rows)).tolist()
        build = time.process_time()
        count = sum(len(row["input_ids"]) for row in rows)
        numbers.update(read=read - began, tokenise=tokenise - read, build=build - tokenise, made=count)
        state = state.at(place)
        empty = 0 if rows else empty + 1
        if empty > EMPTY:
            wanted = "two documents or more of several sentences" if stream.task == "pretraining" else "text"
            raise InputError(f"--data: reader {number} of {stream.readers} finds no rows: expected {wanted} for each reader")
        yield [rows[i] for i in order], draws, state
