"""The stand-in for CUDA graphs: what a replay repeats, what it leaves behind, and what it forbids as a GPU does."""

import gc
import random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.graphs.capture import CudaRecorder, _without_collection, recorder_of
from fastbert.testing.graphs import TapeRecorder, recording_graphs
from fastbert.testing.rows import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs")


def capture(function, recorder=None):
    recorder = recorder or TapeRecorder()
    return recorder.capture(function)


def replayed(function):
    """The result of a graph's first replay."""
    graph, result = capture(function)
    graph.replay()
    return graph, result


def is_garbage(*tensors):
    return all(x.isnan().all() if x.is_floating_point() else (x == -7).all() for x in tensors)


class TestAReplay:
    def test_reads_what_was_written_in_place(self):
        x, weight = torch.randn(3, 4), torch.randn(4, 4)
        graph, y = replayed(lambda: (x @ weight).relu().sum(1))
        assert torch.equal(y, (x @ weight).relu().sum(1))
        x.copy_(torch.randn(3, 4))
        weight[0] = 5.0
        graph.replay()
        assert torch.equal(y, (x @ weight).relu().sum(1))

    def test_runs_no_python(self):
        calls, box = [], {"x": torch.ones(2), "factor": 2.0}

        def function():
            calls.append(1)
            return box["x"] * box["factor"]

        graph, y = capture(function)
        old = box["x"]
        box |= {"x": torch.zeros(2), "factor": 3.0}
        graph.replay()
        assert len(calls) == 1 and y.tolist() == [2.0, 2.0]
        old.add_(1.0)
        graph.replay()
        assert len(calls) == 1 and y.tolist() == [4.0, 4.0]

    def test_writes_through_views_and_out(self):
        x, total = torch.randn(4), torch.zeros(2, 2)

        def function():
            y = torch.empty_like(x)
            torch.mul(x, 2.0, out=y)
            y[1:3].add_(1.0)
            total.view(4).add_(y)
            return y.view(2, 2).t(), y[0]

        graph, (y, first) = capture(function)
        assert not total.any(), "undone"
        sum_of_all = torch.zeros(2, 2)
        for _ in range(3):
            x.normal_()
            graph.replay()
            expected = (2 * x + torch.tensor([0.0, 1.0, 1.0, 0.0])).view(2, 2)
            assert torch.equal(y, expected.t()) and first == expected[0, 0]
            sum_of_all += expected
        assert torch.equal(total, sum_of_all)

    def test_several_outputs_and_lists(self):
        x, others = torch.randn(6), [torch.zeros(2), torch.zeros(3)]

        def function():
            values, order = x.sort()
            torch._foreach_add_(others, [values[0], values[1]])
            return values, order, torch._foreach_mul(others, 2.0)

        graph, (values, order, doubled) = capture(function)
        graph.replay()
        x.neg_()
        graph.replay()
        expected, places = x.sort()
        assert torch.equal(values, expected) and torch.equal(order, places)
        assert torch.equal(doubled[1], 2 * others[1]) and others[0].tolist() == [float(-expected[5] + expected[0])] * 2

    def test_draws_anew(self):
        x, state = torch.ones(1000), torch.get_rng_state()
        graph, y = capture(lambda: nn.functional.dropout(x, 0.5))
        assert torch.equal(torch.get_rng_state(), state), "a capture draws nothing"
        graph.replay()
        first = y.clone()
        graph.replay()
        assert not torch.equal(first, y) and set(y.tolist()) == {0.0, 2.0}
        torch.set_rng_state(state)
        graph.replay()
        assert torch.equal(first, y), "torch.manual_seed holds for replays"

    def test_is_invisible(self):
        seen, x, leaf = [], torch.randn(2, 2), torch.ones(2, requires_grad=True)

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **kwargs or {})

        def function():
            with torch.no_grad():
                leaf.add_(1.0)
            return x @ x

        graph, y = capture(function)
        versions = leaf._version, y._version
        with Watch(), torch.autocast("cpu", torch.bfloat16):
            graph.replay()
        assert not seen and (leaf._version, y._version) == versions
        assert leaf.tolist() == [2.0, 2.0] and torch.equal(y, x @ x)

    @pytest.mark.parametrize("captured_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    @pytest.mark.parametrize("replayed_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_in_any_mode(self, captured_in, replayed_in):
        layer, x = nn.Linear(3, 3), torch.randn(2, 3)
        with captured_in():
            graph, y = capture(lambda: layer(x).reshape(3, 2).add_(1.0))
        for _ in range(2):
            x.normal_()
            with replayed_in():
                graph.replay()
            assert torch.equal(y, (layer(x) + 1.0).reshape(3, 2))


class TestACapture:
    def test_computes_nothing(self):
        x, n, kept = torch.ones(2), torch.ones(2, dtype=torch.int64), {}

        def function():
            kept["more"] = x + 1
            x.zero_()
            return n + 1, x, n > 0

        graph, (y, same, positive) = capture(function)
        assert positive.tolist() == [False, True]
        assert is_garbage(y, kept["more"]) and same is x and x.tolist() == [1.0, 1.0]
        graph.replay()
        assert y.tolist() == kept["more"].tolist() == [2, 2] and x.tolist() == [0.0, 0.0]

    def test_that_fails_leaves_everything_as_it_was(self):
        recorder, x, state = TapeRecorder(), torch.ones(2), torch.get_rng_state()

        def function():
            torch.rand(2, device=x.device)
            x.zero_()
            raise KeyError

        with pytest.raises(KeyError):
            recorder.capture(function)
        assert x.tolist() == [1.0, 1.0] and torch.equal(torch.get_rng_state(), state) and recorder.captures == 0
        replayed(lambda: x + 1)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x.sum().item(),
            lambda x: float(x[0]),
            lambda x: bool(x.any()),
            lambda x: x.tolist(),
            lambda x: x.numpy(),
            lambda x: x.cpu(),
            lambda x: x.to("cpu"),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.masked_select(x > 0),
            lambda x: x.unique(),
            lambda x: torch.equal(x, x),
            lambda x: torch.where(x > 0),
            lambda x: x.index_put_((x > 0,), torch.ones(4, device=x.device)),
            lambda x: torch.repeat_interleave(x.long()),
            lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
            lambda x: x.copy_(torch.tensor(1.0)),
            lambda x: x + torch.zeros(4),
            lambda x: torch.tensor(1.0, device=x.device),
            lambda x: x.new_tensor([1.0]),
            lambda x: x.normal_(generator=torch.Generator()),
            lambda x: repr(x),
            lambda x: x[[0, 1]],
            lambda x: torch.manual_seed(1),
            lambda x: torch.set_rng_state(torch.get_rng_state()),
        ],
    )
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_forbids_what_waits(self, function, mode):
        x = torch.ones(4)
        with pytest.raises(RuntimeError, match="not permitted while a graph is captured"), mode():
            capture(lambda: function(x))
        assert x.tolist() == [1.0] * 4

    def test_permits_what_looks_alike(self):
        x, ids, two = torch.ones(4), torch.tensor([2, 0]), []

        def function():
            x[x > 0] = 3.0  # it is masked_fill
            numbers = torch.tensor([1.0, 2.0])  # on the host, where reading them waits for nobody
            two.append(torch.tensor(2.0))
            return x[ids] * sum(numbers.tolist()) * two[0], torch.repeat_interleave(ids, ids, output_size=2)

        graph, (y, repeated) = replayed(function)
        assert y.tolist() == [18.0, 18.0] and repeated.tolist() == [2, 2]
        ids.copy_(torch.tensor([1, 1]))
        two[0].fill_(5.0)  # a launch received its value
        graph.replay()
        assert repeated.tolist() == [1, 1] and y.tolist() == [18.0, 18.0]


