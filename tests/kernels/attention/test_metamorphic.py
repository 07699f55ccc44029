"""Invariances of attention: the contents of padding, its length, and the other sequences do not matter."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.attention import attention
from fastbert.kernels.core.launch import INTERPRETED
from fastbert.testing.attention import drawn_keep, make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

pytestmark = pytest.mark.one_in(3)

LENGTHS = (7, 24, 41)  # of 64: with blocks of 16 keys, several are entirely past the last key of each
SHAPE = (3, 64, 1, 16)
HUGE = {torch.float64: 1e30, torch.float32: 1e30, torch.float16: 6e4}
GRADIENTS_OF_KEYS = ("dk", "dv")


def padding(length=64):
    return torch.arange(length, device=DEVICE) < torch.tensor(LENGTHS, device=DEVICE)[:, None]


def masked_call(inputs, dy, how, **options):
    """Padding through the key mask, or as a general mask, which skips no block of keys."""
    key_mask = padding(inputs["k"].shape[1])
    if how == "general":
        return run(attention, inputs, dy, mask=key_mask[:, None, None, :], **options)
    return run(attention, inputs, dy, key_mask=key_mask, **options)


@pytest.mark.parametrize("how", ["padding", "general", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_numbers_in_padding_change_nothing(dtype, how):
    """To the bit, forward and backward, also in blocks that are read. A masked key has no gradient."""
    inputs, dy = make_inputs(*SHAPE, dtype), normal(*SHAPE, dtype=dtype)
    spoiled, gone = dict(inputs), ~padding()
    for name in ("k", "v"):
        spoiled[name] = inputs[name].clone()
        spoiled[name][gone] = (torch.rand(SHAPE, device=DEVICE).to(dtype)[gone] - 0.5).sign() * HUGE[dtype]
    with tiles((32, 16)):
        results = masked_call(spoiled, dy, how, causal=how == "causal")
        assert_same(results, masked_call(inputs, dy, how, causal=how == "causal"))
    for name in GRADIENTS_OF_KEYS:
        assert not results[name][gone].any() and results[name][~gone].any(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_blocks_of_padding_are_not_read(causal, bad):
    """Behind the block of the last valid key, even a NaN changes no bit, forward and backward."""
    if not INTERPRETED:
        pytest.skip("how long a block is depends on the GPU")
    inputs, dy = make_inputs(*SHAPE), normal(*SHAPE)
    spoiled = {name: x.clone() for name, x in inputs.items()}
    for row, length in enumerate(LENGTHS):
        for name in ("k", "v"):
            spoiled[name][row, -(-length // 16) * 16 :] = bad
    with tiles((32, 16)):
        results = masked_call(spoiled, dy, "padding", causal=causal)
        assert_same(results, masked_call(inputs, dy, "padding", causal=causal))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "v", "dy"])
@pytest.mark.one_in(1)
def test_what_is_not_finite_spoils_no_more_than_in_eager(name, bad):
    """Under dropout, which removes a weight or a gradient whatever its value."""
    compared = ("y", "dv") if name == "q" else ("y", "dq", "dk", "dv")  # the reference's masks also remove a NaN score
    inputs = make_inputs(1, 20, 2, 8) | {"dy": normal(1, 20, 2, 8)}
    inputs[name][0, 3, 1, 5] = bad
    dy, seed = inputs.pop("dy"), seed_tensor(3)
    results = run(attention, inputs, dy, p=0.5, seed=seed)
    eager = run(reference.attention, inputs, dy, p=0.5, keep=drawn_keep(1, 2, 20, 20, 0.5, seed))
    for result in compared:
        assert (results[result].isfinite() | ~eager[result].isfinite()).all(), result
    assert not all(results[result].isfinite().all() for result in compared)  # the case is what it claims


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("how", ["padding", "general"])
def test_nan_in_padding_comes_through_or_changes_nothing(how, name, bad):
    """In a block that is read, 0 times NaN is NaN, as in eager. Finite results are right, and results that are finite in eager
    are finite here. A masked key's score is replaced, so in the forward no bad key shows."""
    inputs, dy = make_inputs(*SHAPE), normal(*SHAPE)
    spoiled = inputs | {name: inputs[name].masked_fill(~padding()[..., None, None], bad)}
    with tiles((32, 16)):
        clean, results = masked_call(inputs, dy, how), masked_call(spoiled, dy, how)
    eager = run(reference.attention, spoiled, dy, key_mask=padding())
    for result, tensor in results.items():
        finite = tensor.isfinite()
        assert torch.equal(tensor[finite], clean[result][finite]), result
        assert (finite | ~eager[result].isfinite()).all(), result
    assert name == "v" or torch.equal(results["y"], clean["y"])
    assert not all(tensor.isfinite().all() for tensor in results.values())  # the case is what it claims


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_padded_queries_without_a_gradient_change_nothing(causal, p):
    """The query of a padded position does not matter to any key if the loss leaves its output out."""
    inputs, dy, gone = make_inputs(*SHAPE), normal(*SHAPE), ~padding()
    dy[gone] = 0
    spoiled = inputs | {"q": inputs["q"].masked_fill(gone[..., None, None], 1e4)}
    with tiles((32, 16), kv=(16, 16)):
        one, other = (masked_call(x, dy, "padding", causal=causal, p=p, seed=seed_tensor(2)) for x in (inputs, spoiled))
    assert_same({name: other[name] for name in GRADIENTS_OF_KEYS}, {name: one[name] for name in GRADIENTS_OF_KEYS})
    assert torch.equal(other["y"][~gone], one["y"][~gone]) and not other["dq"][gone].any()


