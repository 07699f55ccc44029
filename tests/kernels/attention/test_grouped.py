"""Fewer heads of keys and values than of queries: a group of adjacent query heads shares each of them."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.attention import attention
from fastbert.testing.attention import check, normal, tiles
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from ..cases import DTYPES, dtype_name
from ..layouts import guarded
from .test_compile import compiled, opcheck_both
from .test_gradcheck import DROPPED, gradcheck
from .test_layouts import every_second, head_size_first, heads_first
from .test_packed import MIXED, other_rows, packing

GROUPS = [(4, 2), (4, 1), (6, 3)]
HEAD_SIZES = [8, 16, 59]
BATCH, LENGTH = 2, 19
OPTIONS = ["none", "key", "general", "head by head", "added", "causal", "dropped", "everything"]


def grouped_inputs(heads, lengths=(LENGTH, LENGTH), head_size=8, dtype=torch.float32, batch=BATCH):
    """q, k and v; packed if batch is None, with `lengths` as their numbers of rows."""
    first = () if batch is None else (batch,)
    shapes = {name: (*first, lengths[name != "q"], heads[name != "q"], head_size) for name in "qkv"}
    return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}


def options_of(option, n_heads):
    key_mask = torch.arange(LENGTH, device=DEVICE) < torch.tensor([[LENGTH], [7]], device=DEVICE)
    full = torch.rand(BATCH, n_heads, LENGTH, LENGTH, device=DEVICE) > 0.3
    return {
        "none": {},
        "key": {"key_mask": key_mask},
        "general": {"mask": full[:, :1]},
        "head by head": {"mask": full},
        "added": {"mask": normal(BATCH, n_heads, 1, LENGTH)},
        "causal": {"causal": True},
        "dropped": {"p": 0.3},
        "everything": {"key_mask": key_mask, "mask": full, "causal": True, "p": 0.3},
    }[option]


def each_head(x, heads):
    """k or v with its heads repeated."""
    return x.repeat_interleave(heads[0] // heads[1], -2)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_against_the_reference(heads, option, head_size, dtype):
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        results = check(grouped_inputs(heads, head_size=head_size, dtype=dtype), **options_of(option, heads[0]))
    assert results["y"].shape == (BATCH, LENGTH, heads[0], head_size)
    assert results["dk"].shape == results["dv"].shape == (BATCH, LENGTH, heads[1], head_size)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_packed(heads, option, head_size):
    inputs = grouped_inputs(heads, (sum(MIXED), sum(MIXED)), head_size, batch=None)
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        check(inputs, causal=option == "causal", p=0.3 * (option == "dropped"), **packing(MIXED))


@pytest.mark.parametrize("option", ["plain", "dropped"])
def test_queries_of_other_rows(option):
    heads, lengths_q = (4, 2), (1, 0, 20, 17, 3)
    _, how = other_rows(lengths_q, MIXED)
    inputs = grouped_inputs(heads, (sum(lengths_q), sum(MIXED)), batch=None)
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        check(inputs, p=0.3 * (option == "dropped"), **how)


@pytest.mark.parametrize("lengths", [(1, 5), (5, 17), (17, 5), (33, 65), (65, 33)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_lengths_that_differ(causal, lengths):
    with tiles((16, 32)):
        check(grouped_inputs((6, 2), lengths), causal=causal)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_the_bits_of_heads_that_are_not_shared(heads, option):
    """Also those of dropout, which belong to the head of the queries."""
    inputs, options = grouped_inputs(heads), options_of(option, heads[0]) | {"seed": seed_tensor(7)}
    dy, shared = normal(BATCH, LENGTH, heads[0], 8), {name: each_head(inputs[name], heads) for name in "kv"}
    with tiles((16, 32)):
        results, others = run(attention, inputs, dy, **options), run(attention, inputs | shared, dy, **options)
    assert torch.equal(results["y"], others["y"]) and torch.equal(results["dq"], others["dq"])
    for name in ("dk", "dv"):
        summed = others[name].unflatten(2, (heads[1], -1)).sum(3)
        torch.testing.assert_close(results[name], summed)


def test_a_group_of_one_is_what_it_was():
    """The gradients of equal heads are views of one buffer; grouped ones are contiguous tensors of their own."""
    product = normal(BATCH, LENGTH, 3, 4, 8)
    results = run(attention, dict(zip("qkv", product.unbind(2), strict=True)), normal(BATCH, LENGTH, 4, 8))
    assert results["dk"].stride(1) == 3 * 4 * 8
    results = run(attention, grouped_inputs((4, 2)), normal(BATCH, LENGTH, 4, 8))
    assert results["dk"].is_contiguous() and results["dq"].is_contiguous()


@pytest.mark.parametrize("layout", [heads_first, head_size_first, every_second], ids=lambda f: f.__name__)
def test_layouts(layout):
    inputs, dy = grouped_inputs((4, 2), head_size=24), normal(BATCH, LENGTH, 4, 24)
    strided = {name: layout(x) for name, x in inputs.items()}
    with tiles((16, 16)):
        assert_same(check(strided, layout(dy), p=0.2), check(inputs, dy, p=0.2))


def test_views_of_one_product():
    """Queries, keys and values of one product, [..., (6 + 2 + 2) heads, D]."""
    parts = dict(zip("qkv", normal(BATCH, LENGTH, 10, 8).split([6, 2, 2], dim=2), strict=True))
    assert not any(x.is_contiguous() for x in parts.values())
    check(parts)


def test_gradient_of_a_sum():
    check(grouped_inputs((4, 1)), torch.ones((), device=DEVICE).expand(BATCH, LENGTH, 4, 8))


@pytest.mark.parametrize("option", ["none", "everything"])
def test_reads_stay_inside_the_inputs(option):
    inputs, dy = grouped_inputs((4, 2), head_size=24), normal(BATCH, LENGTH, 4, 24)
    options = options_of(option, 4) | {"seed": seed_tensor(7)}
    with tiles((16, 32)):
        plain = run(attention, inputs, dy, **options)
        assert_same(run(attention, {name: guarded(x) for name, x in inputs.items()}, guarded(dy), **options), plain)
    assert all(x.isfinite().all() for x in plain.values())


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED], ids=str)
def test_gradcheck(options):
    gradcheck(grouped_inputs((2, 1), (3, 3), 3, torch.float64, batch=1), **options)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_gradcheck_in_random_directions(heads):
    gradcheck(grouped_inputs(heads, (18, 18), 8, torch.float64, batch=1), mask=torch.rand(1, heads[0], 18, 18) > 0.2, **DROPPED)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_opcheck(kind):
    options = packing((4, 6)) if kind == "packed" else {"p": 0.3, "seed": seed_tensor(3)}
    lengths = (10, 10) if kind == "packed" else (5, 5)
    opcheck_both(grouped_inputs((4, 2), lengths, batch=None if kind == "packed" else BATCH), options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
def test_under_torch_compile(dynamic):
    torch._dynamo.reset()
    inputs, dy = grouped_inputs((4, 2)), normal(BATCH, LENGTH, 4, 8)
    options = {"p": 0.3, "seed": seed_tensor(3)}
    results = run(compiled(attention, dynamic=dynamic), inputs, dy, **options)
    assert_same(results, run(attention, inputs, dy, **options))
    torch._dynamo.reset()


@pytest.mark.no_launch
def test_the_reference_is_attention_of_repeated_heads():
    """Checks the specification itself, against its form for equal heads."""
    inputs, heads = grouped_inputs((6, 3), dtype=torch.float64), (6, 3)
    repeated = inputs | {name: each_head(inputs[name], heads) for name in "kv"}
    assert torch.equal(reference.attention(**inputs), reference.attention(**repeated))


@pytest.mark.no_launch
@pytest.mark.parametrize("heads", [3, 8, 0])
def test_heads_that_do_not_divide(heads):
    inputs = grouped_inputs((4, heads))
    with pytest.raises(ValueError, match=rf"^k: expected a number of heads that divides q's 4, got {heads}$"):
        attention(**inputs)


@pytest.mark.no_launch
def test_values_of_other_heads_than_the_keys():
    with pytest.raises(ValueError, match=r"^v: expected \(2, 19, 2, 8\), got \(2, 19, 4, 8\)$"):
        attention(**grouped_inputs((4, 2)) | {"v": normal(BATCH, LENGTH, 4, 8)})
