"""Encodes rows as token ids: tokenizing for all tasks, the length limit, and cutting of longer texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from datasets import Dataset

from bench.stream.masking import IGNORED, SPECIAL, WORD_STARTS
from bench.train.file import Row
from fastbert import Windows

PERCENTILE = 95
SHORTEST_CONTEXT = 8  # tokens of context that even the longest question leaves room for
Features = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """One sequence from the tokenizer, with special tokens (segment None), before cutting."""

    ids: list[int]
    types: list[int]
    segments: list[int | None]
    words: list[int | None]
    offsets: list[tuple[int, int]]

    def select(self, places: Sequence[int]) -> Features:
        """The features of the tokens at `places`."""
        return {
            "input_ids": [self.ids[i] for i in places],
            "token_type_ids": [self.types[i] for i in places],
            "attention_mask": [1] * len(places),
        }


def tokenize(tokenizer: Any, firsts: list[Any], seconds: list[str] | None = None) -> list[Tokens]:
    """Texts (or lists of words), alone or in pairs."""
    words = bool(firsts) and not isinstance(firsts[0], str)
    encoded = tokenizer(firsts, seconds, is_split_into_words=words, truncation=False, verbose=False)
    return [Tokens(e.ids, e.type_ids, e.sequence_ids, e.word_ids, e.offsets) for e in encoded.encodings]


def of_rows(tokenizer: Any, task: str, rows: list[Row]) -> list[list[Tokens]]:
    """The sequences of each row: one, or one per ending for multiple choice."""
    if task == "multiple-choice":
        counts = [len(row["endings"]) for row in rows]
        contexts = [row["text"] for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        flat = iter(tokenize(tokenizer, contexts, [ending for row in rows for ending in row["endings"]]))
        return [[next(flat) for _ in range(count)] for count in counts]
    first, second = COLUMNS.get(task, ("text", None))
    tokens = tokenize(tokenizer, [row[first] for row in rows], [row[second] for row in rows] if second else None)
    return [[one] for one in tokens]


COLUMNS: dict[str, tuple[str, str | None]] = {
    "matching": ("text", "second"),
    "pretraining": ("text", "second"),
    "qa": ("question", "context"),
    "ner": ("words", None),
}


def percentile(lengths: Sequence[int]) -> int:
    """The length that 95 % of the sequences do not exceed."""
    return int(numpy.percentile(lengths, PERCENTILE, method="higher"))


def kept(segments: Sequence[int | None], limit: int, truncation: str) -> list[int]:
    """The positions kept when a sequence is cut to `limit`: all special tokens; in a pair the longer text is cut first."""
    if len(segments) <= limit:
        return list(range(len(segments)))
    budget = limit - sum(segment is None for segment in segments)
    parts = [[i for i, segment in enumerate(segments) if segment == number] for number in (0, 1)]
    half = budget // 2
    sizes = [len(part) for part in parts]
    if min(sizes) > half:
        sizes = [budget - half, half]
    else:
        shorter = sizes.index(min(sizes))
        sizes[1 - shorter] = budget - sizes[shorter]
    chosen = [i for part, size in zip(parts, sizes, strict=True) for i in _ends(part, size, truncation)]
    return sorted(chosen + [i for i, segment in enumerate(segments) if segment is None])


def _ends(part: list[int], size: int, truncation: str) -> list[int]:
    """`size` of the positions, from the side or sides that are kept."""
    if len(part) <= size:
        return part
    head = {"head": size, "tail": 0, "head+tail": size - size // 2}[truncation]
    return part[:head] + part[len(part) - (size - head) :]


def pieces(segments: Sequence[int | None], limit: int) -> list[list[int]]:
    """Split a text into consecutive pieces of at most `limit` tokens, each with its special tokens."""
    special = [i for i, segment in enumerate(segments) if segment is None]
    text = [i for i, segment in enumerate(segments) if segment is not None]
    size = limit - len(special)
    return [sorted(special + text[start : start + size]) for start in range(0, max(len(text), 1), size)]


def _choice(row: Row, sequences: list[Tokens], limit: int, how: str, _: dict[str, int]) -> list[Features]:
    cut = [tokens.select(kept(tokens.segments, limit, how)) for tokens in sequences]
    return [{name: [features[name] for features in cut] for name in cut[0]} | {"labels": row["choice"]}]


def _labelled(row: Row, sequences: list[Tokens], limit: int, how: str, labels: dict[str, int]) -> list[Features]:
    (tokens,) = sequences
    return [tokens.select(kept(tokens.segments, limit, how)) | {"labels": labels[row["label"]]}]


def _tagged(row: Row, sequences: list[Tokens], limit: int, how: str, labels: dict[str, int]) -> list[Features]:
    """Put each word's label at its first token."""
    (tokens,) = sequences
    before = [None, *tokens.words]
    own = [
        IGNORED if word is None or word == previous else labels[row["tags"][word]]
        for word, previous in zip(tokens.words, before, strict=False)
    ]
    places = kept(tokens.segments, limit, how)
    return [tokens.select(places) | {"labels": [own[i] for i in places]}]


