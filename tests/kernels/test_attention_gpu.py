"""attention on a GPU: bfloat16 at BERT's shapes, races, streams and devices, CUDA graphs, every shipped configuration."""

import pytest
import torch

from fastbert.kernels import launch
from fastbert.kernels.attention import attention
from fastbert.kernels.configs import ARCHITECTURES

from .attention import check, drawn_keep, make_inputs, normal
from .cases import dtype_name
from .layouts import guarded
from .ops import DEVICE, assert_same, run, seed_tensor
from .test_attention_layouts import every_second, head_size_first, heads_first, shared_heads
from .test_attention_memory import KINDS, SHAPES, case, fenced

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_name)


def lengths_of(batch, length):
    """From the whole length down to a sixteenth of it, none of them a multiple of a tile but the first."""
    return torch.tensor([max(2, length - 37 * i * length // 128) for i in range(batch)], device=DEVICE).clamp(length // 16 + 1)


def options_of(kind, batch, length):
    key_mask = torch.arange(length, device=DEVICE) < lengths_of(batch, length)[:, None]
    full = torch.rand(batch, 1, length, length, device=DEVICE) > 0.1
    full[..., 0] = True
    return {
        "plain": {},
        "causal": {"causal": True},
        "dropped": {"p": 0.1, "seed": seed_tensor(7)},
        "key_mask": {"key_mask": key_mask},
        "bool mask": {"mask": full},
        "added mask": {"mask": torch.zeros(full.shape, device=DEVICE).masked_fill(~full, torch.finfo(FP32).min)},
        "everything": {"key_mask": key_mask, "mask": full, "causal": True, "p": 0.1, "seed": seed_tensor(7)},
    }[kind]


def training_case(dtype=BF16, p=0.1):
    """As one layer of BERT-base trains: padding and dropout."""
    inputs, dy = make_inputs(8, 512, 12, 64, dtype), normal(8, 512, 12, 64, dtype=dtype)
    return inputs, dy, options_of("key_mask", 8, 512) | {"p": p, "seed": seed_tensor(7)}


@HALVES
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("kind", ["plain", "causal", "dropped", "key_mask", "bool mask", "added mask", "everything"])
def test_bound_at_berts_shapes(kind, length, head_size, dtype):
    check(make_inputs(4, length, 12, head_size, dtype), **options_of(kind, 4, length))


@HALVES
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
def test_bound_of_packed_rows(option, head_size, dtype):
    lengths = [512, 0, 1, 128, 37, 300, 2]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    inputs = {name: normal(sum(lengths), 12, head_size, dtype=dtype) for name in ("q", "k", "v")}
    check(inputs, cu_seqlens=bounds, max_seqlen=512, causal=option == "causal", p=0.1 * (option == "dropped"))


@HALVES
@pytest.mark.parametrize("lengths", [(1, 512), (129, 65), (65, 129), (512, 77)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_bound_of_lengths_that_differ(causal, lengths, dtype):
    check(make_inputs(2, lengths, 3, 64, dtype), causal=causal)


@HALVES
@pytest.mark.parametrize("layout", [heads_first, head_size_first, every_second, shared_heads], ids=lambda f: f.__name__)
def test_bound_of_layouts(layout, dtype):
    inputs = {name: layout(x) for name, x in make_inputs(2, 129, 3, 64, dtype).items()}
    check(inputs, layout(normal(2, 129, 3, 64, dtype=dtype)), p=0.1)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=dtype_name)
@pytest.mark.parametrize("head_size", [1, 16, 32, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_shipped_configuration(architecture, head_size, dtype, monkeypatch):
    """Each row of the tables, at a head size that fills its tile and at one that does not, on this GPU and as it runs
    on an older one. What is shipped for newer GPUs may not fit this one's shared memory."""
    mine = launch.architecture(DEVICE)
    if ARCHITECTURES.index(architecture) > ARCHITECTURES.index(mine):
        pytest.skip(f"this GPU takes the table of {mine}")
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    for length, options in ((131, {"p": 0.1}), (257, {"causal": True}), (70, options_of("key_mask", 2, 70))):
        check(make_inputs(2, length, 2, head_size, dtype), **options)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=dtype_name)
def test_the_compiled_mask_is_the_same_in_every_kernel(dtype):
    """With all scores 0 and one-hot values and dy, out is the forward's mask [query, key], dv the backward's."""
    one_hot = torch.eye(256, device=DEVICE, dtype=dtype)[None, :, None].expand(2, -1, 3, -1)
    inputs = {"q": torch.zeros_like(one_hot), "k": torch.zeros_like(one_hot), "v": one_hot}
    results = run(attention, inputs, one_hot, p=0.3, seed=seed_tensor(5))
    keep = drawn_keep(2, 3, 256, 256, 0.3, seed_tensor(5))
    assert torch.equal(results["y"].transpose(1, 2) > 0, keep)
    assert torch.equal(results["dv"].permute(0, 2, 3, 1) > 0, keep)


@HALVES
@pytest.mark.parametrize("kind", ["key_mask and dropped", "causal", "bool mask"])
def test_repeated_250_times_the_bits_are_the_same(kind, dtype):
    """A race, or a sum by atomics, shows sooner or later."""
    inputs, dy, options = training_case(dtype)
    if kind != "key_mask and dropped":
        options = options_of(kind, 8, 512)
    first = run(attention, inputs, dy, **options)
    for _ in range(250):
        again = run(attention, inputs, dy, **options)
        assert all(torch.equal(again[name], first[name]) for name in first)


@HALVES
@pytest.mark.parametrize("shape", [*SHAPES, (2, (130, 70), 2, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_stay_inside_the_inputs(kind, shape, dtype):
    inputs, dy, options = case(kind, shape, dtype)
    plain = run(attention, inputs, dy, **options)
    for band in (0, 1):
        masks = {name: fenced(value, band) for name, value in options.items()}
        results = run(attention, {name: guarded(x) for name, x in inputs.items()}, guarded(dy), **masks)
        assert_same(results, plain)
        assert all(t.isfinite().all() for t in results.values())


def test_on_a_side_stream():
    """Inputs made on that stream after a long wait: a launch on the default stream would read them too early."""
    inputs, dy, options = training_case()
    expected = run(attention, inputs, dy, **options)
    late, stream = {name: torch.zeros_like(x) for name, x in inputs.items()}, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, x in inputs.items():
            late[name].copy_(x)
        results = run(attention, late, dy, **options)
    stream.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, dy, options = training_case()
    expected = run(attention, inputs, dy, **options)
    there = {name: x.to("cuda:1") for name, x in inputs.items()}
    options = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert torch.cuda.current_device() == 0
    results = run(attention, there, dy.to("cuda:1"), **options)
    for name, result in results.items():
        assert result.device == torch.device("cuda", 1) and torch.equal(result.to(DEVICE), expected[name]), name


def captured(function):
    """The graph of one call and what it returned, after the warm-up on a side stream that capturing asks for."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("kind", ["plain", "causal", "dropped", "key_mask", "bool mask"])
def test_in_a_cuda_graph(kind):
    """Captured once, replayed on other numbers: no synchronisation, no pointer to a host number."""
    inputs, dy, options = make_inputs(2, 130, 4, 64, BF16), normal(2, 130, 4, 64, dtype=BF16), options_of(kind, 2, 130)
    graph, results = captured(lambda: run(attention, inputs, dy, **options))
    for _ in range(3):
        inputs["q"].normal_()
        if kind == "key_mask":  # the bounds of another mask are taken in the graph as well
            options["key_mask"].copy_(torch.rand(2, 130, device=DEVICE) > 0.3)
        graph.replay()
        expected = run(attention, inputs, dy, **options)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_each_replay_of_a_cuda_graph_draws_its_own_dropout():
    """And its backward the same one: dv is the dropped weights, transposed, as out is (see above)."""
    one_hot = torch.eye(128, device=DEVICE, dtype=BF16)[None, :, None].expand(1, -1, 4, -1)
    inputs = {"q": torch.zeros_like(one_hot), "k": torch.zeros_like(one_hot), "v": one_hot}
    graph, results = captured(lambda: run(attention, inputs, one_hot, p=0.5))
    masks = []
    for _ in range(4):
        graph.replay()
        masks.append(results["y"] > 0)
        assert torch.equal(results["dv"].transpose(1, 3) > 0, masks[-1])
    for i, one in enumerate(masks):
        assert 0.45 < float(one.float().mean()) < 0.55
        assert not any(torch.equal(one, other) for other in masks[:i])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_synchronisation(packed):
    """torch raises wherever the host would wait for the GPU."""
    inputs, dy, options = training_case()
    del options["seed"]  # drawn on the GPU
    if packed:
        inputs, dy = {name: x.flatten(0, 1) for name, x in inputs.items()}, dy.flatten(0, 1)
        bounds = torch.arange(0, 4097, 512, dtype=torch.int32, device=DEVICE)
        options = {"cu_seqlens": bounds, "max_seqlen": 512, "p": 0.1}
    run(attention, inputs, dy, **options)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attention, inputs, dy, **options)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
