"""Rows of a block: every token once, sentences whole, and pairs of which half are neighbours."""

import pickle

import numpy
import pytest
from transformers import AutoTokenizer

from bench.stream import sequences
from bench.stream.masking import SPECIAL, WORD_STARTS
from bench.stream.sequences import NEXT, fill, full_sentences, pairs, tokenised
from bench.stream.tokens import Encoder
from fastbert.errors import InputError
from tests.bench.stream.corpora import make_documents, numbers_tokenizer, words_of
from tests.bench.train.training import make_tokenizer

FIRST = 5  # the id of w0
DOCUMENTS = make_documents(150, words=16)
WORDS = len(words_of(DOCUMENTS))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(numbers_tokenizer(WORDS))


def generator(seed=0):
    return numpy.random.default_rng(seed)


def ids_of(row):
    return row["input_ids"].tolist()


@pytest.mark.parametrize("limit", [8, 24, 64, 5000])
def test_full_sentences_have_every_token_once_in_order(limit, encoder):
    rows = full_sentences(encoder, tokenised(encoder, DOCUMENTS), limit)
    assert [token - FIRST for row in rows for token in ids_of(row) if token >= FIRST] == words_of(DOCUMENTS)
    ends = {words_of([document])[-1] + FIRST for document in DOCUMENTS}
    of_sentences = {int(sentence.split()[0][1:]) + FIRST for document in DOCUMENTS for sentence in document}
    for row in rows:
        ids = ids_of(row)
        assert 3 <= len(ids) <= limit and (ids[0], ids[-1]) == (2, 3) and ids[1] != 3
        assert row[SPECIAL].tolist() == [token < FIRST for token in ids] and not row["token_type_ids"].any()
        inside = ids[1:-1]
        assert all((token == 3) == (before in ends) for before, token in zip(inside, inside[1:], strict=False) if before != 3)
        if limit >= 24:
            assert inside[0] in of_sentences, "a row begins with a sentence"
    assert len(rows) == 1 or sum(len(ids_of(row)) for row in rows) > (0.7 if limit < 24 else 0.6) * limit * len(rows)


@pytest.mark.parametrize(
    ("lengths", "opens", "rows"),
    [
        ([3, 4, 3], [0, 0, 0], [(0, 7), (7, 10)]),
        ([3, 5, 2], [0, 1, 0], [(0, 8), (8, 10)]),
        ([3, 7, 2], [0, 1, 0], [(0, 3), (4, 12)]),
        ([25], [0], [(0, 8), (8, 16), (16, 24), (24, 25)]),
        ([3, 18, 1], [0, 1, 0], [(0, 3), (4, 12), (12, 20), (20, 22)]),
        ([8, 1], [0, 1], [(0, 8)]),
        ([0, 8, 0], [0, 0, 0], [(0, 8)]),
        ([], [], []),
    ],
)
def test_filling_rows_of_8(lengths, opens, rows):
    assert fill(lengths, opens, 8) == rows


def where(token):
    """Document, and place in it."""
    return next((i, number) for i, words in enumerate(OF_DOCUMENT) if (number := token - FIRST) in words)


OF_DOCUMENT = [set(words_of([document])) for document in DOCUMENTS]


def check_pairs(rows, limit):
    """Every row is what its label says; how many tokens the rows have."""
    seen = []
    for row in rows:
        ids, types = numpy.array(ids_of(row)), row["token_type_ids"]
        (first, second), count = numpy.flatnonzero(ids == 3), len(ids)
        assert ids[0] == 2 and second == count - 1 <= limit - 1 and types.tolist() == [0] * (first + 1) + [1] * (second - first)
        assert row[SPECIAL].tolist() == [i in (0, first, second) for i in range(count)]
        a, b = ids[1:first], ids[first + 1 : second]
        assert len(a) and len(b) and all((numpy.diff(part) == 1).all() for part in (a, b)), "each is a piece of the text"
        follows = where(a[-1])[0] == where(b[0])[0]
        assert follows == (not row[NEXT])
        if follows:
            assert b[0] > a[-1] and (count < limit) <= (b[0] == a[-1] + 1), "only what is cut at the ends of A and B is between"
        seen += [*a, *b]
    assert len(seen) == len(set(seen)), "no token is read twice"
    return len(seen)


@pytest.mark.parametrize("limit", [24, 48, 128])
def test_pairs_are_half_neighbours_and_no_token_is_read_twice(limit, encoder):
    rows, used = [], []
    for seed in range(10):
        found = pairs(encoder, tokenised(encoder, DOCUMENTS), limit, generator(seed))
        used.append(check_pairs(found, limit))
        rows += found
    random = numpy.array([row[NEXT] for row in rows])
    assert abs(random.mean() - 0.5) < 0.02
    assert numpy.mean(used) > 0.9 * WORDS
    lengths = numpy.array([len(ids_of(row)) for row in rows])
    assert abs(lengths[random == 1].mean() - lengths[random == 0].mean()) < 0.04 * limit, "the length does not tell"


