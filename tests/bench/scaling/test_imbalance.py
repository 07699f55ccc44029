"""Unequal batches: the stretch of a step against cases by hand."""

import pytest

from bench.core.flops import forward_flops
from bench.core.lengths import Lengths
from bench.scaling.imbalance import BALANCED_STEPS, Rows, stretch
from tests.bench.scaling.tiny import tiny


def test_equal_lengths_stretch_nothing():
    found = stretch(tiny().config, Rows(4, 64, 1.0), 8, 3)
    assert (found.drawn, found.balanced, found.padded) == pytest.approx((1, 1, 1))


def test_two_ranks_of_one_row():
    """Lengths 10 or 30, each as likely: half of the steps have both, and then take as long as 30."""
    found = stretch(tiny().config, Rows(1, 64, lengths=Lengths("two", (10, 30))), 2, 4000)
    short, long = (forward_flops(tiny().config, "pretraining", [n]) for n in (10, 30))
    expected = 0.5 + 0.5 * 2 * long / (short + long)
    assert found.drawn == pytest.approx(expected, rel=0.02)
    assert found.padded == found.drawn, "one row needs no padding"


def test_one_row_a_rank_leaves_no_choice():
    found = stretch(tiny().config, Rows(1, 64, 0.5), 4, BALANCED_STEPS)
    assert found.balanced == pytest.approx(found.drawn) and found.balanced > 1.1


def test_more_ranks_wait_longer():
    few, many = (stretch(tiny().config, Rows(16, 128), ranks, 20) for ranks in (4, 256))
    assert 1 < few.drawn < many.drawn < few.padded and many.balanced < few.drawn
