"""Who reads which documents, where blocks end, and that a reader goes on from any of these places."""

import json
from itertools import islice

import pytest

from bench.stream.documents import Place, blocks, deal, sentences
from bench.stream.shards import find
from tests.bench.stream.corpora import make_documents, write

DOCUMENTS = make_documents(60)


def read(shards, reader=0, readers=1, seed=0, size=400, place=Place(), count=None):  # noqa: B008 (it is frozen)
    """Blocks and the places behind them, up to the end of the first epoch or so many."""
    found = []
    for documents, behind in islice(blocks(shards, reader, readers, seed, size, place), count):
        found.append((documents, behind))
        if count is None and behind.epoch > place.epoch:
            return found
    return found


def texts(found):
    """The sentences of blocks, which may cut a document."""
    return [sentence for documents, _ in found for document in documents for sentence in document]


ALL = sorted(sentence for document in DOCUMENTS for sentence in document)


@pytest.mark.parametrize(("shards", "readers"), [(1, 1), (7, 3), (3, 3), (1, 4), (3, 8)])
def test_in_an_epoch_every_document_has_one_reader(shards, readers, tmp_path):
    files = find(write(tmp_path, DOCUMENTS, shards))
    for epoch in (0, 1):
        found = [read(files, reader, readers, size=10**9, place=Place(epoch), count=1) for reader in range(readers)]
        assert sorted(text for of_reader in found for text in texts(of_reader)) == ALL
        assert all(documents in DOCUMENTS for of_reader in found for documents in of_reader[0][0])


def test_epochs_and_seeds_deal_anew(tmp_path):
    files = find(write(tmp_path, DOCUMENTS, 12))
    orders = {
        json.dumps([[piece.shard.path for piece in own] for own in deal(files, 4, seed, epoch)])
        for seed in (0, 1, -1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 9
    assert {len(own) for own in deal(files, 4, 0, 0)} == {3}


@pytest.mark.parametrize(("shards", "readers"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("kind", ["lines", "objects"])
def test_a_reader_goes_on_from_any_block(kind, shards, readers, tmp_path):
    if kind == "lines":
        write(tmp_path, DOCUMENTS, shards)
    else:
        for shard in range(shards):
            rows = [json.dumps({"text": "\n".join(document)}) for document in DOCUMENTS[shard::shards]]
            (tmp_path / f"{shard}.jsonl").write_text("\n".join(rows))
    files = find([str(tmp_path)])
    whole = read(files, 0, readers, size=900, count=24)
    assert max(place.epoch for _, place in whole) >= 1
    for i, (_, place) in enumerate(whole[:-2]):
        assert read(files, 0, readers, size=900, place=place, count=2) == whole[i + 1 : i + 3]


def test_a_block_ends_with_a_document_unless_that_is_long(tmp_path):
    files = find(write(tmp_path, DOCUMENTS, 1))
    found = read(files, size=300)
    assert [document for documents, _ in found for document in documents] == DOCUMENTS
    sizes = [sum(len(text) for document in documents for text in document) for documents, _ in found]
    assert len(sizes) > 3 and all(300 <= size <= 600 + 80 for size in sizes[:-1])
    long = [[f"sentence {i} of the only document" for i in range(100)]]
    found = read(find(write(tmp_path / "long", long, 1)), size=300)
    assert all(len(documents) == 1 for documents, _ in found) and texts(found) == long[0]
    assert max(sum(map(len, documents[0])) for documents, _ in found) < 600 + 40
    assert [place.inside for _, place in found] == [True] * (len(found) - 1) + [False]


def test_a_long_object_is_a_block_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two " * 500, "three")))
    assert [len(documents) for documents, _ in read(find([str(tmp_path)]), size=300)] == [2, 1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two!  Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said: "No." (Really?) Then...  nothing', ['He said: "No."', "(Really?)", "Then...", "nothing"]),
        ("3.14 is e.g.no end", ["3.14 is e.g.no end"]),
        ("你好。今天怎么样？“好！”再见", ["你好。", "今天怎么样？", "“好！”", "再见"]),
        ("One.", ["One."]),
        (". . .", [".", ".", "."]),
        ("." * 20000 + "x", ["." * 20000 + "x"]),
    ],
)
def test_sentences_of_a_line(text, found):
    assert sentences(text) == found


def test_only_a_document_of_one_line_is_split(tmp_path):
    (tmp_path / "a.txt").write_text("One. Two.\n\n \nThree. Four.\nFive.\n")
    ((documents, _),) = read(find([str(tmp_path)]))
    assert documents == [["One.", "Two."], ["Three. Four.", "Five."]]
