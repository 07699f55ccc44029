"""Makes the rows of a block: sequences of sentences for MLM, pairs of segments for MLM with next-sentence prediction (NSP).

MLM: RoBERTa's full sentences. Sentences fill a row as long as they fit, across documents, which a separator divides. A
sentence longer than a row is cut. Each token of the block is in exactly one row.

NSP: of the sentences of one document, as many as fill a row (one row in ten is shorter), cut between two sentences into
A and B. To make half of the B follow no A, rows whose B are of about the same length exchange them, if of two documents. So
each token is in at most one row, and the length of a row does not tell which kind it is; in BERT's own script
(create_pretraining_data) a B from elsewhere is also read where it stands. Of a document longer than half the block, the
halves of the block count as documents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy

from bench.stream.documents import Document
from bench.stream.tokens import IDS, Array, Encoder, Row, Text

SHORT = 0.1  # share of the NSP rows that are filled to a random length
FEWEST = 2  # tokens of the shortest of these, as in BERT's script
NEXT = "next_sentence_label"  # 0: B follows A
Span = tuple[int, int]  # tokens [first, last) of a block
Segments = tuple[Span, Span]


@dataclass(frozen=True)
class Block:
    """The tokens of a block, the tokens of each sentence, int64 [sentences], and the first sentence of each document."""

    text: Text
    lengths: Array
    documents: Array


def tokenised(encoder: Encoder, documents: Sequence[Document]) -> Block:
    text, lengths = encoder([sentence for document in documents for sentence in document])
    return Block(text, lengths, numpy.cumsum([0, *map(len, documents)])[:-1])


def full_sentences(encoder: Encoder, block: Block, max_length: int) -> list[Row]:
    """The rows of a block for MLM, in the order of the text."""
    behind_another = block.documents[1:]
    text, lengths = _separated(block.text, block.lengths, behind_another, encoder.separator)
    opens = numpy.zeros(len(lengths), bool)
    opens[behind_another] = True
    room = max_length - encoder.single.size
    return [encoder.single.around(text[first:last]) for first, last in fill(lengths.tolist(), opens.tolist(), room)]


def _separated(text: Text, lengths: Array, sentences: Array, separator: int) -> tuple[Text, Array]:
    """The text with a separator before each of `sentences`, as a part of it."""
    places = (numpy.cumsum(lengths) - lengths)[sentences]
    ids = numpy.insert(text.ids, places, separator)
    special = numpy.insert(text.special, places, True)
    starts = None if text.starts is None else numpy.insert(text.starts, places, True)
    lengths = lengths.copy()
    lengths[sentences] += 1
    return Text(ids.astype(IDS), special, starts), lengths


def fill(lengths: Iterable[int], opens: Iterable[bool], room: int) -> list[Span]:
    """Fill rows of at most `room` tokens with whole sentences. `opens`: a separator is the first token, and is left out where
    it would begin a row."""
    rows = []
    first = last = 0  # of the row
    for length, with_separator in zip(lengths, opens, strict=True):
        if last + length - first > room and last > first:
            rows.append((first, last))
            first = last
        if first == last and with_separator:
            first, last, length = first + 1, last + 1, length - 1
        last += length
        while last - first > room:
            rows.append((first, first + room))
            first += room
    return [*rows, (first, last)] if last > first else rows


def pairs(encoder: Encoder, block: Block, max_length: int, drawn: numpy.random.Generator) -> list[Row]:
    """The rows of a block for MLM and NSP."""
    text, sizes = block.text, block.lengths.tolist()
    room = max_length - encoder.pair.size
    longest = room // 2  # of a sentence, so that two fit into a row
    half = max(len(text.ids) // 2, 1)
    found: list[Segments] = []
    owners: list[tuple[int, int]] = []
    place = 0
    for number, (low, high) in enumerate(pairwise([*block.documents.tolist(), len(sizes)])):
        start = place
        bounds = [place]
        for size in sizes[low:high]:
            bounds += [*range(place + longest, place + size, longest), place + size] if size else []
            place += size
        for segments in _segments(bounds, room, drawn):
            found.append(segments)
            owners.append((number, (segments[0][0] - start) // half))
    return [
        encoder.pair.around(*(text[slice(*span)] for span in _shortened(*segments, room, drawn))) | {NEXT: int(random)}
        for segments, random in exchanged(found, owners, drawn)
    ]


def _segments(bounds: Sequence[int], room: int, drawn: numpy.random.Generator) -> list[Segments]:
    """A and B of each row of a document whose sentences end at `bounds`. B is empty where only one sentence is left."""
    found = []
    first, count = 0, len(bounds) - 1
    while first < count:
        target = room if drawn.random() >= SHORT else int(drawn.integers(FEWEST, room + 1))
        last = first + 1
        while last < count and bounds[last + 1] - bounds[first] <= (target if last > first + 1 else room):
            last += 1
        if last == count - 1 and last > first + 2:
            last -= 1  # for the last sentence, which would be alone
        middle = int(drawn.integers(first + 1, last)) if last > first + 1 else last
        found.append(((bounds[first], bounds[middle]), (bounds[middle], bounds[last])))
        first = last
    return found


def exchanged(
    found: Sequence[Segments], owners: Sequence[tuple[int, int]], drawn: numpy.random.Generator
) -> list[tuple[Segments, bool]]:
    """The rows, half of them with B of another row and owner (True); rows without a B take the A of another such row."""
    lonely = [i for i, (_, b) in enumerate(found) if b[0] == b[1]]
    whole = [i for i, (_, b) in enumerate(found) if b[0] < b[1]]
    made = [((found[i][0], found[j][0]), True) for i, j in partners(lonely, found, 0, owners, drawn)]
    candidates = partners(whole, found, 1, owners, drawn)
    wanted = (len(made) + len(whole)) / 2 - len(made)  # rows
    count = int(wanted / 2 + drawn.random()) if wanted > 0 else 0
    chosen = [candidates[i] for i in drawn.permutation(len(candidates))[:count]]
    taken = {i for pair in chosen for i in pair}
    for i, j in chosen:
        made += [((found[i][0], found[j][1]), True), ((found[j][0], found[i][1]), True)]
    return made + [(found[i], False) for i in whole if i not in taken]


def partners(
    rows: Sequence[int], found: Sequence[Segments], part: int, owners: Sequence[tuple[int, int]], drawn: numpy.random.Generator
) -> list[tuple[int, int]]:
    """Pairs of rows of different owners, neighbours in the length of a segment. Some rows may have no partner."""
    lengths = [found[i][part][1] - found[i][part][0] for i in rows]
    order = numpy.lexsort((drawn.random(len(rows)), lengths))
    waiting: list[int] = []  # rows of one owner
    made = []
    for i in (rows[place] for place in order):
        if waiting and owners[waiting[-1]] != owners[i]:
            other = waiting.pop()
            made.append((i, other) if drawn.random() < 0.5 else (other, i))
        else:
            waiting.append(i)
    return made


def _shortened(a: Span, b: Span, room: int, drawn: numpy.random.Generator) -> Segments:
    """Take from the longer segment until both fit, as BERT's script does: each token from a random end."""
    spans = [a, b]
    excess = a[1] - a[0] + b[1] - b[0] - room
    if excess <= 0:
        return a, b
    longer = int(b[1] - b[0] > a[1] - a[0])
    apart = abs((a[1] - a[0]) - (b[1] - b[0]))
    of_longer = min(excess, apart) + max(excess - apart, 0) // 2 + max(excess - apart, 0) % 2
    for which, count in ((longer, of_longer), (1 - longer, excess - of_longer)):
        front = int(drawn.binomial(count, 0.5))
        spans[which] = (spans[which][0] + front, spans[which][1] - (count - front))
    return spans[0], spans[1]