class TestSharedMemory:
    def test_only_what_is_referred_to_survives_a_replay(self):
        x, box = torch.ones(3), {}

        def function():
            inner = x + 1
            box["weak"] = inner.view(3)
            box["address"] = inner.data_ptr()
            return inner * 2, {"again": inner * 3}

        graph, result = capture(function)
        graph.replay()
        assert result[0].tolist() == [4.0] * 3 and box["weak"].tolist() == [2.0] * 3
        del box["weak"]
        graph.replay()
        inner = next(memory for memory in graph.memory if memory.storage.data_ptr() == box["address"])
        assert is_garbage(*inner.aliases.values()) and result[1]["again"].tolist() == [6.0] * 3

    def test_a_replay_overwrites_the_results_of_later_graphs(self):
        recorder, x = TapeRecorder(), torch.ones(2)
        graphs, results = zip(*(recorder.capture(lambda: x + 1) for _ in range(3)), strict=True)
        for graph in graphs:
            graph.replay()
        assert [y.tolist() for y in results] == [[2.0, 2.0]] * 3, "in the order of their captures"
        graphs[1].replay()
        assert results[0].tolist() == results[1].tolist() == [2.0, 2.0] and is_garbage(results[2])
        capture(lambda: x + 1)[0].replay()
        assert results[1].tolist() == [2.0, 2.0], "another recorder has other memory"

    def test_memory_that_was_given_up(self):
        box = {"x": torch.ones(2)}
        graph, _ = capture(lambda: box["x"] + 1)
        graph.replay()
        del box["x"]
        with pytest.raises(AssertionError, match="nobody else refers to"):
            graph.replay()

    def test_memory_that_only_two_graphs_refer_to(self):
        box, recorder = {"x": torch.ones(2)}, TapeRecorder()
        (one, _), (two, _) = (recorder.capture(lambda: box["x"][:1] * 2) for _ in range(2))
        del box["x"]
        for graph in (one, two):
            with pytest.raises(AssertionError, match="nobody else refers to"):
                graph.replay()

    def test_a_graph_that_is_dropped_frees_its_memory(self):
        x, freed = torch.ones(2), []
        graph, y = replayed(lambda: (x + 1) * 2)
        recorder = graph._recorder
        for memory in graph.memory:
            weakref.finalize(memory, freed.append, 1)
        expected = len(graph.memory)
        del graph, memory
        gc.collect()
        assert len(freed) == expected and not recorder.graphs and y.tolist() == [4.0, 4.0]

    def test_two_at_the_same_time(self):
        recorder, x = TapeRecorder(), torch.ones(2)
        graph, _ = recorder.capture(lambda: x + 1)
        other, _ = TapeRecorder().capture(lambda: x + 1)
        for function in (graph.replay, other.replay, lambda: recorder.capture(x.add), lambda: recorder.warm_up(x.add)):
            with pytest.raises(AssertionError, match="during a capture"):
                recorder.capture(function)
        begun, end, errors = threading.Event(), threading.Event(), []

        def slow():
            begun.set()
            end.wait(10)
            return x + 1

        thread = threading.Thread(target=lambda: recorder.capture(slow))
        thread.start()
        begun.wait(10)
        for function in (graph.replay, lambda: recorder.capture(lambda: x + 1)):
            with pytest.raises(AssertionError, match="at the same time"):
                function()
        other.replay()
        assert (x + 1).sum().item() == 4.0, "another thread may go on"
        end.set()
        thread.join()
        graph.replay()
        assert not errors and recorder.captures == 2 and recorder.replays == 1


