"""GradScaler: scale and infinities reach the kernel as tensors, and torch's fused AdamW gives the same."""

import pytest
import torch
from torch.amp import GradScaler

from fastbert.testing.rows import DEVICE

from .stepping import assert_same, give_gradients, pair, params_of

SCALE = 1024.0


def step(optimizer, scaler, number, infinite, clip):
    give_gradients(optimizer, step=number, scale=float(scaler.get_scale()))
    scaler.scale(torch.ones((), device=DEVICE))  # creates the scale tensor, as scaling a loss does
    if infinite:
        params_of(optimizer)[0].grad.view(-1)[3] = torch.inf
    if clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_grad_scaler_with_infinities(clip, launches):
    ours, theirs = pair(theirs={"fused": True}, lr=1e-2)
    scalers = [GradScaler(DEVICE.type, init_scale=SCALE, growth_interval=3) for _ in range(2)]
    for number in range(12):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            step(optimizer, scaler, number, number in (0, 4, 5), clip)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for param, other in zip(params_of(ours), params_of(theirs), strict=True):
            torch.testing.assert_close(param.grad, other.grad, equal_nan=True)  # unscaled in place, by both
    assert launches() == {"adamw_kernel": 12}
    assert {float(ours.state[p]["step"]) for p in params_of(ours)} == {9.0}
    assert_same(ours, theirs)
    assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")
