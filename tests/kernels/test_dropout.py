"""Dropout in dropout_add_layernorm: seeds, and a mask that depends only on row and column, in both directions."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastbert.kernels import dropout_add_layernorm as module
from fastbert.kernels.core.configs import TABLES, Config
from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
from fastbert.testing.rows import DEVICE, DROPOUT_ADD_LAYERNORM, drawn_mask, make_inputs, run, seed_tensor

from .layouts import sliced, transposed

OP = DROPOUT_ADD_LAYERNORM


def output(inputs, **options):
    return run(dropout_add_layernorm, inputs, None, **options)["y"]


def test_manual_seed_repeats():
    inputs, dy = make_inputs(OP, (17, 48)), torch.randn(17, 48, device=DEVICE)
    torch.manual_seed(3)
    first = [run(dropout_add_layernorm, inputs, dy, p=0.5) for _ in range(3)]
    torch.manual_seed(3)
    second = [run(dropout_add_layernorm, inputs, dy, p=0.5) for _ in range(3)]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(first[0]["y"], first[1]["y"]) and not torch.equal(first[1]["y"], first[2]["y"])


def test_different_seeds_differ():
    inputs = make_inputs(OP, (17, 48))
    outputs = [output(inputs, p=0.5, seed=seed_tensor(seed)) for seed in (0, 1, 2**32, 2**62 - 1)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert not torch.equal(one, other)


def test_only_a_drawn_seed_moves_the_generator():
    def state():
        return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()

    inputs = make_inputs(OP, (5, 48))
    before = state()
    output(inputs)
    output(inputs, p=0.5, seed=seed_tensor(1))
    assert torch.equal(state(), before)
    output(inputs, p=0.5)
    assert not torch.equal(state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_p_zero_is_no_dropout(dtype):
    inputs, dy = make_inputs(OP, (17, 48), dtype), torch.randn(17, 48).to(DEVICE, dtype)
    plain = run(dropout_add_layernorm, inputs, dy)
    for options in ({"p": 0.0}, {"p": 0.0, "seed": seed_tensor(1)}):
        results = run(dropout_add_layernorm, inputs, dy, **options)
        assert all(torch.equal(results[name], plain[name]) for name in plain)


def test_p_one_drops_everything():
    """LayerNorm of the residual; the gradients of x and x_bias are exactly zero, and not even infinity comes through."""
    inputs, dy = make_inputs(OP, (17, 48)), torch.randn(17, 48, device=DEVICE)
    results = run(dropout_add_layernorm, inputs, dy, p=1.0)
    nothing = inputs | {"x": torch.zeros_like(inputs["x"]), "x_bias": None}
    without = run(dropout_add_layernorm, nothing, dy)
    for name in ("y", "dresidual", "dweight", "dbias"):
        assert torch.equal(results[name], without[name]), name
    assert not results["dx"].any() and not results["dx_bias"].any()
    infinite = inputs | {"x": torch.full_like(inputs["x"], torch.inf)}
    assert torch.equal(run(dropout_add_layernorm, infinite, None, p=1.0)["y"], results["y"])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(17, 48), (65, 37), (3, 1024)], ids=str)
def test_forward_and_backward_draw_the_same_mask(shape, p):
    """dx is dresidual / (1 - p) where the forward kept, and 0 where it dropped."""
    seed, inputs = seed_tensor(9), make_inputs(OP, shape)
    results = run(dropout_add_layernorm, inputs, torch.randn(shape, device=DEVICE), p=p, seed=seed)
    keep = drawn_mask(shape, p, seed)
    assert results["dresidual"].all() and 0 < keep.sum() < keep.numel()
    assert torch.equal(results["dx"] != 0, keep)
    torch.testing.assert_close(results["dx"][keep] * (1 - p), results["dresidual"][keep])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_what_is_kept_is_scaled(p):
    ones, vector = torch.ones(5, 48, device=DEVICE), torch.ones(48, device=DEVICE)
    _, z, _, _ = torch.ops.fastbert.dropout_add_layernorm(
        ones, ones * 0, vector, vector, None, seed_tensor(1), 1e-12, p, torch.float32, True
    )
    assert set(z.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}


@pytest.mark.parametrize("rows, cols", [(1, 48), (9, 200), (40, 96), (64, 1024)])
def test_the_mask_depends_on_row_and_column_alone(rows, cols):
    """Not on how many rows and columns there are."""
    one, other = drawn_mask((9, 48), 0.5, seed_tensor(2)), drawn_mask((rows, cols), 0.5, seed_tensor(2))
    rows, cols = min(rows, 9), min(cols, 48)
    assert torch.equal(one[:rows, :cols], other[:rows, :cols])


def test_the_mask_is_that_of_the_flattened_rows():
    flat = drawn_mask((24, 48), 0.5, seed_tensor(2))
    assert torch.equal(drawn_mask((2, 3, 4, 48), 0.5, seed_tensor(2)).view(24, 48), flat)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [transposed, sliced], ids=lambda f: f.__name__)
def test_the_mask_does_not_depend_on_dtype_or_layout(dtype, layout):
    inputs = {name: t.to(dtype) for name, t in make_inputs(OP, (9, 48)).items()}
    dy, seed = torch.randn(9, 48, dtype=torch.float64).to(DEVICE, dtype), seed_tensor(2)
    inputs["x"] = layout(inputs["x"])
    keep = drawn_mask((9, 48), 0.5, seed)
    assert torch.equal(run(dropout_add_layernorm, inputs, dy, p=0.5, seed=seed)["dx"] != 0, keep)


@pytest.mark.parametrize("forward, backward", [(1, 1), (16, 2), (2, 8), (4, 4)])
def test_the_mask_does_not_depend_on_tiles(forward, backward, monkeypatch):
    """Separately tuned forward and backward still agree."""
    inputs, dy, seed = make_inputs(OP, (19, 48)), torch.randn(19, 48, device=DEVICE), seed_tensor(2)
    keep = drawn_mask((19, 48), 0.5, seed)
    tiles = {"layernorm_forward": Config(forward, 4), "layernorm_backward": Config(backward, 4, None, 2)}
    monkeypatch.setattr(module, "choose", lambda kernel, like, width: tiles[kernel])
    assert tiles.keys() <= TABLES.keys()
    assert torch.equal(drawn_mask((19, 48), 0.5, seed), keep)
    assert torch.equal(run(dropout_add_layernorm, inputs, dy, p=0.5, seed=seed)["dx"] != 0, keep)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays_the_mask(reentrant):
    inputs = make_inputs(OP, (9, 48))
    x, rest = inputs.pop("x").requires_grad_(), inputs

    def function(x):
        return dropout_add_layernorm(x, **rest, p=0.5).sin()

    torch.manual_seed(4)
    (plain,) = torch.autograd.grad(function(x).sum(), x)
    torch.manual_seed(4)
    checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, plain)


def test_two_calls_before_either_backward_keep_their_own_masks():
    inputs, dy = make_inputs(OP, (9, 48)), torch.randn(9, 48, device=DEVICE)
    x = inputs["x"].requires_grad_()
    outputs = [dropout_add_layernorm(**inputs, p=0.5, seed=seed_tensor(seed)) for seed in (1, 2)]
    for y, seed in zip(reversed(outputs), (2, 1), strict=True):
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx != 0, drawn_mask((9, 48), 0.5, seed_tensor(seed)))
