"""Batches are the same for every number of ranks and workers and after every resumption, and of one size in tokens."""

import json
from collections import Counter
from itertools import islice

import numpy
import pytest
import torch

from bench.stream.loader import Loader, whole
from bench.stream.masking import IGNORED
from bench.stream.reader import Reader, State, made
from fastbert.errors import InputError
from tests.bench.stream.corpora import (
    equal,
    joined,
    make_documents,
    make_stream,
    numbers_tokenizer,
    rows_of,
    take,
    words_of,
    write,
)
from tests.bench.train.training import make_tokenizer

DOCUMENTS = make_documents(150)
WORDS = len(words_of(DOCUMENTS))
BATCHES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), DOCUMENTS, 6)


@pytest.fixture(scope="module")
def tokenizer():
    return numbers_tokenizer(WORDS)


@pytest.fixture(scope="module", params=["mlm", "pretraining"])
def stream(request, data, tokenizer):
    return make_stream(data, tokenizer, request.param)


def state_of(loader, batches):
    """As it comes back from a checkpoint, after a step that only some of the batches were used for."""
    return json.loads(json.dumps(whole(loader.stream, batches, [loader.states(batches)])))


def check_worlds(stream, worlds, count=BATCHES):
    alone = [joined([batch]) for batch in take(Loader(stream), count)]
    for world, workers in worlds:
        loaders = [Loader(stream, rank, world, workers) for rank in range(world)]
        ranks = [take(loader, count) for loader in loaders]
        assert [joined(list(parts)) for parts in zip(*ranks, strict=True)] == alone, (world, workers)
        if world == 1:
            assert all(map(equal, ranks[0], take(Loader(stream), count))), "in one order, too"
        one = Loader(stream)
        take(one, 5)
        assert whole(stream, 5, [loader.states(5) for loader in loaders]) == whole(stream, 5, [one.states(5)])


def test_ranks_and_workers_change_nothing(stream):
    check_worlds(stream, [(1, 2), (2, 0), (2, 1)])


@pytest.mark.long
def test_more_ranks_and_workers_change_nothing(stream):
    check_worlds(stream, [(1, 1), (1, 3), (1, 4), (2, 2), (4, 0), (4, 1)], 60)


def check_resumed(stream, places, world=1, workers=0):
    expected = take(Loader(stream), BATCHES)
    for place in places:
        first = Loader(stream)
        take(first, BATCHES)
        state = state_of(first, place)
        loaders = [Loader(stream, rank, world, workers, state) for rank in range(world)]
        ranks = [take(loader, BATCHES - place) for loader in loaders]
        assert [loader.batches for loader in loaders] == [BATCHES] * world
        if world == 1:
            assert all(map(equal, ranks[0], expected[place:]))
        else:
            assert [joined(list(parts)) for parts in zip(*ranks, strict=True)] == [joined([one]) for one in expected[place:]]


def test_resumed_behind_any_batch(stream):
    check_resumed(stream, (0, 1, 7, BATCHES - 1))
    check_resumed(stream, (11,), 1, 2)
    check_resumed(stream, (11,), 4)


