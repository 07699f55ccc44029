"""Deals the shards to readers, and cuts what a reader reads into blocks of documents.

A run has a fixed number of readers, whatever the number of ranks and of worker processes that share them, so that neither
changes what is read. In each epoch the shards are shuffled anew and dealt to the readers. With fewer shards than readers
each shard has several parts: part p of n has the documents p, p + n, p + 2n, ... of it.

Documents are in sentences: the lines of a document, or of a document that is one line its sentences, which end behind
. ! ? or the like before white space, and behind their Chinese and Japanese forms. Abbreviations are not looked for.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy

from bench.stream.shards import Shard
from fastbert.errors import InputError

_END = re.compile(r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+\s+|[。！？]++[」』”’）]*+\s*""")
EMPTY_EPOCHS = 50  # without a document in a reader's part, after which there is none
Document = list[str]


@dataclass(frozen=True)
class Place:
    """Where a block begins: a reader's epoch, the piece of its epoch, and rows and documents of its shard that are read.

    `inside`: the next row goes on with the last of these documents.
    """

    epoch: int = 0
    piece: int = 0
    row: int = 0
    documents: int = 0
    inside: bool = False


@dataclass(frozen=True)
class Piece:
    """The part of a shard that a reader reads in an epoch: its documents `first`, `first` + `step`, ..."""

    shard: Shard
    first: int
    step: int


def deal(shards: Sequence[Shard], readers: int, seed: int, epoch: int) -> list[list[Piece]]:
    """The pieces of each reader in an epoch. Each document belongs to exactly one."""
    step = -(-readers // len(shards))
    pieces = [Piece(shard, first, step) for shard in shards for first in range(step)]
    order = generator(seed, 0, epoch).permutation(len(pieces))
    return [[pieces[i] for i in order[reader::readers]] for reader in range(readers)]


def generator(seed: int, *numbers: int) -> numpy.random.Generator:
    """NumPy's generator for a seed of any sign and what it is drawn for."""
    return numpy.random.Generator(numpy.random.PCG64([seed % 2**64, *numbers]))


def blocks(
    shards: Sequence[Shard], reader: int, readers: int, seed: int, size: int, place: Place
) -> Iterator[tuple[list[Document], Place]]:
    """The blocks of a reader from `place` on, without end, each with the place behind it.

    A block ends at the first end of a document behind `size` characters; inside a document of lines behind twice as many;
    and with the epoch.

    Raises:
        InputError: a shard cannot be read, or there is no text.
    """
    empty = 0
    while True:
        pieces = deal(shards, readers, seed, place.epoch)[reader]
        following = Place(place.epoch + 1)
        gathered = _Gathered()
        for number in range(place.piece, len(pieces)):
            start = place if number == place.piece else Place(place.epoch, number)
            for end in _read(pieces[number], start, gathered, size):
                empty = 0
                yield gathered.take(), end
        if gathered.documents:
            empty = 0
            yield gathered.take(), following
        place, empty = following, empty + 1
        if empty > EMPTY_EPOCHS:
            raise InputError(f"--data: reader {reader} of {readers} finds no text: too few documents for so many readers?")


class _Gathered:
    """The documents of a block that is being read."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.characters = 0
        self.is_open = False  # whether the next line may go on with the last document

    def add(self, lines: Sequence[str], goes_on: bool = False) -> None:
        """Add lines of the last document if that is `goes_on`, else a document of its own."""
        if goes_on and self.is_open:
            self.documents[-1].extend(lines)
        else:
            self.documents.append([*lines])
        self.is_open = True
        self.characters += sum(map(len, lines))

    def take(self) -> list[Document]:
        found, self.documents = self.documents, []
        self.characters, self.is_open = 0, False
        return [document if len(document) > 1 else sentences(document[0]) for document in found]


def _read(piece: Piece, place: Place, gathered: _Gathered, size: int) -> Iterator[Place]:
    """Read a piece from `place` into `gathered`. Yields wherever a block ends, with the place behind it."""
    read = _read_lines if piece.shard.lines_are_sentences else _read_documents
    yield from read(piece, place, gathered, size)
    gathered.is_open = False


def _read_documents(piece: Piece, place: Place, gathered: _Gathered, size: int) -> Iterator[Place]:
    row = place.row
    for texts in piece.shard.rows(row):
        for text in texts:
            mine = row % piece.step == piece.first
            row += 1
            if not mine:
                continue
            lines = [line for line in map(str.strip, text.splitlines()) if line]
            if lines:
                gathered.add(lines)
            if gathered.characters >= size:
                yield replace(place, row=row, documents=row)


def _read_lines(piece: Piece, place: Place, gathered: _Gathered, size: int) -> Iterator[Place]:
    row, documents, inside = place.row, place.documents, place.inside
    for lines in piece.shard.rows(row):
        for line in lines:
            row += 1
            line = line.strip()
            if line:
                goes_on, inside = inside, True
                documents += not goes_on
                if (documents - 1) % piece.step == piece.first:
                    gathered.add([line], goes_on)
            else:
                inside = False
            if gathered.characters >= (2 * size if inside else size):
                yield replace(place, row=row, documents=documents, inside=inside)


def sentences(text: str) -> Document:
    """The sentences of one line."""
    ends = [found.end() for found in _END.finditer(text)]
    bounds = [0, *(end for end in ends if end < len(text)), len(text)]
    parts = [text[start:end].strip() for start, end in zip(bounds, bounds[1:], strict=False)]
    return [part for part in parts if part]
