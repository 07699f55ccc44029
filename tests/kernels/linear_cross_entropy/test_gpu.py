"""linear_cross_entropy on a GPU: 16-bit types at BERT's sizes, memory, autocast, labels that are no class."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastbert.kernels import reference
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.kernels.linear_cross_entropy.chunked import max_kept_rows, rows_per_chunk
from fastbert.testing.linear_cross_entropy import check, chunk_rows, make_inputs, make_weights, run
from tests.gpu import least_milliseconds

from ..cases import dtype_name

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=dtype_name)
VOCABULARY = 30522


@DTYPE
@pytest.mark.parametrize("n_cols", [2, 101, 28996, VOCABULARY, VOCABULARY + 1])
@pytest.mark.parametrize("reduction, way", [("mean", "kept"), ("mean", "formed"), ("none", "formed")])
def test_bound(reduction, way, n_cols, dtype):
    # In float16 torch's own sum of thousands of logarithms, which smoothing takes, is infinite.
    smoothing = 0.0 if dtype == FP16 else 0.1
    check(*make_inputs(257, n_cols, 768, dtype), rows=chunk_rows(way, 100), reduction=reduction, label_smoothing=smoothing)


@DTYPE
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction, way", [("mean", "kept"), ("sum", "formed"), ("none", "formed")])
def test_bound_with_class_weights(reduction, way, smoothing, dtype):
    options = {"reduction": reduction, "label_smoothing": smoothing, "class_weights": make_weights(VOCABULARY)}
    check(*make_inputs(257, VOCABULARY, 768, dtype), rows=chunk_rows(way, 100), out_dtype=FP32, **options)


@DTYPE
@pytest.mark.parametrize("n_rows", [1, 614, 4099])
@pytest.mark.parametrize("width", [768, 1024])
def test_bound_as_it_ships(width, n_rows, dtype):
    """The shipped chunk size."""
    inputs, labels = make_inputs(n_rows, VOCABULARY, width, dtype, ignored=0.1)
    sizes = VOCABULARY, width, dtype
    check(inputs, labels, rows=None if n_rows <= max_kept_rows(*sizes) else rows_per_chunk(n_rows, *sizes))


def peak_bytes(function, inputs, labels):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(**leaves, labels=labels).backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=dtype_name)
@pytest.mark.parametrize("n_rows", [3600, 4096, 8192, 16384])
def test_a_quarter_of_eagers_memory(n_rows, dtype):
    """The peak, including gradients."""
    peak_bytes(reference.linear_cross_entropy, *make_inputs(16, 64, 64, dtype))  # cuBLAS allocates its workspaces
    inputs, labels = make_inputs(n_rows, VOCABULARY, 768, dtype)
    ours, eager = (peak_bytes(f, inputs, labels) for f in (linear_cross_entropy, reference.linear_cross_entropy))
    assert ours <= eager / 4, f"{ours / 2**20:.0f} MiB against eager's {eager / 2**20:.0f}"


@pytest.mark.parametrize("n_rows", [64, 614, 2457, 4096, 16384])
def test_no_slower_than_eager(n_rows):
    """A sanity check, not a benchmark: forward and backward together, bf16, BERT-base."""
    inputs, labels = make_inputs(n_rows, VOCABULARY, 768, BF16, ignored=0.0)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}

    def step(function):
        torch.autograd.grad(function(**leaves, labels=labels), tuple(leaves.values()))

    ours, eager = least_milliseconds(lambda: step(linear_cross_entropy), lambda: step(reference.linear_cross_entropy))
    assert ours <= 1.05 * eager, f"{ours:.3f} ms against eager's {eager:.3f} ms"


def test_under_autocast_as_a_decoder_calls_it():
    """float32 parameters cast by the caller, a float32 loss, gradients back in float32."""
    inputs, labels = make_inputs(614, VOCABULARY, 768, FP32)

    def cast(hidden, weight, bias, labels):
        half = (t.to(BF16) for t in (hidden, weight, bias))
        return linear_cross_entropy(*half, labels, out_dtype=FP32)

    def stock(hidden, weight, bias, labels):
        with torch.autocast("cuda", BF16):
            return F.cross_entropy(F.linear(hidden, weight, bias), labels)

    ours, eager = run(cast, inputs, labels), run(stock, inputs, labels)
    exact = run(reference.linear_cross_entropy, {k: t.double() for k, t in inputs.items()}, labels)
    for name in ("dhidden", "dweight", "dbias"):
        error, theirs = ((r[name] - exact[name]).norm() for r in (ours, eager))
        assert error <= 1.1 * theirs, name


@pytest.mark.no_launch  # in a process of its own, which the assertion ends
def test_a_label_that_is_no_class_stops_the_device():
    program = """
import torch
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
h, w = torch.randn(4, 8, device="cuda"), torch.randn(5, 8, device="cuda")
linear_cross_entropy(h, w, None, torch.tensor([0, 1, 7, 2], device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in (done.stderr + done.stdout).lower()
