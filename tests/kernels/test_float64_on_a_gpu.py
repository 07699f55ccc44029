"""float64 on a GPU runs in plain PyTorch: ops run their twins, models their stock code. No kernel is tried, so none fails.

The GPU is pretended here. In the interpreter kernels do compute float64, because gradcheck needs it.
"""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbert.dispatch import device_reason, tensor_reason
from fastbert.kernels import reference
from fastbert.kernels.bias_gelu import bias_gelu
from fastbert.kernels.core import failures, launch
from fastbert.kernels.core.configs import ARCHITECTURES, TABLES

pytestmark = pytest.mark.no_launch
REASON = "torch.float64 has no kernel on a GPU"


@pytest.fixture
def on_a_gpu():
    """Tensors without memory, made as on a GPU."""
    with FakeTensorMode():
        yield lambda dtype: torch.empty(2, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype, wide", [(torch.float64, True), (torch.float32, False), (torch.int64, False)], ids=str)
def test_which_tensors_have_no_kernel(dtype, wide, on_a_gpu):
    assert failures.is_float64_on_gpu(on_a_gpu(torch.float32), None, (3.0, on_a_gpu(dtype))) is wide
    assert not failures.is_float64_on_gpu(torch.empty(2, dtype=dtype, device="cpu"))


def test_tables_of_gpus_have_no_float64():
    assert not [(name, arch) for name, tables in TABLES.items() for arch in ARCHITECTURES if 8 in tables[arch]]


def test_an_op_runs_its_twin(monkeypatch, caplog):
    """Forward and backward, and not as a failure: nothing is logged or counted, and float32 keeps its kernel."""
    monkeypatch.setattr(
        failures, "is_float64_on_gpu", lambda *arguments: any(x.dtype == torch.float64 for x in failures.tensors(arguments))
    )
    launch.counts.clear()
    before = failures.counted.fallbacks
    x, bias = torch.randn(3, 40, dtype=torch.float64, requires_grad=True), torch.randn(40, dtype=torch.float64)
    with caplog.at_level(logging.INFO, "fastbert"):
        y = bias_gelu(x, bias)
        y.sum().backward()
    again = x.detach().requires_grad_()
    expected = reference.bias_gelu(again, bias)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, again.grad)
    assert not launch.counts and not caplog.records and failures.counted.fallbacks == before and not failures.reasons
    bias_gelu(x.detach().float(), bias.float())
    assert launch.counts == {"bias_gelu_fwd_kernel": 1}
    launch.counts.clear()


def test_a_model_is_told_why(on_a_gpu):
    """Layers and the optimizer ask these two functions."""
    assert device_reason(torch.device("cuda", 0), torch.float64) == REASON
    assert device_reason(torch.device("cpu"), torch.float64) is None
    assert tensor_reason(on_a_gpu(torch.float64)) == REASON
