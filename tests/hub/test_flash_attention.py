"""FlashAttention's functions by the arguments of flash-attn 2: windows, causality, and packed queries of other lengths."""

import pytest
import torch

from fastbert.hub.flash_attention import flash_attn_func, flash_attn_varlen_func
from fastbert.testing.models import assert_equal
from fastbert.testing.rows import DEVICE

pytestmark = pytest.mark.one_in(2)

HEADS, KV_HEADS, HEAD_SIZE = 2, 1, 16
WINDOWS = [(-1, -1), (2, 1), (0, -1), (-1, 0), (64, 64), (5, -1), (7, -1)]  # the last two exclude the first key only


def tensors(*rows):
    torch.manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(*shape, n, HEAD_SIZE, device=DEVICE, requires_grad=True) for shape, n in zip(rows, heads, strict=True)]


def plain(q, k, v, causal, window, scale=None):
    """Attention of one batch [B, S, heads, D] by its definition."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (HEAD_SIZE**-0.5 if scale is None else scale)
    distance = torch.arange(n_keys) - torch.arange(n_queries)[:, None] - (n_keys - n_queries)
    seen = distance <= 0 if causal else torch.ones(n_queries, n_keys, dtype=torch.bool)
    before, behind = window
    if before >= 0:
        seen = seen & (distance >= -before)
    if behind >= 0:
        seen = seen & (distance <= behind)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1), v)


def results(compute, given, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    out = compute(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights.to(out)).sum().backward()
    return {"out": out.detach()} | {f"gradient of {n}": x.grad for n, x in zip("qkv", leaves, strict=True)}


def check(compute, stock, given):
    exact = results(stock, given, torch.float64)
    assert_equal(results(compute, given, torch.float32), results(stock, given, torch.float32), exact)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_sequences_of_one_length(window, causal):
    check(
        lambda q, k, v: flash_attn_func(q, k, v, causal=causal, window_size=window, softmax_scale=0.3),
        lambda q, k, v: plain(q, k, v, causal, window, 0.3),
        tensors((2, 5), (2, 7), (2, 7)),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_packed_sequences(window, causal):
    of_queries, of_keys = (3, 1, 5), (3, 4, 9)
    bounds = [torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (of_queries, of_keys)]

    def alone(q, k, v):
        parts = zip(q.split(of_queries), k.split(of_keys), v.split(of_keys), strict=True)
        return torch.cat([plain(*(x[None] for x in part), causal, window)[0] for part in parts])

    check(
        lambda q, k, v: flash_attn_varlen_func(q, k, v, *bounds, 5, 9, causal=causal, window_size=window),
        alone,
        tensors((9,), (16,), (16,)),
    )


def test_rows_outside_all_sequences_of_a_window_are_zero_and_take_no_gradient():
    q, k, v = tensors((6,), (6,), (6,))
    bounds = torch.tensor([0, 0, 4], dtype=torch.int32, device=DEVICE)
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, 4, 4, window_size=(1, 1))
    out.sum().backward()
    assert not out[4:].any() and out[:4].all()
    assert not any(x.grad[4:].any() for x in (q, k, v)) and v.grad[:4].all()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"softcap": 30.0}, "softcap: the kernel does not compute it; expected none, got 30.0"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes: the kernel does not compute it; expected none, got a Tensor"),
        ({"return_attn_probs": True}, "return_attn_probs: the kernel does not compute it; expected none, got True"),
    ],
)
def test_what_the_kernel_does_not_compute(argument, said):
    q, k, v = tensors((1, 3), (1, 3), (1, 3))
    with pytest.raises(ValueError, match=said):
        flash_attn_func(q, k, v, **argument)
