"""Masks tokens for prediction (MLM): the masks of a row depend on that row and its own seed only.

So neither the other rows of a batch, nor the number of ranks or worker processes, nor where a run was resumed changes them.

Not transformers' DataCollatorForLanguageModeling: it draws from one generator for a whole batch. Called row by row, each with
a generator of its own, it takes 0.7 ms for a row of 300 tokens and 1.4 ms with whole words (this class: 0.07 ms), and its
whole words are what stands between two gaps in the text ("don't," is one word, so is a sentence in Chinese), all of which
become [MASK] instead of 80 % of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert.errors import InputError

IGNORED = -100  # the label that losses and metrics ignore
MASKED = 0.15  # share of the tokens that are predicted
AS_MASK, AS_OTHER = 0.8, 0.1  # shares of these that become [MASK], and any token of the vocabulary; the rest stay
INTEGERS = numpy.int64
OF_TOKENS = ("input_ids", "token_type_ids", "labels")  # other columns are numbers
ATTENDED = "attention_mask"  # made anew from the lengths
SPECIAL, WORD_STARTS = "special_tokens_mask", "word_starts"  # the model does not take these
Row = Mapping[str, Any]
Array = NDArray[Any]
Batch = dict[str, Tensor]


class Masking:
    """Pads rows to one length and selects 15 % of the tokens (or words) of each, at least one, for prediction.

    80 % of the selected tokens become [MASK], 10 % any token of the vocabulary, 10 % stay, as in BERT's own pre-training; of
    a word each token for itself.
    """

    def __init__(self, tokenizer: Any, whole_words: bool = False) -> None:
        """
        Raises:
            InputError: the tokenizer has no mask token or no padding token.
        """
        for name in ("mask", "pad"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise InputError(f"--model: its tokenizer has no {name} token, which masked language modelling needs")
        self.whole_words = whole_words
        self.mask, self.size = tokenizer.mask_token_id, len(tokenizer)
        self.on_the_left = tokenizer.padding_side == "left"
        self.padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "labels": IGNORED}

    def __call__(self, rows: Sequence[Row], draws: Sequence[int]) -> Batch:
        """A padded batch of `rows` with `labels`.

        A row has `input_ids` and `special_tokens_mask` (1: never selected), and for whole words `word_starts` (0: the token
        belongs to the word of the token before it; what is left of a word cut off by [CLS] is a word). `draws`: the seed of
        each row, 0 or more.
        """
        masked = [self.masked(row, draw) for row, draw in zip(rows, draws, strict=True)]
        return self.padded(*flat(masked))

    def masked(self, row: Row, draw: int) -> dict[str, Any]:
        """One row with `labels`, without padding."""
        drawn = numpy.random.Generator(numpy.random.PCG64(draw))
        ids = numpy.array(row["input_ids"])
        special = numpy.asarray(row[SPECIAL], bool)
        word = numpy.cumsum(numpy.asarray(row[WORD_STARTS], bool)) if self.whole_words else numpy.arange(len(ids))
        selected = (drawn.random(len(ids) + 1) < MASKED)[word] & ~special
        places = numpy.flatnonzero(selected)
        if not len(places):
            may_be = numpy.flatnonzero(~special)
            if len(may_be):  # otherwise the row has no text
                selected = (word == word[may_be[drawn.integers(len(may_be))]]) & ~special
                places = numpy.flatnonzero(selected)
        labels = numpy.full_like(ids, IGNORED)
        labels[places] = ids[places]
        kind, other = drawn.random(len(places)), drawn.integers(self.size, size=len(places))
        ids[places[kind < AS_MASK]] = self.mask
        as_other = (kind >= AS_MASK) & (kind < AS_MASK + AS_OTHER)
        ids[places[as_other]] = other[as_other]
        kept = {name: value for name, value in row.items() if name not in (SPECIAL, WORD_STARTS, ATTENDED)}
        return kept | {"input_ids": ids, "labels": labels}

    def padded(self, columns: Mapping[str, Array], lengths: Array) -> Batch:
        """A batch, int64, of the tokens of all rows, one after another, and the rows' lengths.

        [rows, longest row] for columns of tokens and the attention mask, [rows] for numbers.
        """
        longest = int(lengths.max())
        places = numpy.arange(longest)
        real = places >= longest - lengths[:, None] if self.on_the_left else places < lengths[:, None]
        batch = {ATTENDED: torch.from_numpy(real.astype(INTEGERS))}
        for name, column in columns.items():
            if name in OF_TOKENS:
                filled = numpy.full(real.shape, self.padding[name], INTEGERS)
                filled[real] = column
            else:
                filled = column.astype(INTEGERS)
            batch[name] = torch.from_numpy(filled)
        return batch


def flat(rows: Sequence[Row]) -> tuple[dict[str, Array], Array]:
    """The columns of rows, each in one array, and the rows' lengths."""
    columns = {
        name: (numpy.concatenate if name in OF_TOKENS else numpy.asarray)([row[name] for row in rows]) for name in rows[0]
    }
    return columns, numpy.array([len(row["input_ids"]) for row in rows])