@pytest.mark.long
def test_resumed_behind_every_batch(stream):
    check_resumed(stream, range(BATCHES))
    check_resumed(stream, range(0, BATCHES, 3), 2, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_ahead_are_not_lost(workers, data, tokenizer):
    """The second iteration goes on behind the last batch that was taken."""
    stream = make_stream(data, tokenizer)
    expected, loader = take(Loader(stream), 9), Loader(stream, workers=workers)
    found = [*islice(iter(loader), 2), *islice(iter(loader), 4), *islice(iter(loader), 3)]
    assert loader.batches == 9 and all(map(equal, found, expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_dropout_goes_on_from_where_it_was(workers, data, tokenizer):
    before = torch.get_rng_state()
    take(Loader(make_stream(data, tokenizer), workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)


def epoch_of(stream, reader, epoch):
    """The rows of a reader in an epoch."""
    found, state = [], State(epoch)
    for rows, _, behind in made(stream, reader, state, Counter()):
        found += rows
        if behind.epoch > epoch:
            return found


def test_in_an_epoch_mlm_reads_every_token_once_and_pairs_at_most_once(stream):
    for epoch in (0, 1):
        seen = Counter(
            token for reader in range(4) for row in epoch_of(stream, reader, epoch) for token in row["input_ids"].tolist()
        )
        words = [seen[5 + number] for number in range(WORDS)]
        assert set(words) == {1} if stream.task == "mlm" else (max(words) == 1 and numpy.mean(words) > 0.9)


def test_every_reader_gives_the_same_number_of_tokens(stream):
    """To half a row, over any number of batches: so do the ranks."""
    budget = stream.budget
    readers = [Reader(stream, number, State()) for number in range(4)]
    totals = numpy.zeros(4, int)
    for count in range(1, 40):
        of_batch = [sum(len(row["input_ids"]) for row in reader.batch()) for reader in readers]
        totals += of_batch
        assert (abs(totals - count * budget) <= stream.max_length / 2).all()
        assert min(of_batch) > 0
    assert [reader.state.beyond for reader in readers] == (totals - 39 * budget).tolist()


def test_masks_are_new_in_every_epoch_and_row(data, tokenizer):
    stream = make_stream(data[:1], tokenizer, block=10**6)
    seen = {}
    for batch in take(Loader(stream), 90):
        for row, labels in zip(rows_of(batch), batch["labels"], strict=True):
            seen.setdefault(tuple(row["ids"]), []).append(tuple((labels != IGNORED).tolist()[: len(row["ids"])]))
    again = [masks for ids, masks in seen.items() if len(masks) > 1 and len(ids) > 15]
    assert len(again) > 20 and sum(len(set(masks)) > 1 for masks in again) > 0.9 * len(again)
    with_another_seed = take(Loader(make_stream(data, tokenizer, seed=1)), 1)
    assert joined(with_another_seed) != joined(take(Loader(make_stream(data, tokenizer)), 1))


def test_whole_words_are_masked_whole(tmp_path):
    """Of a tokenizer that splits most words; no piece but the first of a row begins in the middle of one."""
    words = [["unbreakable words of several pieces stay whole", "whatever their neighbours are doing"]] * 40
    tokenizer = make_tokenizer()
    loader = Loader(make_stream(write(tmp_path, words, 2), tokenizer, whole_words=True, max_length=40))
    continues = {number for token, number in tokenizer.get_vocab().items() if token.startswith("##")}
    split = 0
    for batch in take(loader, 6):
        for row, labels in zip(rows_of(batch), batch["labels"], strict=True):
            chosen = (labels != IGNORED).tolist()
            for place in range(2, len(row["ids"])):
                if row["ids"][place] in continues:
                    split += 1
                    assert chosen[place] == chosen[place - 1]
    assert split > 100


def test_few_shards_are_shared_and_many_readers_need_documents(tmp_path, tokenizer):
    one = make_stream(write(tmp_path / "one", DOCUMENTS, 1), tokenizer)
    check_worlds(one, [(2, 2)], 6)
    with pytest.raises(InputError, match="finds no text"):
        take(Loader(make_stream(write(tmp_path / "few", [], 1), tokenizer)), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_shard_is_one_line_whoever_reads_it(workers, tmp_path, tokenizer):
    (tmp_path / "bad.txt").write_bytes(b"w1 w2\n\n\xff\n")
    with pytest.raises(InputError) as caught:
        take(Loader(make_stream([str(tmp_path)], tokenizer), workers=workers), 1)
    assert str(caught.value).startswith(f"--data: {tmp_path}/bad.txt, row 3: ") and "\n" not in str(caught.value)


def test_pairs_of_single_sentences_are_refused(tmp_path, tokenizer):
    data = write(tmp_path, [[sentence] for document in make_documents(100, words=8) for sentence in document], 4)
    with pytest.raises(InputError, match="next-sentence pairs need documents of two or more sentences, found none in"):
        take(Loader(make_stream(data, tokenizer, "pretraining", block=5000)), 1)


def test_a_reader_without_a_pair_is_refused(tmp_path, tokenizer):
    data = write(tmp_path, [["w1 w2"]] * 4, 4)
    with pytest.raises(InputError, match="reader 0 of 4 finds no rows: expected two documents or more of several sentences"):
        take(Loader(make_stream(data, tokenizer, "pretraining")), 1)


def test_what_does_not_go_together_is_one_line(data, tokenizer):
    stream = make_stream(data, tokenizer)
    with pytest.raises(InputError, match="--readers: expected a multiple of the 3 ranks, got 4"):
        Loader(stream, 0, 3)
    with pytest.raises(InputError, match="--workers: expected at most the 2 readers of a rank .--readers., got 3"):
        Loader(stream, 0, 2, 3)
    with pytest.raises(InputError, match="--readers: expected at most the 3 rows of a batch over all ranks, got 4"):
        make_stream(data, tokenizer, batch=3)
    state = whole(stream, 0, [Loader(stream).states(0)])
    for changed, said in (
        (make_stream(data, tokenizer, seed=1), "seed 0, now it has 1"),
        (make_stream(data, tokenizer, batch=16), "budget 48, now it has 96"),
        (make_stream([f"{data[0]}/00.txt"], tokenizer), "shards '6 shards, [0-9a-f]{8}', now it has '1 shards"),
    ):
        with pytest.raises(InputError, match=f"--resume: the stream had {said}"):
            Loader(changed, state=state)
