"""Numerical against analytical gradients of a whole layer in float64, in which its kernels then compute throughout."""

import pytest
import torch

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.kernels.encoder_layer import Settings, encoder_layer
from fastbert.testing.encoder_layer import flat, make_inputs, seeds
from fastbert.testing.rows import DEVICE

DROPPED = Settings(2, attention_p=0.2, attention_output_p=0.3, output_p=0.4)
# Rows without a key are compared with eager elsewhere: there, scores that a mask swallows have gradients.
MASK = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool, device=DEVICE)


def bounds(*starts):
    return torch.tensor(starts, dtype=torch.int32, device=DEVICE)


PACKED = {"cu_seqlens": bounds(0, 2, 2, 5), "max_seqlen": 3}
ANYWHERE = {"index": bounds(3, 0), "inverse": bounds(1, -1, -1, 0, -1)}
CALLS = {
    "plain": ((2, 3, 6), None, Settings(2), {}),
    "dropped": ((2, 3, 6), None, DROPPED, {}),
    "masked": ((2, 3, 6), None, DROPPED, {"key_mask": MASK}),
    "causal": ((1, 4, 6), None, Settings(2, causal=True, scale=1.3), {}),
    "packed": ((5, 6), None, DROPPED, PACKED),
    "read": ((5, 6), 2, DROPPED, PACKED | {"cu_seqlens_q": bounds(0, 0, 0, 2), "max_seqlen_q": 2}),
    "read anywhere": ((5, 6), None, DROPPED._replace(causal=True), PACKED | ANYWHERE),
    "everything dropped": ((2, 3, 6), None, Settings(2, attention_p=1.0, output_p=0.5), {}),
    **{activation: ((2, 2, 6), None, Settings(1, activation, 0.1, 0.2), {}) for activation in ACTIVATIONS},
}


@pytest.mark.parametrize("call", CALLS)
def test_gradients(call):
    """In random directions of all inputs at once."""
    shape, queries, settings, options = CALLS[call]
    inputs = {name: x for name, x in make_inputs(shape, 5, torch.float64, queries=queries).items() if x is not None}
    rest = {} if queries else {"queries": None}
    options = options | rest | {"settings": settings, "seed": seeds()}
    torch.autograd.gradcheck(
        lambda *tensors: flat(encoder_layer)(**dict(zip(inputs, tensors, strict=True)), **options),
        tuple(x.requires_grad_() for x in inputs.values()),
        fast_mode=True,
        nondet_tol=0.0,
    )


def test_gradients_one_by_one():
    inputs = make_inputs((1, 2, 4), 3, torch.float64)
    varied = {name: inputs.pop(name).requires_grad_() for name in ("x", "key_bias", "attention_norm", "output")}
    options = inputs | {"settings": DROPPED, "seed": seeds()}
    torch.autograd.gradcheck(
        lambda *tensors: flat(encoder_layer)(**dict(zip(varied, tensors, strict=True)), **options),
        tuple(varied.values()),
        nondet_tol=0.0,
    )
