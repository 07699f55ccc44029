"""Tokenises blocks: the tokens of all sentences in one array, and where special tokens stand around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece

from bench.stream.masking import SPECIAL, WORD_STARTS
from fastbert.errors import InputError

Array = NDArray[Any]
Row = dict[str, Any]
IDS = numpy.int32  # half of what the model takes: between processes


@dataclass(frozen=True)
class Frame:
    """The special tokens before, (between) and behind one text or two, and the token types of these and of the texts."""

    special: tuple[Array, ...]
    special_types: tuple[Array, ...]
    types: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: int) -> "Frame":
        """What the tokenizer puts around `texts` texts, read off an example."""
        example = tokenizer.encode(*["a"] * texts)
        ids, types = numpy.array(example.ids, IDS), numpy.array(example.type_ids, IDS)
        sequences = numpy.array([-1 if sequence is None else sequence for sequence in example.sequence_ids])
        starts = [int(numpy.flatnonzero(sequences == text)[0]) for text in range(texts)]
        ends = [int(numpy.flatnonzero(sequences == text)[-1]) + 1 for text in range(texts)]
        gaps = [slice(low, high) for low, high in zip([0, *ends], [*starts, len(ids)], strict=True)]
        return cls(tuple(ids[gap] for gap in gaps), tuple(types[gap] for gap in gaps), tuple(int(types[i]) for i in starts))

    @property
    def size(self) -> int:
        """Special tokens of a row."""
        return sum(map(len, self.special))

    def around(self, *texts: "Text") -> Row:
        """The row of the texts."""
        ids, types, special, starts = [], [], [], []
        for text, gap, gap_types, own_type in zip(texts, self.special, self.special_types, self.types, strict=False):
            ids += [gap, text.ids]
            types += [gap_types, numpy.full(len(text.ids), own_type, IDS)]
            special += [numpy.ones(len(gap), bool), text.special]
            starts += [numpy.ones(len(gap), bool), text.starts]
        last = self.special[-1]
        ones = numpy.ones(len(last), bool)
        row = {
            "input_ids": numpy.concatenate([*ids, last]),
            "token_type_ids": numpy.concatenate([*types, self.special_types[-1]]),
            SPECIAL: numpy.concatenate([*special, ones]),
        }
        return row if texts[0].starts is None else row | {WORD_STARTS: numpy.concatenate([*starts, ones])}


@dataclass(frozen=True)
class Text:
    """Tokens in a row: ids, int32; which are special, bool; which start a word, bool, or None if nobody asks."""

    ids: Array
    special: Array
    starts: Array | None

    def __getitem__(self, part: slice) -> "Text":
        return Text(self.ids[part], self.special[part], None if self.starts is None else self.starts[part])


class Encoder:
    """A tokenizer of transformers for text in which the names of special tokens are words like any other."""

    def __init__(self, tokenizer: Any, whole_words: bool = False) -> None:
        """
        Raises:
            InputError: the tokenizer has no separator.
        """
        self.tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.single, self.pair = (Frame.of(self.tokenizer, texts) for texts in (1, 2))
        self.separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if self.separator is None:
            raise InputError("--model: its tokenizer has no separator, which stands between documents")
        self.whole_words = whole_words
        self.continues = _continues(self.tokenizer) if whole_words else None
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.tokenizer.encode_special_tokens = True  # as text; a pickled tokenizer forgets it

    def __call__(self, sentences: Sequence[str]) -> tuple[Text, Array]:
        """The tokens of all sentences, one after another, and the number of tokens of each, int64 [sentences]."""
        # The fast variant tells no words. For WordPiece the vocabulary does.
        slow = self.whole_words and self.continues is None
        encode = self.tokenizer.encode_batch if slow else self.tokenizer.encode_batch_fast
        encoded = encode(sentences, add_special_tokens=False)
        of_each = [one.ids for one in encoded]
        lengths = numpy.fromiter(map(len, of_each), numpy.int64, len(of_each))
        ids = numpy.fromiter(chain.from_iterable(of_each), IDS, int(lengths.sum()))
        starts = None
        if slow:
            starts = numpy.fromiter(chain.from_iterable(map(_starts, encoded)), bool, len(ids))
        elif self.whole_words:
            starts = ~self.continues[ids]
        return Text(ids, numpy.zeros(len(ids), bool), starts), lengths


def _starts(encoding: Encoding) -> list[bool]:
    words = encoding.word_ids
    return [word is None or word != before for word, before in zip(words, [None, *words], strict=False)]


def _continues(tokenizer: Tokenizer) -> Array | None:
    """Whether each token of a WordPiece vocabulary goes on with a word; None for other kinds of tokenizers."""
    if not isinstance(tokenizer.model, WordPiece):
        return None
    prefix = tokenizer.model.continuing_subword_prefix
    found = numpy.zeros(tokenizer.get_vocab_size(), bool)
    for token, number in tokenizer.get_vocab().items():
        found[number] = token.startswith(prefix) and token != prefix
    return found