def _plain(row: Row, sequences: list[Tokens], limit: int, how: str, _: dict[str, int]) -> list[Features]:
    (tokens,) = sequences
    found = pieces(tokens.segments, limit) if how == "split" else [kept(tokens.segments, limit, how)]
    special = [int(segment is None) for segment in tokens.segments]
    before = [None, *tokens.words]
    starts = [int(word is None or word != other) for word, other in zip(tokens.words, before, strict=False)]
    return [
        tokens.select(places) | {SPECIAL: [special[i] for i in places], WORD_STARTS: [starts[i] for i in places]}
        for places in found
    ]


def _sentences(row: Row, sequences: list[Tokens], limit: int, how: str, labels: dict[str, int]) -> list[Features]:
    return [one | {"next_sentence_label": row["random"]} for one in _plain(row, sequences, limit, how, labels)]


FEATURES: dict[str, Callable[[Row, list[Tokens], int, str, dict[str, int]], list[Features]]] = {
    "classification": _labelled,
    "matching": _labelled,
    "ner": _tagged,
    "multiple-choice": _choice,
    "mlm": _plain,
    "clm": _plain,
    "pretraining": _sentences,
}


def in_windows(tokenizer: Any, rows: list[Row], limit: int) -> list[Features]:
    """Questions with their contexts in windows that overlap by a third, so that some window contains the whole answer.

    The tokenizer cuts the context and joins each window with its question. The stride, a third of the room that the
    question leaves, differs per row, so rows are cut one at a time and not as a batch.
    """
    backend = tokenizer.backend_tokenizer
    special = backend.num_special_tokens_to_add(True)
    texts = ([row[name] for row in rows] for name in ("question", "context"))
    pairs = (tokenizer(own, add_special_tokens=False, truncation=False, verbose=False).encodings for own in texts)
    found = []
    for row, question, context in zip(rows, *pairs, strict=True):
        covered = _answer(context.offsets, row)
        start = step = 0
        if len(question) + len(context) + special > limit:
            question.truncate(max(limit - special - SHORTEST_CONTEXT, 1))
            size = limit - special - len(question)
            context.truncate(size, stride=size // 3)
            step = size - size // 3
        for part in (context, *context.overflowing):
            window = backend.post_process(question, part)
            segments = window.sequence_ids
            first = last = 0  # [CLS]: this window does not contain the whole answer
            if covered and start <= covered[0] and covered[1] < start + len(part):
                first, last = (segments.index(1) + place - start for place in covered)
            # Each token's span in the context, for the answer's text; tokens outside the context cannot be an answer.
            spans = [list(span) if segment == 1 else [-1, -1] for span, segment in zip(window.offsets, segments, strict=True)]
            tokens = {"input_ids": window.ids, "token_type_ids": window.type_ids, "attention_mask": window.attention_mask}
            own = {"start_positions": first, "end_positions": last, "spans": spans, "question_row": row["row"]}
            found.append(tokens | own)
            start += step
    return found


def _answer(offsets: list[tuple[int, int]], row: Row) -> tuple[int, int] | None:
    """The first and last token of the context that the answer covers; None without an answer."""
    if not row["answers"]:
        return None
    start = row["starts"][0]
    end = start + len(row["answers"][0])
    covered = [i for i, (low, high) in enumerate(offsets) if low < end and high > start]
    return (covered[0], covered[-1]) if covered else None


def lengths(rows: Dataset, task: str, tokenizer: Any) -> tuple[list[int], int]:
    """Token counts of all uncut sequences, and the total number of tokens unknown to the vocabulary."""

    def measure(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = of_rows(tokenizer, task, _as_rows(batch))
        unknown = [sum(one.ids.count(tokenizer.unk_token_id) for one in row) for row in found]
        return {"lengths": [[len(one.ids) for one in row] for row in found], "unknown": unknown}

    measured = rows.map(measure, batched=True, remove_columns=rows.column_names, desc="tokenising")
    return [length for row in measured["lengths"] for length in row], sum(measured["unknown"])


def encode(
    rows: Dataset,
    task: str,
    tokenizer: Any,
    limit: int,
    truncation: str,
    labels: dict[str, int],
    windows: Windows | None = None,
) -> Dataset:
    """The features of every row, cut to `limit` tokens, or with `windows` the lists of its windows' features."""

    def features_of(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if windows is not None:
            texts = [batch[name] for name in COLUMNS.get(task, ("text", None)) if name]
            return windows.split(*texts) | {"labels": [labels[label] for label in batch["label"]]}
        own = _as_rows(batch)
        if task == "qa":
            found = in_windows(tokenizer, own, limit)
        else:
            pairs = zip(own, of_rows(tokenizer, task, own), strict=True)
            found = [one for row, of_row in pairs for one in FEATURES[task](row, of_row, limit, truncation, labels)]
        return {name: [features[name] for features in found] for name in found[0]}

    return rows.map(features_of, batched=True, remove_columns=rows.column_names, desc="encoding")


def _as_rows(batch: dict[str, list[Any]]) -> list[Row]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
