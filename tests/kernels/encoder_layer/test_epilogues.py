"""A layer whose feed-forward products have epilogues: results and launches."""

from collections import Counter

import pytest
import torch

from fastbert.kernels.core import bound, cache
from fastbert.kernels.core.launch import INTERPRETED
from fastbert.kernels.encoder_layer import Settings, encoder_layer, plan
from fastbert.kernels.feed_forward.products import KERNELS, decided
from fastbert.testing import encoder_layer as layer
from fastbert.testing.encoder_layer import direct, flat, make_inputs
from fastbert.testing.feed_forward import small_tiles
from fastbert.testing.rows import DEVICE, run

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tiles too small for the tensor cores")
DROPPED = Settings(2, attention_p=0.1, attention_output_p=0.1, output_p=0.1)
MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.bool, device=DEVICE)
STARTS = torch.tensor([0, 12, 18], dtype=torch.int32, device=DEVICE)
READ = {"cu_seqlens_q": torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE), "max_seqlen_q": 2}
CALLS = {  # rows that no tile size divides
    "padded": ((2, 9, 32), torch.float32, DROPPED, {"key_mask": MASK}),
    "half": ((2, 9, 32), torch.float16, DROPPED, {"key_mask": MASK}),
    "relu": ((2, 9, 32), torch.float32, Settings(2, activation="relu"), {}),
    "packed": ((18, 32), torch.float32, DROPPED, {"cu_seqlens": STARTS, "max_seqlen": 12}),
    "read": ((18, 32), torch.float32, DROPPED, {"cu_seqlens": STARTS, "max_seqlen": 12, **READ}),
    "autocast": ((2, 9, 32), torch.float32, DROPPED, {"product_dtype": torch.float16, "norm_dtype": torch.float32}),
}


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch)


@pytest.fixture
def counted_as(monkeypatch):
    """The launches that layer.check expects."""

    def of(product, gradient):
        swapped = {"FORWARD": (product, "bias_gelu_fwd_kernel", 0), "BACKWARD": (gradient, "bias_gelu_bwd_kernel", 1)}
        for name, (on, kernel, i) in swapped.items():
            if on:
                monkeypatch.setattr(layer, name, getattr(layer, name) - Counter([kernel]) + Counter([KERNELS[i]]))

    return of


def made(call):
    shape, dtype, settings, options = CALLS[call]
    return make_inputs(shape, 64, dtype, queries=3 if call == "read" else None), settings, options


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", [(True, True), (True, False), (False, True)], ids=str)
def test_against_eager(call, way, counted_as):
    counted_as(*way)
    inputs, settings, options = made(call)
    with decided(*way):
        layer.check(inputs, settings, **options)


@pytest.mark.parametrize("frozen", [("output",), ("intermediate", "intermediate_bias"), layer.NAMES, ("x",)], ids=str)
def test_frozen(frozen, counted_as):
    counted_as(True, True)
    inputs, settings, options = made("padded")
    with decided(True, True):
        layer.check(inputs, settings, frozen=frozen, **options)


def test_the_same_as_without_them():
    """In 16 bits, where h and its gradient are rounded, equal up to the order of the products' sums."""
    inputs, settings, options = made("half")
    dy = torch.randn(2, 9, 32, device=DEVICE).half()
    options = options | {"settings": settings, "seed": layer.seeds()}
    with decided(True, True):
        found = run(flat(encoder_layer), inputs, dy, **options)
    for name, tensor in run(flat(encoder_layer), inputs, dy, **options).items():
        if tensor is not None:
            torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-2)


def test_two_launches_fewer(monkeypatch, launches):
    """One kernel instead of a product and a kernel, forward and backward; without a gradient h is not written."""
    monkeypatch.setattr(bound, "INTERPRETED", False)
    compiled, nothing = [], cache.LoadedKernel(None, lambda *places: None, (), True)
    monkeypatch.setattr(cache, "compiled", lambda kernel, _, __, values: compiled.append((kernel.__name__, values)) or nothing)
    plan.clear()
    inputs = make_inputs((2, 9, 32), 64)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}
    with decided(True, True):
        y = flat(direct)(**leaves, settings=Settings(2))
        torch.autograd.grad(y, [x for x in leaves.values() if x is not None], torch.ones_like(y))
        with torch.no_grad():
            flat(direct)(**leaves, settings=Settings(2))
    plan.clear()
    found = launches()
    assert not any("gelu" in name for name in (*found, *dict(compiled))) and len(compiled) == 10 + 4
    assert [values[3] for name, values in compiled if name == KERNELS[0]] == [torch.float32, None]
    assert [found.get(name) for name in KERNELS] == [2, 1]
