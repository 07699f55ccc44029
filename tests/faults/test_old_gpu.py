"""A GPU older than sm_80: nothing is launched, results are bitwise stock's, and the report says why."""

import copy

import pytest
import torch

import fastbert
from fastbert import dispatch
from fastbert.testing.models import assert_bitwise, run
from tests.models.tiny import MLM, make, make_batch
from tests.optim.stepping import pair
from tests.optim.stepping import run as run_steps

FLOAT = torch.float32
CUDA = torch.device("cuda", 0)
device_reason = dispatch.device_reason.__wrapped__  # no cached reasons of other tests


@pytest.fixture
def turing(monkeypatch):
    """Make dispatch see a device of compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    reason = device_reason(CUDA, FLOAT)
    monkeypatch.setattr(dispatch, "device_reason", lambda device, dtype: device_reason(CUDA, dtype))
    return reason


@pytest.mark.parametrize(
    ("capability", "taken"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 1), True)], ids=str
)
def test_compute_capability(capability, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = device_reason(CUDA, FLOAT)
    assert reason is None if taken else ".".join(map(str, capability)) in reason and "8.0" in reason


def test_a_model_runs_stock(turing, launches):
    model, batch = make(MLM).train(), make_batch(MLM)
    patched = fastbert.patch(copy.deepcopy(model), unpad=True, mlm_logits="none")
    assert_bitwise(run(patched, batch), run(model, batch))
    assert not launches()
    rows = [row for row in fastbert.report(patched).rows if row.kernel]
    assert rows and all(row.state in ("fell back", "module by module") and row.reason == turing for row in rows)
    assert turing == "compute capability 7.5: the kernels need 8.0 or newer"


def test_the_optimizer_is_torchs(turing, launches):
    ours, theirs = pair()
    run_steps(ours, theirs, steps=2)
    assert not launches()
