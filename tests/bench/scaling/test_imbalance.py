"""Unequal batches: rows are dealt out whole, and the stretch of a step against cases by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.core.flops import forward_flops
from bench.core.lengths import Lengths
from bench.scaling.imbalance import Rows, deal, stretch
from tests.bench.scaling.tiny import tiny


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_all_rows_are_dealt_equally_many_to_each(ranks, rows, random):
    lengths = np.array([random.randint(4, 512) for _ in range(ranks * rows)])
    hands = deal(lengths, ranks)
    assert hands.shape == (ranks, rows) and sorted(hands.ravel()) == sorted(lengths)
    tokens = hands.sum(axis=1)
    assert tokens.max() - tokens.min() <= lengths.max() - lengths.min(), "no worse than one row exchanged"


def test_by_hand():
    assert deal(np.array([1, 9, 5, 5]), 2).tolist() in ([[9, 1], [5, 5]], [[5, 5], [9, 1]])


def test_equal_lengths_stretch_nothing():
    found = stretch(tiny().config, Rows(4, 64, 1.0), 8, 3)
    assert (found.drawn, found.balanced, found.padded) == pytest.approx((1, 1, 1))


def test_two_ranks_of_one_row():
    """Lengths 10 or 30, each as likely: half of the steps have both, and then take as long as 30."""
    found = stretch(tiny().config, Rows(1, 64, lengths=Lengths("two", (10, 30))), 2, 4000)
    short, long = (forward_flops(tiny().config, "pretraining", [n]) for n in (10, 30))
    expected = 0.5 + 0.5 * 2 * long / (short + long)
    assert found.drawn == pytest.approx(expected, rel=0.02)
    assert found.balanced == found.padded == found.drawn, "one row a rank leaves no choice, and needs no padding"


def test_more_ranks_wait_longer():
    few, many = (stretch(tiny().config, Rows(16, 128), ranks, 20) for ranks in (4, 256))
    assert 1 < few.drawn < many.drawn < few.padded and many.balanced < few.drawn