def test_documents_of_one_sentence_find_partners(encoder):
    alone = [[sentence] for document in DOCUMENTS for sentence in document]
    rows = pairs(encoder, tokenised(encoder, alone[:200]), 48, generator())
    assert all(row[NEXT] for row in rows) and 90 <= len(rows) <= 100
    assert pairs(encoder, tokenised(encoder, alone[:1]), 48, generator()) == []


def test_a_block_of_one_document_is_two_halves(encoder):
    one = [[sentence for document in DOCUMENTS for sentence in document]]
    rows = pairs(encoder, tokenised(encoder, one), 48, generator())
    half, apart = FIRST + WORDS // 2, []
    for row in rows:
        ids = ids_of(row)
        last, first = ids[ids.index(3) - 1], ids[ids.index(3) + 1]
        assert not row[NEXT] or first != last + 1
        apart += [(last < half) != (first < half)] * row[NEXT]
    assert numpy.mean(apart) > 0.95
    assert abs(numpy.mean([row[NEXT] for row in rows]) - 0.5) < 0.1


def test_one_row_in_ten_is_short(encoder):
    lengths = [len(ids_of(row)) for seed in range(10) for row in pairs(encoder, tokenised(encoder, one()), 48, generator(seed))]
    assert 0.03 < numpy.mean(numpy.array(lengths) < 24) < 0.12


def one():
    """Documents so long that few rows are short because they are at an end."""
    return [[sentence for document in DOCUMENTS[i::5] for sentence in document] for i in range(5)]


@pytest.mark.parametrize("a", [(0, 3), (0, 20), (0, 31)])
@pytest.mark.parametrize("b", [(50, 53), (50, 70), (50, 90)])
def test_the_longer_segment_is_cut_at_both_ends(a, b):
    ends = set()
    for seed in range(40):
        found = sequences._shortened(a, b, 30, generator(seed))
        sizes = [high - low for low, high in found]
        before = [high - low for low, high in (a, b)]
        assert sum(sizes) == min(sum(before), 30)
        assert all(low <= own[0] and own[1] <= high for own, (low, high) in zip(found, (a, b), strict=True))
        if sum(before) > 30 and min(before) < 15:
            assert min(sizes) == min(before)
        elif sum(before) > 30:
            assert abs(sizes[0] - sizes[1]) <= 1
        ends |= {found}
    assert sum(before) <= 30 or len(ends) > 3


def roberta():
    """Byte-level BPE, whose frame has two separators, and words told by the tokenizer only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for document in DOCUMENTS for sentence in document for letter in sentence} - {" "})
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġ", "Ġw"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), names, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **special)


@pytest.mark.parametrize("make", [make_tokenizer, roberta])
def test_words_and_frames_are_the_tokenizers(make):
    tokenizer = make()
    encoder = Encoder(tokenizer, whole_words=True)
    texts = ["w12 w345, unheard-of words", "w6"]
    one = tokenizer(texts[0], return_special_tokens_mask=True, return_token_type_ids=True)
    (row,) = full_sentences(encoder, tokenised(encoder, [texts[:1]]), 200)
    assert row["input_ids"].tolist() == one["input_ids"] and row[SPECIAL].tolist() == one["special_tokens_mask"]
    words = one.word_ids()
    told = [word is None or word != before for word, before in zip(words, [None, *words], strict=False)]
    assert row[WORD_STARTS].tolist() == told and not all(told)
    pair = tokenizer(*texts, return_special_tokens_mask=True, return_token_type_ids=True)
    rows = pairs(encoder, tokenised(encoder, [texts]), 200, generator())
    assert [(row["input_ids"].tolist(), row["token_type_ids"].tolist(), row[NEXT]) for row in rows] == [
        (pair["input_ids"], pair["token_type_ids"], 0)
    ]
    assert rows[0][SPECIAL].tolist() == pair["special_tokens_mask"]


def test_special_tokens_in_the_text_are_text_in_every_process():
    tokenizer = make_tokenizer()
    copied = pickle.loads(pickle.dumps(Encoder(tokenizer)))
    assert copied(["a [MASK] b"])[0].ids.tolist() == Encoder(tokenizer)(["a [MASK] b"])[0].ids.tolist()
    row = full_sentences(encoder := Encoder(tokenizer), tokenised(encoder, [["a [MASK] b [SEP]"]]), 40)[0]
    assert tokenizer.mask_token_id not in ids_of(row) and ids_of(row).count(tokenizer.sep_token_id) == 1


def test_a_tokenizer_without_a_separator_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.sep_token = None
    with pytest.raises(InputError, match="--model: its tokenizer has no separator"):
        Encoder(tokenizer)


@pytest.mark.long
def test_wordpiece_tells_words_as_the_tokenizer_does():
    """All words of a real vocabulary, and what is between them."""
    model = AutoTokenizer.from_pretrained(_demo())
    words = [word.removeprefix("##") for word in sorted(model.get_vocab())]
    texts = [" ".join(words[i : i + 30]) + "".join(words[i : i + 5]) for i in range(0, len(words), 30)]
    encoder = Encoder(model, whole_words=True)
    fast, _ = encoder(texts)
    encoder.continues = None
    slow, _ = encoder(texts)
    assert (fast.ids == slow.ids).all() and (fast.starts == slow.starts).all()


def _demo():
    from fastbert.cli.source import Source

    return Source.open(None, None).path
