"""attention's numerical against its analytical gradients in float64, in which the kernels then compute throughout."""

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.testing.attention import make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, seed_tensor

from .test_layouts import every_second, head_size_first, heads_first, shared_heads

pytestmark = pytest.mark.one_in(2)

DOUBLE = torch.float64
DROPPED = {"p": 0.4, "seed": 11}


def gradcheck(inputs, layout=lambda x: x, **options):
    """Element by element if that takes about a hundred calls, else in random directions."""
    options = {name: seed_tensor(value) if name == "seed" else value for name, value in options.items()}
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    fast = sum(x.numel() for x in leaves) > 40
    with tiles((32, 16), kv=(16, 32), q=(32, 16)):
        assert torch.autograd.gradcheck(
            lambda q, k, v: attention(layout(q), layout(k), layout(v), **options),
            leaves,
            fast_mode=fast,
            check_undefined_grad=not fast,
            nondet_tol=0.0,
        )


def random_mask(*shape):
    """Each row sees at least one key: the output of a row that sees none is an average, which no score changes."""
    mask = torch.rand(shape, device=DEVICE) > 0.4
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED, {"scale": 1.3}], ids=str)
@pytest.mark.parametrize("lengths", [(2, 2), (1, 4), (3, 2)], ids=str)
def test_element_by_element(lengths, options):
    if options.get("causal") and lengths[0] > lengths[1]:
        lengths = lengths[::-1]  # the first queries would see no key
    gradcheck(make_inputs(1, lengths, 1, 3, DOUBLE), **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED, DROPPED | {"causal": True}], ids=str)
@pytest.mark.parametrize("length", [1, 5, 17])
def test_lengths(length, options):
    gradcheck(make_inputs(1, length, 1, 8, DOUBLE), **options)


@pytest.mark.parametrize("options", [{}, DROPPED], ids=["plain", "dropped"])
@pytest.mark.parametrize("head_size", [1, 7, 16, 24, 59, 64, 130, 256])
def test_head_sizes(head_size, options):
    gradcheck(make_inputs(1, 5, 1, head_size, DOUBLE), **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED], ids=str)
@pytest.mark.parametrize("lengths", [(1, 20), (5, 18), (16, 33)], ids=str)
def test_cross_lengths(lengths, options):
    gradcheck(make_inputs(1, lengths, 1, 8, DOUBLE), **options)


@pytest.mark.parametrize("lengths", [(20, 1), (18, 5)], ids=str)
def test_more_queries_than_keys(lengths):
    gradcheck(make_inputs(2, lengths, 1, 8, DOUBLE))


@pytest.mark.parametrize("scale", [0.0, 0.05, -0.7])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_scales(causal, scale):
    gradcheck(make_inputs(1, 18, 1, 8, DOUBLE), scale=scale, causal=causal)


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED], ids=str)
@pytest.mark.parametrize("kind", ["right", "holes", "left"])
def test_key_masks(kind, options):
    place = torch.arange(35, device=DEVICE).expand(1, 35)
    key_mask = {"right": place < 14, "holes": place % 3 != 1, "left": (place > 20) | (place == 0)}[kind]
    gradcheck(make_inputs(1, 35, 1, 8, DOUBLE), key_mask=key_mask, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED], ids=str)
@pytest.mark.parametrize("form", [(1, 2, 18, 18), (1, 1, 18, 18), (1, 1, 1, 18)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
def test_general_masks(added, form, options):
    mask = random_mask(*form)
    if added:
        mask = torch.where(mask, normal(*form, dtype=DOUBLE), torch.finfo(DOUBLE).min)
    gradcheck(make_inputs(1, 18, 2, 8, DOUBLE), mask=mask, **options)


def test_every_mask_at_once():
    key_mask = random_mask(1, 18)
    gradcheck(make_inputs(1, 18, 1, 8, DOUBLE), key_mask=key_mask, mask=random_mask(1, 1, 18, 18), causal=True, **DROPPED)


@pytest.mark.parametrize("options", [{}, {"causal": True}, DROPPED], ids=str)
@pytest.mark.parametrize("lengths", [(5, 18), (1, 0, 33), (7,)], ids=str)
def test_packed(lengths, options):
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    inputs = {name: normal(sum(lengths), 1, 8, dtype=DOUBLE) for name in ("q", "k", "v")}
    gradcheck(inputs, cu_seqlens=bounds, max_seqlen=max(lengths), **options)


@pytest.mark.parametrize("layout", [heads_first, head_size_first, shared_heads], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, DROPPED | {"causal": True}], ids=["plain", "dropped causal"])
def test_layouts(layout, options):
    """Also through the view: gradients of heads that share keys add up."""
    gradcheck(make_inputs(1, 18, 2, 8, DOUBLE), layout, **options)


@pytest.mark.parametrize("options", [{}, DROPPED], ids=["plain", "dropped"])
def test_every_stride(options):
    gradcheck({name: every_second(x) for name, x in make_inputs(2, 7, 2, 8, DOUBLE).items()}, **options)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("linear", [False, True], ids=["", "linear"])
def test_a_second_derivative_raises(name, linear):
    """The backward kernels have no derivative; an error is better than zeros, also where dy is a constant."""
    inputs = make_inputs(1, 5, 1, 8, DOUBLE)
    x = inputs[name].requires_grad_()
    y = attention(**inputs)
    (gradient,) = torch.autograd.grad((y if linear else y.sin()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
