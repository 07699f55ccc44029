"""A product with an epilogue that does not compile or launch: cuBLAS and a kernel replace it, in a layer and in the op."""

import pytest
import torch

from fastbert.kernels.core import failures
from fastbert.kernels.core.launch import INTERPRETED, counts
from fastbert.kernels.encoder_layer import Settings, encoder_layer, plan
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import KERNELS, decided
from fastbert.testing.encoder_layer import flat, make_inputs, seeds
from fastbert.testing.feed_forward import AFTER, small_tiles
from fastbert.testing.feed_forward import make_inputs as make_op_inputs
from fastbert.testing.rows import DEVICE, run

from .broken import ERRORS, break_kernels

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tiles too small for the tensor cores")


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ahead", [True, False], ids=["compiled", "launched"])
def test_in_a_layer(name, ahead, monkeypatch, caplog):
    """cuBLAS and a kernel replace it: at once if it does not compile, from the next call on if a launch fails."""
    inputs, dy = make_inputs((2, 9, 32), 64), torch.randn(2, 9, 32, device=DEVICE)
    options = {"settings": Settings(2, output_p=0.1), "seed": seeds()}
    expected = run(flat(encoder_layer), inputs, dy, **options)
    broken = break_kernels(monkeypatch, [name], ERRORS["ptxas"])
    with decided(True, True):
        if ahead:
            real = plan.Plan._bind

            def bind(self, work, *tensors):
                if work.kernel.__name__ == name:
                    raise failures.KernelFailed(name, ERRORS["ptxas"]())
                return real(self, work, *tensors)

            monkeypatch.setattr(plan.Plan, "_bind", bind)
        for call in range(2):
            before = counts.copy()
            found = run(flat(encoder_layer), inputs, dy, **options)
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, msg=key)
            assert (counts - before)[AFTER[KERNELS.index(name)]] == (ahead or call)
    assert failures.reasons.keys() == {name} and broken[name].attempts == (0 if ahead else 1)
    assert len([record for record in caplog.records if name in record.message]) == 1


@pytest.mark.parametrize("name", KERNELS)
def test_in_the_op(name, monkeypatch):
    inputs, dy = make_op_inputs(18, 32, 64, 16), torch.randn(18, 16, device=DEVICE)
    expected = run(feed_forward, inputs, dy)
    broken = break_kernels(monkeypatch, [name])
    with decided(True, True):
        for _ in range(2):
            for key, tensor in run(feed_forward, inputs, dy).items():
                torch.testing.assert_close(tensor, expected[key], msg=key)
    assert broken[name].attempts == 1 and failures.reasons.keys() == {name}
