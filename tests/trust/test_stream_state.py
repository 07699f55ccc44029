"""The place in a stream that a checkpoint has: whatever is in it, a loader continues there or refuses it in one line."""

import copy

import pytest

from bench.stream.loader import Loader, whole
from bench.stream.source import open_stream
from fastbert.errors import InputError
from tests.bench.train.training import make_tokenizer, written


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for name in "ab":
        written(folder, f"One {name} two.\nThree four.\n\n" * 20, f"{name}.txt")
    return open_stream([str(folder)], make_tokenizer(), "mlm", 16, 2, readers=2)


@pytest.fixture(scope="module")
def place(stream):
    loader = Loader(stream)
    next(iter(loader))
    return whole(stream, 1, [loader.states(1)])


def changed(place, path, value):
    place = copy.deepcopy(place)
    *parents, last = path
    inner = place
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return place


def test_a_good_place(stream, place):
    assert Loader(stream, state=place).batches == 1


NUMBERS = [("readers", "0", name) for name in ("epoch", "row", "taken")]


@pytest.mark.parametrize("value", [None, "1", 1.5, [], {}], ids=repr)
@pytest.mark.parametrize("path", [("batches",), ("readers",), ("stream",), ("readers", "0"), *NUMBERS], ids=".".join)
def test_a_damaged_place(path, value, stream, place):
    with pytest.raises(InputError, match="^--resume: "):
        Loader(stream, state=changed(place, path, value))


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_a_place_before_the_beginning(path, stream, place):
    with pytest.raises(InputError, match="cannot have stood at"):
        Loader(stream, state=changed(place, path, -1))


@pytest.mark.parametrize("state", [{}, {"stream": {}}, {"batches": 1, "readers": {}, "stream": {}}], ids=str)
def test_a_place_without_its_parts(state, stream):
    with pytest.raises(InputError, match="^--resume: "):
        Loader(stream, state=state)


def test_a_place_of_other_readers(stream, place):
    with pytest.raises(InputError, match="expected the places of 2 readers"):
        Loader(stream, state=changed(place, ("readers", "2"), place["readers"]["0"]))


def test_more_rows_than_the_block_has(stream, place):
    with pytest.raises(InputError, match="had taken 999 rows of a block"):
        next(iter(Loader(stream, state=changed(place, ("readers", "0", "taken"), 999))))


def test_a_debt_that_a_batch_could_not_pay(stream, place):
    """A reader that was so far behind its budget would fill the memory with one batch."""
    with pytest.raises(InputError, match="cannot have stood at"):
        Loader(stream, state=changed(place, ("readers", "0", "beyond"), -(10**12)))
