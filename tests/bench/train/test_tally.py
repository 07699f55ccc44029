"""What is recorded of the tallies of several ranks, on invented ones; checksums, which do not depend on the division; and
dropout, which does.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.train import lanes, ranks
from bench.train.batches import checksum
from bench.train.records import Settings
from bench.train.tally import FEWEST_TIMED, WARM_UP, Tally, batches_of_steps, combined, imbalance

ONE = Tally(tokens=[30, 10, 20], checksums=[1, 2, 3], seconds=[], peak_bytes=None, launches=7)
OTHER = Tally(tokens=[10, 30, 20], checksums=[4, 5, 2**32 - 1], seconds=[], peak_bytes=None, launches=0)


def test_two_ranks():
    found = combined([ONE, OTHER], [1, 2])
    assert (found["ranks"], found["tokens"], found["launches"], found["peak_bytes"]) == (2, 120, 0, None)
    assert found["imbalance"] == pytest.approx((1.5 + 1.5 + 1) / 3) and "seconds" not in found
    alone = combined([replace(ONE, checksums=[5, 7, 2], tokens=[40, 40, 40])], [1, 2])
    assert alone["checksums"] == found["checksums"] and alone["imbalance"] == 1
    assert combined([ONE, OTHER], [1, 1])["tokens"] == 80, "the last batch was made, but not trained on"
    assert combined([ONE, OTHER], [])["imbalance"] == 1


def test_the_slowest_rank_is_timed():
    steps = WARM_UP + FEWEST_TIMED
    one = Tally([10] * steps, [0] * steps, [9.0] * WARM_UP + [1.0] * FEWEST_TIMED, 50, 1)
    other = replace(one, seconds=[9.0] * WARM_UP + [2.0] * FEWEST_TIMED, peak_bytes=60)
    found = combined([one, other], [1] * steps)
    assert found["seconds"].median == 2 and found["tokens_per_second"] == 10 and found["peak_bytes"] == 60


def test_imbalance():
    assert imbalance([[3], [5]]) == 1 and imbalance([[4, 0]]) == 2 and imbalance([[2, 1, 0], [1, 1, 1]]) == 1.5


def test_batches_of_steps():
    settings = Settings("mlm", "file", "", steps=9, batch=4, accumulation=2)
    assert batches_of_steps(18, settings, 0, 7) == [2, 2, 1, 2, 2, 1, 2]  # five batches an epoch
    assert batches_of_steps(18, settings, 2, 4) == [1, 2] and batches_of_steps(16, settings, 3, 5) == [2, 2]


def padded(rows, length, left):
    """A batch of rows of tokens, padded on one side."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        places = slice(length - len(row), None) if left else slice(len(row))
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row[0] for row in rows])}


@pytest.mark.parametrize("left", [False, True])
def test_a_checksum_is_of_the_rows_whatever_batch_they_are_in(left):
    rows = [[5, 6], [7, 8, 9], [5], [1, 2, 3, 4]]
    whole = checksum(padded(rows, 6, left))
    assert whole == checksum(padded(rows[::-1], 4, left)) == sum(checksum(padded([row], 5, left)) for row in rows)
    for place in range(4):
        other = [list(row) for row in rows]
        other[place][-1] += 1
        assert checksum(padded(other, 6, left)) != whole
    other = padded(rows, 6, left)
    other["labels"][2] += 1
    assert checksum(other) != whole


def windows(texts, labels):
    """A batch of the windows of texts."""
    flat = [window for text in texts for window in text]
    batch = padded(flat, max(map(len, flat)), left=False) | {"labels": torch.tensor(labels)}
    return batch | {"windows": [len(text) for text in texts], "lengths": [len(window) for window in flat]}


def test_the_checksum_of_windows():
    first, second = [[1, 2, 3], [4, 5]], [[6, 7]]
    both = checksum(windows([first, second], [0, 1]))
    assert both == checksum(windows([first], [0])) + checksum(windows([second], [1]))
    assert both != checksum(windows([first, second], [1, 1])) != checksum(windows([first, second], [1, 0]))
    assert both != checksum(windows([first[:1], [first[1], *second]], [0, 1])), "another division into texts"


def test_each_rank_draws_dropout_of_its_own(monkeypatch):
    """Trainer seeds all ranks alike. A run that begins again behind a step draws no bits that it has had."""

    def drawn(rank, step=0):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        torch.manual_seed(5)
        watch = lanes.Watch("stock", None, lambda *_: None)
        watch.on_train_begin(SimpleNamespace(seed=5), SimpleNamespace(global_step=step), None)
        return torch.rand(4).tolist()

    torch.manual_seed(5)
    alone = torch.rand(4).tolist()
    assert drawn(0) == alone, "one rank is as Trainer seeds it"
    several = [alone, drawn(1), drawn(2), drawn(1, step=4)]
    assert all(a != b for i, a in enumerate(several) for b in several[:i]) and drawn(1) == several[1]
