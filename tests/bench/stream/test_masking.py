"""Masks: the shares of BERT, whole words, and that a row's masks are its own."""

import numpy
import pytest
import torch

from bench.stream.masking import IGNORED, Masking
from fastbert.errors import InputError
from tests.bench.train.training import make_tokenizer

FIRST = 5  # the first id that is not special


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def row_of(length, words=None, seed=0):
    """[CLS], `length` tokens in words of the given lengths, in turn, and [SEP]."""
    drawn = numpy.random.default_rng(seed)
    lengths = numpy.resize(words or [1], length)
    starts = [start for n in lengths for start in (1, *[0] * (n - 1))][:length]
    return {
        "input_ids": [2, *drawn.integers(FIRST, 150, length).tolist(), 3],
        "token_type_ids": [0] * (length + 2),
        "attention_mask": [1] * (length + 2),
        "special_tokens_mask": [1, *[0] * length, 1],
        "word_starts": [1, *starts, 1],
    }


def words_of(row):
    return numpy.cumsum(row["word_starts"])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("whole", [False, True])
def test_15_percent_of_80_10_10_and_no_special_token(whole, tokenizer):
    rows = [row_of(400, [1, 2, 3], seed) for seed in range(200)]
    batch = Masking(tokenizer, whole)(rows, range(200))
    before = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != IGNORED
    # Four standard deviations of 80,000 independent tokens, or of their words of two on average (2.33 weighted by length).
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.15, abs=4 * (0.1275 / 80_000 * (2.34 if whole else 1)) ** 0.5)
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(batch["labels"][chosen], before[chosen]) and torch.equal(batch["input_ids"][~chosen], before[~chosen])
    ids, labels = batch["input_ids"][chosen], batch["labels"][chosen]
    assert (ids == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.015)
    assert (ids == labels).float().mean() == pytest.approx(0.1, abs=0.012)
    other = ids[(ids != tokenizer.mask_token_id) & (ids != labels)]
    assert other.min() < 10 and other.max() > len(tokenizer) - 10, "from the whole vocabulary"


def test_whole_words_are_never_split(tokenizer):
    row = row_of(300, [1, 2, 3, 5])
    word = words_of(row)
    shares = []
    for draw in range(50):
        chosen = Masking(tokenizer, True)([row], [draw])["labels"][0].numpy() != IGNORED
        assert all(len(set(chosen[word == own])) == 1 for own in set(word[1:-1]))
        shares.append(chosen.mean())
    assert numpy.mean(shares) == pytest.approx(0.15, abs=0.03)


def test_a_word_that_a_special_token_cuts_off_is_a_word(tokenizer):
    """A sequence that begins in the middle of a word, and one that ends in it."""
    row = row_of(4, [2])
    row["word_starts"] = [1, 0, 0, 1, 0, 1]
    masks = {tuple((Masking(tokenizer, True)([row], [draw])["labels"][0] != IGNORED).tolist()) for draw in range(200)}
    first, second = (False, True, True, False, False, False), (False, False, False, True, True, False)
    assert masks == {first, second, tuple(a or b for a, b in zip(first, second, strict=True))}


@pytest.mark.parametrize("whole", [False, True])
def test_a_rows_masks_are_its_own(whole, tokenizer):
    """Whatever else is in the batch, in which order, and how long."""
    rows, draws, masking = [row_of(20 + 7 * i, [1, 2], i) for i in range(5)], [11, 2**40, 0, 7, 7], Masking(tokenizer, whole)
    batch = masking(rows, draws)
    for i, row in enumerate(rows):
        alone, length = masking([row], [draws[i]]), len(row["input_ids"])
        assert equal({name: value[i : i + 1, :length] for name, value in batch.items()}, alone)
        assert set(batch["labels"][i, length:].tolist()) <= {IGNORED} and not batch["attention_mask"][i, length:].any()
        assert set(batch["input_ids"][i, length:].tolist()) <= {tokenizer.pad_token_id}
    torch.rand(3)
    assert equal(masking(rows[::-1], draws[::-1]), {name: value.flip(0) for name, value in batch.items()})
    assert not torch.equal(masking(rows, [12, *draws[1:]])["labels"][0], batch["labels"][0])


@pytest.mark.parametrize("whole", [False, True])
def test_a_short_row_has_a_label_and_one_without_text_has_none(whole, tokenizer):
    masking = Masking(tokenizer, whole)
    found = set()
    for draw in range(60):
        labels = masking([row_of(3, [2])], [draw])["labels"][0, 1:-1] != IGNORED
        assert labels.any() and (not whole or labels[0] == labels[1])
        found.add(tuple(labels.tolist()))
    assert len(found) > 2, "any token or word may be the one"
    assert (masking([row_of(0)], [1])["labels"] == IGNORED).all()


def test_numbers_become_a_column_and_the_left_is_padded_if_the_tokenizer_says_so():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    rows = [row_of(2) | {"next_sentence_label": 1}, row_of(5) | {"next_sentence_label": 0}]
    batch = Masking(tokenizer)(rows, [1, 2])
    assert batch["next_sentence_label"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1], [1] * 7]
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label"}


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="--model: its tokenizer has no mask token"):
        Masking(tokenizer)
