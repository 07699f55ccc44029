"""What only a GPU shows: bfloat16, races, streams and devices, CUDA graphs, and that a kernel is worth having."""

import pytest
import torch

from fastbert.kernels.launch import ACTIVATIONS, INTERPRETED

from .cases import dtype_name
from .layouts import LAYOUTS
from .ops import BIAS_GELU, DEVICE, DROPOUT_ADD_LAYERNORM, OPS, check, make_inputs, run, seed_tensor

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=dtype_name)
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=str)


def dropout_of(op, p=0.1):
    return {"p": p, "seed": seed_tensor(7)} if op is DROPOUT_ADD_LAYERNORM else {}


@pytest.mark.no_launch
def test_kernels_are_compiled():
    assert not INTERPRETED, "TRITON_INTERPRET is set: these tests would prove nothing about the GPU"


@DTYPES
@EVERY_OP
@pytest.mark.parametrize("rows", [1, 127, 4099])
@pytest.mark.parametrize("width", [37, 512, 513, 768, 1024, 1500, 2048, 3072, 4096, 8192])
def test_bound(op, width, rows, dtype):
    """Each row of the configuration tables, at a width that fills its tile and at one that does not."""
    check(op, make_inputs(op, (rows, width), dtype), **dropout_of(op))


@DTYPES
@EVERY_OP
@pytest.mark.parametrize("optional", [True, False], ids=["biased", "plain"])
def test_bert_large_at_full_length(op, optional, dtype):
    """More rows than programs run at once: the loop over blocks and the sums over programs."""
    check(op, make_inputs(op, (32, 512, 1024), dtype, optional=optional), **dropout_of(op))


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS[1:], ids=str)
def test_activations(op, activation, dtype):
    check(op, make_inputs(op, (257, 768), dtype), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_through_as_in_torch(activation):
    """PTX's max and min return the other operand of a NaN, which the interpreter's do not."""
    x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, -0.0, 0.5, 1e38]], device=DEVICE).to(BF16)
    check(BIAS_GELU, {"x": x, "bias": None}, activation=activation, frozen=("x",))


@EVERY_OP
@pytest.mark.parametrize("dy_layout", LAYOUTS, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("x_layout", LAYOUTS, ids=lambda f: "x_" + f.__name__)
def test_layouts(op, x_layout, dy_layout):
    inputs = make_inputs(op, (70, 96), BF16)
    inputs["x"] = x_layout(inputs["x"])
    check(op, inputs, dy_layout(torch.randn(70, 96).to(DEVICE, BF16)), **dropout_of(op))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("half", [BF16, FP16], ids=dtype_name)
def test_autocasts_dtypes(half, p):
    dtypes = {"x": half, "residual": FP32, "weight": FP32, "bias": FP32, "x_bias": FP32}
    results = check(DROPOUT_ADD_LAYERNORM, make_inputs(DROPOUT_ADD_LAYERNORM, (257, 768), dtypes=dtypes), p=p)
    assert results["y"].dtype == FP32 and results["dx"].dtype == half


@EVERY_OP
def test_repeated_fifty_times_the_bits_are_the_same(op):
    """A race, or a sum by atomics, shows sooner or later."""
    inputs, dy = make_inputs(op, (4099, 768), BF16), torch.randn(4099, 768).to(DEVICE, BF16)
    first = run(op.call, inputs, dy, **dropout_of(op))
    for _ in range(50):
        again = run(op.call, inputs, dy, **dropout_of(op))
        assert all(torch.equal(again[name], first[name]) for name in first)


@EVERY_OP
def test_on_a_side_stream(op):
    """Inputs made on that stream after a long wait: a launch on the default stream would read them too early."""
    inputs, dy = make_inputs(op, (1024, 768), BF16), torch.randn(1024, 768).to(DEVICE, BF16)
    expected = run(op.call, inputs, dy, **dropout_of(op))
    late = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    options, stream = dropout_of(op), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in inputs.items():
            late[name].copy_(tensor)
        results = run(op.call, late, dy, **options)
    stream.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@EVERY_OP
def test_on_a_device_that_is_not_current(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, dy = make_inputs(op, (257, 768), BF16), torch.randn(257, 768).to(DEVICE, BF16)
    expected = run(op.call, inputs, dy, **dropout_of(op))
    there = {name: tensor.to("cuda:1") for name, tensor in inputs.items()}
    options = {k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in dropout_of(op).items()}
    assert torch.cuda.current_device() == 0
    results = run(op.call, there, dy.to("cuda:1"), **options)
    for name, result in results.items():
        assert result.device == torch.device("cuda", 1) and torch.equal(result.to(DEVICE), expected[name]), name


@EVERY_OP
def test_in_a_cuda_graph(op):
    """Captured once, replayed on other numbers: no synchronisation, no pointer to a host number."""
    inputs, dy = make_inputs(op, (257, 768), BF16), torch.randn(257, 768).to(DEVICE, BF16)
    options = dropout_of(op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(op.call, inputs, dy, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(op.call, inputs, dy, **options)
    for _ in range(3):
        inputs["x"].normal_()
        graph.replay()
        expected = run(op.call, inputs, dy, **options)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_each_replay_of_a_cuda_graph_draws_its_own_dropout():
    op, graph = DROPOUT_ADD_LAYERNORM, torch.cuda.CUDAGraph()
    inputs, dy = make_inputs(op, (64, 768), BF16), torch.randn(64, 768).to(DEVICE, BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(op.call, inputs, dy, p=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = run(op.call, inputs, dy, p=0.5)
    masks = []
    for _ in range(4):
        graph.replay()
        masks.append(results["dx"] != 0)
    for i, one in enumerate(masks):
        assert 0.45 < float(one.float().mean()) < 0.55
        assert not any(torch.equal(one, other) for other in masks[:i])


@EVERY_OP
def test_no_synchronisation(op):
    """torch raises wherever the host would wait for the GPU."""
    inputs, dy = make_inputs(op, (257, 768), BF16), torch.randn(257, 768).to(DEVICE, BF16)
    options = {"p": 0.1} if op is DROPOUT_ADD_LAYERNORM else {}
    run(op.call, inputs, dy, **options)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op.call, inputs, dy, **options)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@EVERY_OP
def test_faster_than_eager(op):
    """Sanity, not a benchmark: one pass over memory against several, on enough rows that launching takes no part."""
    from triton.testing import do_bench

    inputs = {k: t.requires_grad_() for k, t in make_inputs(op, (65536, 768), BF16).items()}
    dy = torch.randn(65536, 768, device=DEVICE).to(BF16)

    def step(function, **options):
        torch.autograd.grad(function(**inputs, **options), tuple(inputs.values()), dy)

    keep = {"p": 0.1, "keep": torch.rand(65536, 768, device=DEVICE) > 0.1} if op is DROPOUT_ADD_LAYERNORM else {}
    fast, eager = do_bench(lambda: step(op.call, **dropout_of(op))), do_bench(lambda: step(op.reference, **keep))
    assert fast < eager, f"{fast:.3f} ms against eager's {eager:.3f} ms"
