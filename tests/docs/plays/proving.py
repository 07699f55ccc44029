"""docs/proving.md: a classifier is equal, by itself, in autocast and in the reader's own test."""

from pathlib import Path

from tests.docs.play import Play
from tests.models.tiny import CLASSIFICATION, make, make_batch


def play(folder: Path) -> Play:
    names = {"model": make(CLASSIFICATION), "batch": make_batch(CLASSIFICATION)}
    printed = yield names
    assert names["result"].ok and "EQUAL: 2 outputs and 41 gradients, 4 calls through kernels" in printed

    printed = yield names
    assert names["worst"].ok and "True\n4 None" in printed

    yield names
    assert names["result"].ok and names["result"].kernel_calls == 4

    yield names
