"""Global batches and their parts: the same batches for any number of ranks, and as many tokens for each rank."""

import random

import pytest
from datasets import Dataset

from bench.train.batches import Rows
from bench.train.sharding import Parts, check, deal, global_batches
from fastbert.errors import InputError


def rows_of(lengths, seed=0):
    features = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    return Rows(features, seed, ("input_ids",))


@pytest.mark.parametrize("rows", range(1, 34))
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 32, 40])
def test_an_epoch_has_every_row_once_in_batches_of_equal_size(rows, batch):
    batches = global_batches(rows, batch, seed=3, epoch=1)
    assert len(batches) == -(-rows // batch)
    assert sorted(row for own in batches for row in own) == list(range(rows))
    sizes = {len(own) for own in batches}
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1


def test_the_order_is_of_seed_and_epoch():
    orders = [global_batches(50, 8, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert orders[0] == global_batches(50, 8, 0, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_the_parts_of_all_ranks_are_the_batches_of_one(ranks):
    draw = random.Random(ranks)
    lengths = [draw.randint(2, 60) for _ in range(101)]
    rows = rows_of(lengths)
    whole, parts = Parts(rows, 16), [Parts(rows, 16, rank, ranks) for rank in range(ranks)]
    assert len(whole) == len(parts[0]) == 7
    for epoch in range(3):
        rows.epoch = epoch
        expected = list(whole)
        for own, divided in zip(expected, zip(*parts, strict=True), strict=True):
            assert sorted(own) == sorted(row for part in divided for row in part)
            assert all(divided)
        assert [[row for row, _ in own] for own in expected] == global_batches(101, 16, 0, epoch)
        assert all(width == max(lengths[row] for row, _ in own) for own in expected for _, width in own)


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_dealt_evenly(seed):
    draw = random.Random(seed)
    ranks = draw.randint(2, 8)
    lengths = [min(int(draw.lognormvariate(4, 1)) + 2, 512) for _ in range(ranks * draw.randint(4, 16))]
    parts = deal(lengths, ranks)
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in part) for part in parts]
    # The last row that the fullest rank got went to the rank with the fewest tokens, so all others had as many by then.
    last = min(lengths[place] for place in parts[loads.index(max(loads))])
    assert max(loads) - last <= min(loads)
    best = max(sum(lengths) / ranks, max(lengths))  # that no division can be below
    assert max(loads) <= 4 / 3 * best


def test_a_few_rows():
    assert deal([7, 5, 4, 4], 2) == [[0, 3], [1, 2]]
    assert deal([9, 1, 1, 1, 6], 2) == [[0], [1, 2, 3, 4]]
    assert deal([3, 5], 2) == [[1], [0]] and deal([0, 0, 0], 3) == [[0], [1], [2]]


def test_a_batch_has_a_row_for_every_rank():
    for rows in range(1, 40):
        for batch in range(1, 20):
            smallest = min(len(own) for own in global_batches(rows, batch, 0, 0))
            for ranks in range(1, 6):
                if smallest >= ranks:
                    check(rows, batch, ranks)
                    assert all(deal([5] * smallest, ranks))
                else:
                    with pytest.raises(
                        InputError, match=f"--batch: expected a row for each of {ranks} ranks .* of {smallest} "
                    ):
                        check(rows, batch, ranks)


def test_the_lengths_of_rows():
    assert rows_of([3, 1, 5]).lengths() == [3, 1, 5]
    windows = Dataset.from_dict({"input_ids": [[[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9, 10]]]})
    assert Rows(windows, 0, ("input_ids",)).lengths() == [3, 3, 4]
    chosen = Rows(windows.select([2, 0]), 0, ("input_ids",))
    assert chosen.lengths() == [4, 3]
