"""torch.compile: one graph without breaks, with the kernels as ops, and eager's numbers and gradients."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fastbert
from fastbert.kernels.core.launch import recording
from fastbert.testing.models import assert_bitwise, assert_equal, counting, doubled, expected_launches, run
from tests.models.tiny import CLASSIFICATION, CLM, KINDS, LENGTH, make, make_batch

NINE = [kind for i, kind in enumerate(KINDS) if kind.cls not in {other.cls for other in KINDS[:i]}]


def _long_unless(short):
    return [] if short else [pytest.mark.long]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def small(**overrides):
    """A model of one layer, because tracing takes most of the time."""
    return make(num_hidden_layers=1, **overrides)


def compiled(model, **keywords):
    return torch.compile(model, fullgraph=True, backend="aot_eager", **keywords)


def assert_equal_with_every_gradient(fast, model, batch):
    """Check `fast`, which is `model` patched and compiled: equal, with one launch per kernel module in each direction."""
    with counting() as launched:
        results = run(fast, batch)
    assert launched == expected_launches(model)
    results = {name.replace("_orig_mod.", ""): tensor for name, tensor in results.items()}
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", NINE, ids=str)
def test_every_class_is_one_graph(kind):
    model = make(kind, num_hidden_layers=1).train()
    assert_equal_with_every_gradient(compiled(fastbert.patch(copy.deepcopy(model))), model, batch_of(kind))
    assert not counters["graph_break"]


LENGTHS = (LENGTH, 7, 12, 5, 16, 3, 11, 6, 14, 8)


# Tracing takes ten seconds each. They share the encoder, and the losses of sequence classification are torch's.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind is CLASSIFICATION else [pytest.mark.long]) for kind in KINDS], ids=str
)
def test_ten_lengths(kind):
    """One graph for the first length and one for all others, without marking lengths as dynamic."""
    counter = CompileCounterWithBackend("aot_eager")
    model = make(kind, num_hidden_layers=1).train()
    fast = torch.compile(fastbert.patch(copy.deepcopy(model)), fullgraph=True, backend=counter)
    frames = []
    for length in LENGTHS[:2]:
        assert_equal_with_every_gradient(fast, model, batch_of(kind, length))
        frames.append(counter.frame_count)
    with recording("sm_90", lambda *launch: None):  # the choice of the graph does not depend on what the kernels compute
        for length in LENGTHS[2:]:
            fast(**batch_of(kind, length))
            frames.append(counter.frame_count)
    assert frames == [1] + [2] * 9
    assert_equal_with_every_gradient(fast, model, batch_of(kind, LENGTHS[2]))
    assert not counters["graph_break"]


def batch_of(kind, length=LENGTH):
    batch = make_batch(kind, length=length)
    return batch | ({"use_cache": False} if kind is CLM else {})


def test_one_graph_for_forward_and_one_for_backward():
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(fastbert.patch(small()), fullgraph=True, backend=counter)
    for seed in range(3):
        run(model, make_batch(seed=seed))
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    operations = [str(node.target) for node in graph.graph.nodes if "fastbert" in str(node.target)]
    assert len(operations) == 5 + 1 + 1 + 1, operations  # of a layer and the transform; embeddings; key bounds; the loss


def test_calls_inside_a_graph_are_not_counted_as_eager_ones():
    model = fastbert.patch(small())
    run(compiled(model), make_batch(), backward=False)
    assert {row.kernel_calls for row in fastbert.report(model).rows} == {0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model = fastbert.patch(small())
    with mode(), counting() as launched:
        results = run(compiled(model), make_batch(), backward=False)
    assert launched == expected_launches(model, backward=False)
    torch.testing.assert_close(results, run(model, make_batch(), backward=False))


def test_under_autocast():
    model, batch = small(), make_batch()
    autocast = torch.autocast(model.device.type, torch.float16)
    with counting() as launched:
        results = run(compiled(fastbert.patch(copy.deepcopy(model))), batch, backward=False, within=autocast)
    assert launched == expected_launches(model, backward=False)
    eager = run(model, batch, backward=False, within=autocast)
    assert_equal(results, eager, run(copy.deepcopy(model).double(), doubled(batch), backward=False))


def test_sizes_that_change():
    # A single layer: one graph with dynamic sizes serves all of them.
    counter = CompileCounterWithBackend("aot_eager")
    layer = fastbert.patch(small(attention="sdpa")).bert.encoder.layer[0]  # a single layer shows eager's weights
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows, length in ((2, 9), (3, 7), (4, 5), (11, 6)):
        states = torch.randn(rows, length, 40, device=layer.output.dense.weight.device)
        with torch.no_grad(), counting() as launched:
            output = fast(states)
        assert launched == expected_launches(layer, backward=False)
        torch.testing.assert_close(output, layer(states).detach())
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], frames


def test_dropout_obeys_the_seed():
    model = compiled(fastbert.patch(small(hidden_dropout_prob=0.3)).train())

    def step(seed):
        torch.manual_seed(seed)
        return run(model, make_batch())

    first = step(1)
    assert_bitwise(step(1), first)
    assert not torch.equal(step(2)["loss"], first["loss"])
    # Every call draws a new mask: the seed is not a constant of the graph.
    losses = {run(model, make_batch(), backward=False)["loss"].item() for _ in range(3)}
    assert len(losses) == 3


def test_patching_and_unpatching_a_compiled_model_is_noticed():
    model = small()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for patch, launches in ((None, False), (fastbert.patch, True), (fastbert.unpatch, False)):
        if patch:
            patch(model)
        with counting() as launched:
            run(fast, make_batch(), backward=False)
        assert bool(launched) is launches


def test_what_has_no_kernel_compiles_too():
    model = small(hidden_act="tanh")
    with counting() as launched:
        results = run(compiled(fastbert.patch(copy.deepcopy(model))), make_batch(), backward=False)
    assert launched == expected_launches(model, backward=False, without=["bias_gelu", "gelu_layernorm"])
    torch.testing.assert_close(results, run(model, make_batch(), backward=False))
