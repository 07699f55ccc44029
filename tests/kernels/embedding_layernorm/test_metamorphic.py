"""Invariances of embedding_layernorm: padding, the order of the batch, longer or larger tables."""

import pytest
import torch

from fastbert.kernels.embedding_layernorm import embedding_layernorm
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from ..layouts import guarded
from .test_embedding_layernorm import DOUBLE, POSITIONS, SINGLE, TABLES, make

SHAPE, WIDTH = (3, 9), 24
OF_TOKENS = ("ids", "token_type_ids", "position_ids")


def case(dtype=SINGLE, **options):
    inputs, named = make(SHAPE, WIDTH, dtype, **options)
    shape = SHAPE if named["ids"] is not None else inputs["words"].shape[:-1]
    return inputs, named, torch.randn(*shape, WIDTH, dtype=DOUBLE).to(DEVICE, dtype)


def of_batch(index, inputs, named, dy):
    """The sequences of `index`."""
    moved = {name: x[index] if name in OF_TOKENS and x is not None and len(x) == SHAPE[0] else x for name, x in named.items()}
    embeds = inputs | {"words": inputs["words"][index]} if named["ids"] is None else inputs
    return run(embedding_layernorm, embeds, dy[index], **moved)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_the_order_of_the_batch(embeds, positions):
    """Rows are equal to the bit; sums over rows, in float64, up to their order."""
    given = case(DOUBLE, embeds=embeds, positions=positions)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    straight, shuffled = (of_batch(index, *given) for index in (torch.arange(3, device=DEVICE), order))
    assert torch.equal(shuffled["y"], straight["y"][order])
    if embeds:
        assert torch.equal(shuffled["dwords"], straight["dwords"][order])
    for name in straight.keys() - {"y", *(["dwords"] if embeds else [])}:
        torch.testing.assert_close(shuffled[name], straight[name])


def test_a_sequence_alone():
    given = case()
    together, alone = of_batch(slice(0, 3), *given), of_batch(slice(1, 2), *given)
    assert torch.equal(alone["y"], together["y"][1:2])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_stands_in_padding(p):
    """Other ids at the last three places change no other row, and no gradient if the loss leaves these places out."""
    inputs, named, dy = case()
    dy[:, 6:] = 0
    named["ids"][:, 6:] = 0
    named["ids"][:, :6] = named["ids"][:, :6].clamp(min=2)
    other = named | {"ids": named["ids"].clone(), "token_type_ids": named["token_type_ids"].clone()}
    other["ids"][:, 6:] = 1
    other["token_type_ids"][:, 6:] = 1 - other["token_type_ids"][:, 6:]
    one, two = (run(embedding_layernorm, inputs, dy, **x, p=p, seed=seed_tensor(5)) for x in (named, other))
    assert torch.equal(two.pop("y")[:, :6], one.pop("y")[:, :6])
    assert_same(two, one)


def test_longer_padding():
    """Rows and the gradients of the table rows that are read do not change, up to the order of sums in float64."""
    inputs, named, dy = case(DOUBLE)
    longer = dict(named)
    for name in ("ids", "token_type_ids"):
        longer[name] = torch.cat([named[name], torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)], dim=1)
    one = run(embedding_layernorm, inputs, dy, **named)
    other = run(embedding_layernorm, inputs, torch.cat([dy, torch.zeros_like(dy[:, :4])], dim=1), **longer)
    assert torch.equal(other.pop("y")[:, :9], one.pop("y"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)


def test_rows_that_nobody_names_are_not_read():
    inputs, named, dy = case(positions="of each sequence", vocabulary=30)
    one = run(embedding_layernorm, inputs, dy, **named)
    for table, ids in zip(TABLES, ("ids", "position_ids", "token_type_ids"), strict=True):
        unread = torch.ones(len(inputs[table]), dtype=torch.bool, device=DEVICE)
        unread[named[ids]] = False
        assert unread.any() or table == "types"
        inputs[table] = guarded(inputs[table].masked_fill(unread[:, None], torch.nan))
    assert_same(run(embedding_layernorm, inputs, dy, **named), one)


@pytest.mark.parametrize("factor", [2.0**-6, 8.0])
def test_layernorm_does_not_see_the_scale_of_the_tables(factor):
    """A power of two is exact in every step, so with eps = 0 only the gradients of the tables change."""
    inputs, named, dy = case()
    scaled = inputs | {name: factor * inputs[name] for name in TABLES}
    one, other = (run(embedding_layernorm, x, dy, **named, eps=0.0) for x in (inputs, scaled))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name] * (factor if name[1:] in TABLES else 1.0), tensor)


def test_gradients_are_linear_in_the_upstream_gradient():
    inputs, named, dy = case()
    one, four = (run(embedding_layernorm, inputs, x, **named) for x in (dy, 4 * dy))
    for name in one.keys() - {"y"}:
        assert torch.equal(four[name], 4 * one[name]), name


@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_results_share_no_memory_with_inputs(embeds):
    """The ids, which are only read, do not change either."""
    inputs, named, dy = case(embeds=embeds, positions="of each sequence")
    read = [t for t in (*inputs.values(), *named.values(), dy) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in read]
    results = run(embedding_layernorm, inputs, dy, **named, p=0.2, seed=seed_tensor(3))
    assert all(torch.equal(t, copy) for t, copy in zip(read, before, strict=True))
    taken = {t.untyped_storage().data_ptr() for t in read}
    assert not taken & {t.untyped_storage().data_ptr() for t in results.values()}