def test_what_a_causal_row_does_not_see_yet_is_not_read():
    """A tile reads up to the key of its last row; keys past that block belong to later rows."""
    if not INTERPRETED:
        pytest.skip("how long a block is depends on the GPU")
    inputs = make_inputs(1, 64, 1, 16)
    spoiled = {name: x.clone() for name, x in inputs.items()}
    for name in ("k", "v"):
        spoiled[name][:, 32:] = torch.nan
    with tiles((16, 16)):
        y = run(attention, inputs, None, causal=True)["y"]
        changed = run(attention, spoiled, None, causal=True)["y"]
    assert torch.equal(changed[:, :32], y[:, :32]) and changed[:, 32:].isnan().all()


@pytest.mark.parametrize("queries", ["padded too", "alone"])
@pytest.mark.parametrize("longer", [65, 96])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_longer_padding_changes_nothing(p, longer, queries):
    """Nor does it change the dropout of the existing positions, which depends on the position."""
    inputs, dy, seed = make_inputs(*SHAPE), normal(*SHAPE), seed_tensor(3)
    more = {name: torch.cat([x, normal(3, longer - 64, 1, 16)], dim=1) for name, x in inputs.items()}
    more_dy = torch.cat([dy, torch.zeros(3, longer - 64, 1, 16, device=DEVICE)], dim=1)
    if queries == "alone":
        more["q"], more_dy = inputs["q"], dy
    with tiles((32, 16)):
        results = masked_call(inputs, dy, "padding", p=p, seed=seed)
        padded = masked_call(more, more_dy, "padding", p=p, seed=seed)
    assert_same({name: x[:, :64] for name, x in padded.items()}, results)
    assert not any(padded[name][:, 64:].any() for name in GRADIENTS_OF_KEYS)


@pytest.mark.parametrize("length", [7, 24, 33])
def test_padding_is_as_no_padding(length):
    inputs, dy = make_inputs(1, 40, 2, 16), normal(1, 40, 2, 16)
    cut = {name: x[:, :length] for name, x in inputs.items()}
    dy[:, length:] = 0
    with tiles((16, 16)):
        padded = run(attention, inputs, dy, key_mask=torch.arange(40, device=DEVICE)[None] < length)
        assert_same({name: x[:, :length] for name, x in padded.items()}, run(attention, cut, dy[:, :length]))