def test_in_place_of_cuda():
    assert recorder_of(torch.device("cpu")) is None
    with recording_graphs() as recorders:
        recorder = recorder_of(torch.device("cpu"))
        assert recorders == [recorder]
        calls = []
        assert recorder.warm_up(lambda: calls.append(1) or len(calls)) == CudaRecorder.WARM_UP_CALLS == len(calls)
    assert recorder_of(torch.device("cpu")) is None


LENGTH = 12


class Program:
    """A random program over three tensors: values, views and writes, and a result that refers to some of them."""

    def __init__(self, seed):
        self.numbers = random.Random(seed)
        self.inputs = [torch.randn(LENGTH), torch.randn(LENGTH), torch.randint(LENGTH, (LENGTH,))]
        self.operations = [self.numbers.choice(self.OPERATIONS) for _ in range(12)]
        self.picks = [[self.numbers.randrange(2**20) for _ in range(3)] for _ in self.operations]
        self.results = self.numbers.sample(range(2, 10), 3)

    OPERATIONS = (
        lambda x, y, ids: x * y + 1.0,
        lambda x, y, ids: x.mul_(0.5),
        lambda x, y, ids: x.view(3, 4).t().reshape(-1),
        lambda x, y, ids: x.view(3, 4)[1].add_(y[:4]).tanh().repeat(3),
        lambda x, y, ids: x.view(3, 4).clone().t_().reshape(-1),
        lambda x, y, ids: x[ids],
        lambda x, y, ids: x.index_add_(0, ids, y) if x is not y else x.neg(),
        lambda x, y, ids: torch.where(x > y, x, y),
        lambda x, y, ids: torch.cat([x[6:], y[:6]]),
        lambda x, y, ids: torch.add(x, y, out=torch.empty_like(x)),
        lambda x, y, ids: x.sort().values.flip(0),
        lambda x, y, ids: torch._foreach_add([x, y], 1.0)[1],
        lambda x, y, ids: x.copy_(y.detach()),
        lambda x, y, ids: nn.functional.dropout(x, 0.5) + x.new_zeros(LENGTH),
        lambda x, y, ids: x.expand(2, LENGTH).sum(0).contiguous(),
    )

    def __call__(self):
        values, ids = self.inputs[:2], self.inputs[2]
        for operation, (one, other, _) in zip(self.operations, self.picks, strict=True):
            values.append(operation(values[one % len(values)], values[other % len(values)], ids))
        return [values[i] for i in self.results]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(8, 100))])
def test_random_programs(seed, mode):
    """Three replays give what three calls give, inputs that the program writes included."""
    torch.manual_seed(seed)
    program, recorder = Program(seed), TapeRecorder()
    start = [x.clone() for x in program.inputs]
    with mode():
        graph, results = recorder.capture(program)
    assert all(torch.equal(x, y) for x, y in zip(program.inputs, start, strict=True))
    called = Program(seed)
    called.inputs = start
    for number in range(3):
        for inputs in (program.inputs, called.inputs):
            torch.manual_seed(number)
            inputs[0].copy_(torch.randn(LENGTH))
            inputs[2].copy_(torch.randint(LENGTH, (LENGTH,)))
        torch.manual_seed(number)
        graph.replay()
        torch.manual_seed(number)
        expected = called()
        for one, other in zip([*results, *program.inputs], [*expected, *called.inputs], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(enabled):
    """The collector is afterwards as the caller had it, also if the capture failed."""
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), _without_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
