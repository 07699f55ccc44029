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
from torch import Tensor

from fastbert.errors import InputError

IGNORED = -100  # the label that losses and metrics ignore
MASKED = 0.15  # share of the tokens that are predicted
AS_MASK, AS_OTHER = 0.8, 0.1  # shares of these that become [MASK], and any token of the vocabulary; the rest stay
INTEGERS = numpy.int64
# Columns of a row that the model does not take.
SPECIAL, WORD_STARTS = "special_tokens_mask", "word_starts"
Row = Mapping[str, Any]


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

    def __call__(self, rows: Sequence[Row], draws: Sequence[int]) -> dict[str, Tensor]:
        """A batch of `rows` with `labels`, int64: [rows, longest row] for columns of tokens, [rows] for numbers.

        A row has `input_ids` and `special_tokens_mask` (1: never selected), and for whole words `word_starts` (0: the token
        belongs to the word of the token before it; what is left of a word cut off by [CLS] is a word). Other columns are
        padded with 0. `draws`: the seed of each row, 0 or more.
        """
        masked = [self.masked(row, draw) for row, draw in zip(rows, draws, strict=True)]
        return {name: self._padded(name, [row[name] for row in masked]) for name in masked[0]}

    def masked(self, row: Row, draw: int) -> dict[str, Any]:
        """One row, without padding."""
        drawn = numpy.random.Generator(numpy.random.PCG64(draw))
        ids = numpy.array(row["input_ids"], INTEGERS)
        special = numpy.asarray(row[SPECIAL], bool)
        word = numpy.cumsum(numpy.asarray(row[WORD_STARTS], bool)) if self.whole_words else numpy.arange(len(ids))
        selected = (drawn.random(len(ids) + 1) < MASKED)[word] & ~special
        places = numpy.flatnonzero(selected)
        if not len(places):
            may_be = numpy.flatnonzero(~special)
            if len(may_be):  # otherwise the row has no text
                selected = (word == word[may_be[drawn.integers(len(may_be))]]) & ~special
                places = numpy.flatnonzero(selected)
        labels = numpy.full(len(ids), IGNORED, INTEGERS)
        labels[places] = ids[places]
        kind, other = drawn.random(len(places)), drawn.integers(self.size, size=len(places))
        ids[places[kind < AS_MASK]] = self.mask
        as_other = (kind >= AS_MASK) & (kind < AS_MASK + AS_OTHER)
        ids[places[as_other]] = other[as_other]
        kept = {name: value for name, value in row.items() if name not in (SPECIAL, WORD_STARTS)}
        return kept | {"input_ids": ids, "labels": labels}

    def _padded(self, name: str, values: Sequence[Any]) -> Tensor:
        if numpy.ndim(values[0]) == 0:
            return torch.tensor(values)
        longest = max(map(len, values))
        batch = numpy.full((len(values), longest), self.padding.get(name, 0), INTEGERS)
        for row, value in zip(batch, values, strict=True):
            row[longest - len(value) if self.on_the_left else 0 :][: len(value)] = value
        return torch.from_numpy(batch)