@pytest.mark.parametrize("dim", [0, 2], ids=["batch", "heads"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_order_of_batch_and_heads(masked, dim):
    inputs, dy = make_inputs(3, 21, 3, 8), normal(3, 21, 3, 8)
    key_mask = padding(21)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    shuffled = {name: x.index_select(dim, order) for name, x in inputs.items()}
    one = run(attention, inputs, dy, **({"key_mask": key_mask} if masked else {}))
    moved = key_mask[order] if dim == 0 else key_mask
    other = run(attention, shuffled, dy.index_select(dim, order), **({"key_mask": moved} if masked else {}))
    assert_same(other, {name: x.index_select(dim, order) for name, x in one.items()})


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_order_of_keys(masked):
    """A sum over keys in any order: in float64, where only a rounding's difference is left."""
    inputs, dy = make_inputs(3, 40, 1, 8, torch.float64), normal(3, 40, 1, 8, dtype=torch.float64)
    order, seen = torch.randperm(40).to(DEVICE), torch.rand(3, 40, device=DEVICE) > 0.3
    options = [{"key_mask": mask} if masked else {} for mask in (seen, seen[:, order])]
    moved = inputs | {name: inputs[name][:, order] for name in ("k", "v")}
    with tiles((16, 16)):
        one, other = run(attention, inputs, dy, **options[0]), run(attention, moved, dy, **options[1])
    for name, result in other.items():
        torch.testing.assert_close(result, one[name][:, order] if name in GRADIENTS_OF_KEYS else one[name])


def test_the_order_of_queries():
    inputs, dy = make_inputs(1, (40, 33), 2, 8, torch.float64), normal(1, 40, 2, 8, dtype=torch.float64)
    order = torch.randperm(40).to(DEVICE)
    with tiles((16, 16)):
        one, other = run(attention, inputs, dy), run(attention, inputs | {"q": inputs["q"][:, order]}, dy[:, order])
    for name, result in other.items():
        torch.testing.assert_close(result, one[name] if name in GRADIENTS_OF_KEYS else one[name][:, order])


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_a_number_added_to_every_score_of_a_row_changes_nothing(causal):
    """Softmax does not depend on it."""
    inputs, dy = make_inputs(1, 33, 1, 8, torch.float64), normal(1, 33, 1, 8, dtype=torch.float64)
    one = run(attention, inputs, dy, causal=causal)
    other = run(attention, inputs, dy, causal=causal, mask=normal(1, 1, 33, 1, dtype=torch.float64))
    for name, result in other.items():
        torch.testing.assert_close(result, one[name])


def test_fewer_heads_and_rows_of_the_batch_are_the_same():
    inputs, dy = make_inputs(3, 21, 2, 8), normal(3, 21, 2, 8)
    together = run(attention, inputs, dy)
    alone = run(attention, {name: x[1:2, :, 1:] for name, x in inputs.items()}, dy[1:2, :, 1:])
    assert_same(alone, {name: x[1:2, :, 1:] for name, x in together.items()})


@pytest.mark.parametrize("where", [(0, 0, 0), (1, 17, 1)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "dy"])
def test_a_bad_number_stays_in_its_head(name, bad, where):
    """And in its row, if a query or its gradient is bad: other rows' outputs do not contain it."""
    inputs, dy = make_inputs(2, 21, 2, 8), normal(2, 21, 2, 8)
    clean = run(attention, inputs, dy)
    batch, position, head = where
    (inputs | {"dy": dy})[name][batch, position, head, 3] = bad
    spoiled = run(attention, inputs, dy)
    elsewhere = torch.ones(2, 2, dtype=torch.bool, device=DEVICE)
    elsewhere[batch, head] = False
    for result in clean:
        # [batch, heads, positions, head size], so that the index is (batch, head).
        one, other = (x[result].transpose(1, 2)[elsewhere] for x in (spoiled, clean))
        assert torch.equal(one, other), result
    if name in ("q", "dy"):
        others = torch.arange(21, device=DEVICE) != position
        for result in ("y", "dq"):
            one, other = (x[result][batch, others, head] for x in (spoiled, clean))
            assert torch.equal(one, other), result
    assert not spoiled["dk"][batch, :, head].isfinite().all()


@pytest.mark.parametrize("factor", [4, 0.25])
def test_gradients_are_linear_in_the_upstream_gradient(factor):
    inputs, dy = make_inputs(1, 33, 2, 8), normal(1, 33, 2, 8)
    one, other = run(attention, inputs, dy), run(attention, inputs, factor * dy)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(other[name], factor * one[name]), name


def test_a_scale_of_the_queries_is_a_scale_of_the_scores():
    """A power of two is exact in both."""
    inputs, dy = make_inputs(1, 33, 2, 16), normal(1, 33, 2, 16)
    one = run(attention, inputs, dy)
    other = run(attention, inputs | {"q": 4 * inputs["q"]}, dy, scale=0.25 * 16**-0.5)
    assert_same({name: 4 * x if name == "dq" else x for name, x in other.items()}, one)
