"""Dropout on attention's probabilities: a mask that depends only on (seed, head, query, key), in both directions."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastbert.kernels.attention import attention
from fastbert.testing.attention import drawn_keep, make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, run, seed_tensor

from .test_layouts import every_second, head_size_first, heads_first

BATCH, HEADS, LENGTH = 2, 2, 40
SHAPE = (BATCH, LENGTH, HEADS, 16)


def sensitive(seqlen_q, seqlen_k, batch=BATCH, heads=HEADS, dtype=torch.float32):
    """{gradient: (inputs, dy)}: calls whose dq, dk and dv each reveal the mask; all scores are 0.

    With one-hot dy, dv is the dropped weights themselves. With values that dy turns into 1, the gradient of a score is
    keep / (1 - p) minus a mean of those, so it is positive exactly where kept. One-hot keys turn it into dq, one-hot queries
    into dk.
    """

    def zeros(length, size):
        return torch.zeros(batch, length, heads, size, dtype=dtype, device=DEVICE)

    def one_hot(length):
        return torch.eye(length, dtype=dtype, device=DEVICE)[None, :, None].expand(batch, -1, heads, -1)

    def first(length, size):
        return zeros(length, size).index_fill(-1, torch.tensor([0], device=DEVICE), 1)

    n, m = seqlen_q, seqlen_k
    return {
        "dq": ({"q": zeros(n, m), "k": one_hot(m), "v": first(m, m)}, first(n, m)),
        "dk": ({"q": one_hot(n), "k": zeros(m, n), "v": first(m, n)}, first(n, n)),
        "dv": ({"q": zeros(n, n), "k": zeros(m, n), "v": zeros(m, n)}, one_hot(n)),
    }


def kept_by_gradients(seqlen_q, seqlen_k, p, seed, **shape):
    """{gradient: bool [batch, heads, queries, keys]}: the masks that the two backward kernels draw."""
    masks = {}
    for name, (inputs, dy) in sensitive(seqlen_q, seqlen_k, **shape).items():
        gradient = run(attention, inputs, dy, p=p, seed=seed)[name].transpose(1, 2)
        masks[name] = (gradient if name == "dq" else gradient.transpose(-1, -2)) > 0
    return masks


TILES = [((16, 16), (16, 32), (32, 16)), ((64, 16), (16, 64), (32, 32)), ((32, 64), (64, 32), (16, 64))]


@pytest.mark.parametrize("forward, kv, q", TILES, ids=str)
@pytest.mark.parametrize("lengths", [(40, 40), (23, 41), (41, 23)], ids=str)
def test_forward_and_both_backward_kernels_draw_the_same_mask(lengths, forward, kv, q):
    """Each with other tiles: separately tuned kernels still agree."""
    seed, p = seed_tensor(9), 0.3
    keep = drawn_keep(1, HEADS, *lengths, p, seed)
    assert not keep.all(-1).any()  # such a row's gradients would show nothing
    with tiles(forward, kv=kv, q=q):
        for name, mask in kept_by_gradients(*lengths, p, seed, batch=1).items():
            assert torch.equal(mask, keep), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_mask_does_not_depend_on_the_dtype(dtype):
    keep = drawn_keep(BATCH, HEADS, 24, 40, 0.4, seed_tensor(2))
    for name, mask in kept_by_gradients(24, 40, 0.4, seed_tensor(2), dtype=dtype).items():
        assert torch.equal(mask, keep), name


@pytest.mark.parametrize("layout", [heads_first, head_size_first, every_second], ids=lambda f: f.__name__)
def test_the_mask_does_not_depend_on_the_layout(layout):
    keep = drawn_keep(BATCH, HEADS, 24, 40, 0.4, seed_tensor(2))
    inputs, dy = sensitive(24, 40)["dv"]
    inputs = {name: layout(x) for name, x in inputs.items()}
    dv = run(attention, inputs, layout(dy), p=0.4, seed=seed_tensor(2))["dv"]
    assert torch.equal(dv.permute(0, 2, 3, 1) > 0, keep)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 90), (90, 7), (64, 128)], ids=str)
def test_the_mask_depends_on_query_and_key_alone(lengths):
    """Not on how many queries and keys there are."""
    one = drawn_keep(1, 2, 40, 40, 0.5, seed_tensor(2))
    other = drawn_keep(1, 2, *lengths, 0.5, seed_tensor(2))
    queries, keys = min(lengths[0], 40), min(lengths[1], 40)
    assert torch.equal(one[..., :queries, :keys], other[..., :queries, :keys])


def test_heads_are_numbered_through_the_batch():
    """Each head has a mask of its own."""
    flat = drawn_keep(1, 6, 16, 32, 0.5, seed_tensor(2))
    for batch, heads in ((6, 1), (3, 2), (2, 3)):
        assert torch.equal(drawn_keep(batch, heads, 16, 32, 0.5, seed_tensor(2)).reshape_as(flat), flat)
    assert len({tuple(head.flatten().tolist()) for head in flat[0]}) == 6


@pytest.mark.parametrize("options", [{"causal": True}, {"key_mask": "right"}, {"mask": "right"}], ids=str)
def test_masks_do_not_shift_the_dropout(options):
    """Where keys are skipped, the remaining ones keep their draws."""
    seen = (torch.arange(64, device=DEVICE) < 37).expand(1, 64)
    options = {name: value if value is True else seen for name, value in options.items()}
    if "mask" in options:
        options["mask"] = seen[:, None, None]
    inputs, dy = sensitive(64, 64, batch=1)["dv"]
    with tiles((16, 16), kv=(32, 16)):
        dv = run(attention, inputs, dy, p=0.5, seed=seed_tensor(4), **options)["dv"]
    places = torch.arange(64, device=DEVICE)
    visible = places <= places[:, None] if "causal" in options else seen.expand(64, 64)
    assert torch.equal(dv.permute(0, 2, 3, 1) > 0, drawn_keep(1, HEADS, 64, 64, 0.5, seed_tensor(4)) & visible)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_what_is_kept_is_scaled(p):
    """A weight of 1/n becomes 1 / (n (1 - p)), in the output and in the gradient of the values."""
    (inputs, dy), n = sensitive(16, 32, batch=1)["dv"], 32
    inputs["v"] = torch.eye(32, device=DEVICE)[None, :, None, :16].expand(1, -1, HEADS, -1)
    results = run(attention, inputs, dy, p=p, seed=seed_tensor(1))
    for name in ("y", "dv"):
        values = results[name].unique()
        assert len(values) == 2 and values[0] == 0
        torch.testing.assert_close(values[1].cpu(), torch.tensor(1 / (n * (1 - p))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_p_zero_is_no_dropout(dtype):
    inputs, dy = make_inputs(2, 40, 2, 16, dtype), normal(*SHAPE, dtype=dtype)
    plain, before = run(attention, inputs, dy), generator_state()
    for options in ({"p": 0.0}, {"p": 0.0, "seed": seed_tensor(1)}):
        results = run(attention, inputs, dy, **options)
        assert all(torch.equal(results[name], plain[name]) for name in plain)
    assert torch.equal(generator_state(), before)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_p_one_drops_everything(options):
    """Results and gradients are exactly zero: 1 / (1 - p) is never computed."""
    inputs, dy = make_inputs(2, 40, 2, 16), normal(*SHAPE)
    results = run(attention, inputs, dy, p=1.0, **options)
    assert all(torch.equal(result, torch.zeros_like(result)) for result in results.values())


@pytest.mark.parametrize("p, kept", [(1e-10, 1.0), (1 - 1e-12, 0.0)])
def test_the_ends(p, kept):
    """p is rounded to 2**-32, but only 1 becomes 1: one threshold more would drop nothing or everything."""
    keep = drawn_keep(1, 2, 64, 64, p, seed_tensor(3))
    assert float(keep.double().mean()) == kept


def test_a_larger_p_drops_what_a_smaller_one_drops():
    masks = [drawn_keep(1, 2, 40, 64, p, seed_tensor(6)) for p in (0.1, 0.3, 0.7)]
    assert torch.equal(masks[0] & masks[1], masks[1]) and torch.equal(masks[1] & masks[2], masks[2])


def generator_state():
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


def test_only_a_drawn_seed_moves_the_generator():
    inputs, dy = make_inputs(1, 5, 1, 16), normal(1, 5, 1, 16)
    before = generator_state()
    run(attention, inputs, dy)
    run(attention, inputs, dy, p=0.5, seed=seed_tensor(1))
    assert torch.equal(generator_state(), before)
    run(attention, inputs, None, p=0.5)
    drawn = generator_state()
    assert not torch.equal(drawn, before)
    y = attention(**{name: x.requires_grad_() for name, x in inputs.items()}, p=0.5)
    moved = generator_state()
    y.backward(dy)
    assert not torch.equal(moved, drawn) and torch.equal(generator_state(), moved)


def test_manual_seed_repeats():
    inputs, dy = make_inputs(1, 17, 2, 16), normal(1, 17, 2, 16)
    torch.manual_seed(3)
    first = [run(attention, inputs, dy, p=0.5) for _ in range(3)]
    torch.manual_seed(3)
    second = [run(attention, inputs, dy, p=0.5) for _ in range(3)]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(first[0]["y"], first[1]["y"]) and not torch.equal(first[1]["y"], first[2]["y"])


def test_different_seeds_differ():
    masks = [drawn_keep(1, 1, 16, 64, 0.5, seed_tensor(seed)) for seed in (0, 1, 2**31, 2**32, 2**33, 2**62 - 1)]
    for i, one in enumerate(masks):
        assert not any(torch.equal(one, other) for other in masks[:i])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays_the_mask(reentrant):
    inputs = make_inputs(1, 17, 2, 16)
    q = inputs.pop("q").requires_grad_()

    def function(q):
        return attention(q, **inputs, p=0.5).sin()

    torch.manual_seed(4)
    (plain,) = torch.autograd.grad(function(q).sum(), q)
    torch.manual_seed(4)
    checkpoint(function, q, use_reentrant=reentrant).sum().backward()
    assert torch.equal(q.grad, plain) and plain.any()


def test_two_calls_before_either_backward_keep_their_own_masks():
    inputs, dy = sensitive(16, 32, batch=1)["dv"]
    v = inputs["v"].requires_grad_()
    outputs = [attention(**inputs, p=0.5, seed=seed_tensor(seed)) for seed in (1, 2)]
    for y, seed in zip(reversed(outputs), (2, 1), strict=True):
        (dv,) = torch.autograd.grad(y, v, dy)
        assert torch.equal(dv.permute(0, 2, 3, 1) > 0, drawn_keep(1, HEADS, 16, 32, 0.5, seed_tensor(seed)))
