"""docs/serving.md: its table of buckets says what the code does; tests/docs runs its blocks."""

import re
from pathlib import Path

from fastbert.graphs.buckets import LEAST, Buckets, token_capacity
from fastbert.graphs.options import Options

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_buckets_are_the_page_s():
    def numbers(name):
        (cell,) = re.findall(rf"^\| {name}[^|]*\| ([^|]*) \|$", PAGE, re.M)
        return [int(n) for n in re.findall(r"\d+", cell)]

    rows, lengths, tokens = numbers("rows"), numbers("length"), numbers("tokens")
    of = Buckets().of
    assert sorted({of(n, 1, 512).rows for n in range(1, rows[-1] + 1)}) == rows
    assert sorted({of(1, n, 512).length for n in range(1, lengths[-1] + 1)}) == lengths
    assert sorted({token_capacity(n) for n in range(1, tokens[-1] + 1)}) == tokens and tokens[0] == LEAST
    assert f"`max_graphs` ({Options().max_graphs})" in PAGE
