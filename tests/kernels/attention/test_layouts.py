"""Any strides of q, k, v and of the upstream gradient, with NaN between and around their elements."""

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.testing.attention import check, make_inputs, normal
from fastbert.testing.rows import DEVICE, assert_same, run

from .. import layouts

BATCH, LENGTH, HEADS, HEAD_SIZE = 2, 19, 2, 24
SHAPE = (BATCH, LENGTH, HEADS, HEAD_SIZE)


def of_rows(layout):
    """A layout of [rows, columns] applied to [batch, length, heads, head size]."""

    def laid_out(x):
        return layout(x.reshape(x.shape[0] * x.shape[1], -1)).view(x.shape)

    laid_out.__name__ = layout.__name__
    return laid_out


def heads_first(x):
    """A view of [batch, heads, length, head size], as a cache holds keys."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def head_size_first(x):
    """A view in which the elements of a head are far apart."""
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def every_second(x):
    """Every second sequence, position, head and element of a larger tensor."""
    larger = x.new_full([2 * n for n in x.shape], torch.nan)
    return larger[::2, ::2, ::2, ::2].copy_(x)


def shared_heads(x):
    """One head seen by all, as in multi-query attention. (If all keys were one key, no score would have a gradient.)"""
    return x[:, :, :1].clone().expand_as(x)


def shared_batch(x):
    return x[:1].clone().expand_as(x)


CONTIGUOUS, TRANSPOSED, SLICED, EXPANDED, OFFSET = map(of_rows, layouts.LAYOUTS)
FIVE = (CONTIGUOUS, TRANSPOSED, SLICED, EXPANDED, OFFSET)
OF_KEYS = {EXPANDED: shared_heads}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dy_layout", FIVE, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("layout", FIVE, ids=lambda f: "q_" + f.__name__)
def test_every_pair_of_layouts(layout, dy_layout):
    """q in one layout, k and v in the next two: the bits of contiguous copies, within the bound of eager."""
    inputs = make_inputs(BATCH, LENGTH, HEADS, HEAD_SIZE)
    start = FIVE.index(layout)
    for i, name in enumerate(inputs):
        chosen = FIVE[(start + i) % 5]
        inputs[name] = (chosen if name == "q" else OF_KEYS.get(chosen, chosen))(inputs[name])
    dy = dy_layout(normal(*SHAPE))
    assert inputs["q"].is_contiguous() == (layout in (CONTIGUOUS, OFFSET))  # the case is what it claims

    results = check(inputs, dy)
    assert_same(results, run(attention, {name: x.contiguous().clone() for name, x in inputs.items()}, dy.contiguous()))


@pytest.mark.parametrize(
    "layout", [heads_first, head_size_first, every_second, shared_heads, shared_batch], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_four_strides(layout, option, dtype):
    """Of all four tensors, in ways that strides of [rows, columns] cannot express."""
    inputs = {name: layout(x) for name, x in make_inputs(BATCH, LENGTH, HEADS, HEAD_SIZE, dtype).items()}
    dy = layout(normal(*SHAPE, dtype=dtype))
    check(inputs, dy, causal=option == "causal", p=0.2 * (option == "dropped"))


@pytest.mark.parametrize("layout", [CONTIGUOUS, heads_first, every_second], ids=lambda f: f.__name__)
def test_cross_lengths(layout):
    inputs = make_inputs(BATCH, (LENGTH, 37), HEADS, HEAD_SIZE)
    check({name: layout(x) for name, x in inputs.items()}, layout(normal(*SHAPE)), causal=True)


@pytest.mark.parametrize("dy_layout", FIVE, ids=lambda f: "dy_" + f.__name__)
def test_views_of_one_product(dy_layout):
    """q, k and v as the projection returns them: [batch, length, 3, heads, head size], unbound."""
    product = normal(BATCH, LENGTH, 3, HEADS, HEAD_SIZE)
    inputs = dict(zip("qkv", product.unbind(2), strict=True))
    dy = dy_layout(normal(*SHAPE))
    results = check(inputs, dy)
    assert_same(results, run(attention, {name: x.contiguous() for name, x in inputs.items()}, dy))

    product.requires_grad_()
    attention(*product.unbind(2)).backward(dy)
    assert torch.equal(product.grad, torch.stack([results[name] for name in ("dq", "dk", "dv")], dim=2))


def test_gradients_of_one_product_are_one_buffer():
    """The three gradients are laid out like q, k and v of one product, so that concatenating them copies nothing."""
    dy = normal(*SHAPE)
    results = run(attention, make_inputs(BATCH, LENGTH, HEADS, HEAD_SIZE), dy)
    dq, dk, dv = (results[name] for name in ("dq", "dk", "dv"))
    width = HEADS * HEAD_SIZE
    for i, gradient in enumerate((dq, dk, dv)):
        assert gradient.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr()
        assert gradient.storage_offset() == i * width
        assert gradient.stride() == (3 * width * LENGTH, 3 * width, HEAD_SIZE, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradient_of_a_sum(dtype):
    """`out.sum().backward()`: the upstream gradient is one element, with every stride 0."""
    dy = torch.full((), 0.5, dtype=dtype, device=DEVICE).expand(SHAPE)
    check(make_inputs(BATCH, LENGTH, HEADS, HEAD_SIZE, dtype), dy)


@pytest.mark.parametrize("shape", [(1, 5, 1, 8), (3, 2, 1, 8), (1, 2, 3, 8), (2, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("layout", [TRANSPOSED, SLICED, heads_first, head_size_first], ids=lambda f: f.__name__)
def test_dimensions_of_one(shape, layout):
    """Strides of a dimension of size 1 are arbitrary, and torch returns odd ones."""
    inputs = {name: layout(x) for name, x in make_inputs(shape[0], *shape[1:]).items()}
    check(inputs, layout(normal(*shape)))


@pytest.mark.parametrize("layout", [CONTIGUOUS, heads_first, every_second, head_size_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["q", "k", "v", "dy"])
def test_cut_from_a_longer_sequence(name, layout):
    """A cache holds more positions than are in use: those behind them are NaN here."""
    inputs, dy = make_inputs(BATCH, LENGTH, HEADS, HEAD_SIZE), normal(*SHAPE)
    plain = run(attention, inputs, dy)
    tensors = inputs | {"dy": dy}
    longer = torch.cat([tensors[name], torch.full_like(tensors[name], torch.nan)], dim=1)
    tensors[name] = layout(longer)[:, :LENGTH]
    assert_same(run(attention, {n: tensors[n] for n in "qkv"}, tensors["dy"]), plain)
