"""Steps two optimizers on the same gradients and compares parameters and all state."""

import copy

import torch
from torch import nn

import fastbert
from fastbert.testing.rows import DEVICE

SHAPES = [(33, 5), (18,), ()]
TOLERANCE = 1e-6  # relative, for float32 over 100 steps


def make_params(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(DEVICE, dtype)) for shape in shapes]


def pair(params=None, theirs=None, **arguments):
    """fastbert's optimizer and torch's, on separate copies of the parameters. `theirs`: arguments for torch only."""
    params = make_params() if params is None else params
    others = copy.deepcopy(params)
    return fastbert.AdamW(params, **arguments), torch.optim.AdamW(others, **(arguments | (theirs or {})))


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_gradients(*optimizers, step=0, missing=(), scale=1.0):
    """Set the same random gradients in each; None for parameters whose index is in `missing`."""
    for optimizer in optimizers:
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(params_of(optimizer)):
            grad = scale * torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = None if index in missing else grad.to(param.device, param.dtype)


def run(ours, theirs, steps=100, each=lambda step: None, missing=lambda step: (), first=0):
    for step in range(first, first + steps):
        give_gradients(ours, theirs, step=step, missing=missing(step))
        ours.step()
        theirs.step()
        each(step)


def run_beside_exact(ours, params, theirs, exact, steps):
    """Step `ours` on 16-bit `params`, and `theirs` on the float32 parameters `exact` with the same gradients."""
    for step in range(steps):
        give_gradients(ours, step=step)
        for param, other in zip(params, exact, strict=True):
            other.grad = param.grad.float()
        ours.step()
        theirs.step()


def assert_same(ours, theirs, tolerance=TOLERANCE):
    """Check parameters and every state tensor."""
    for index, (param, other) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        torch.testing.assert_close(param, other, rtol=tolerance, atol=tolerance, msg=lambda t, i=index: f"{i}: {t}")
        state, expected = ours.state[param], theirs.state[other]
        assert state.keys() == expected.keys(), (state.keys(), expected.keys())
        for name in state:
            torch.testing.assert_close(
                state[name].cpu(),
                expected[name].cpu(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name, i=index: f"{name} of {i}: {text}",
            )


def assert_bitwise(ours, theirs):
    for param, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(param, other)
        state, expected = ours.state[param], theirs.state[other]
        assert state.keys() == expected.keys()
        for name in state:
            assert torch.equal(state[name].cpu(), expected[name].cpu()), name
