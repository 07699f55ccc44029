"""Inference from real CUDA graphs: values in bfloat16, streams and threads, memory, what a replay waits for."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastbert
from fastbert.graphs.classes import graphs_of
from fastbert.lengths import Counted
from fastbert.testing.models import assert_equal, run
from fastbert.testing.rows import DEVICE
from tests.gpu import no_synchronisation
from tests.graphs.support import infer, make_graphed, make_inputs, make_like, row_of
from tests.models.tiny import BASE, CLASSIFICATION, CLM, KINDS, make, make_batch

pytestmark = pytest.mark.gpu


def make_requests(kind, n):
    """Batches of different lengths, tokens and padding."""
    return [make_inputs(kind, ("right", "none")[seed % 2], seed, length=5 + seed % 8) for seed in range(n)]


def equal(found, expected):
    """Equal up to a few roundings of bfloat16: `expected` ran the ordinary way, in another shape. TestEquality has the rule."""
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2)


class TestEquality:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_every_class(self, kind, dtype):
        stock, batch = make(kind, dtype), make_inputs(kind, "right")
        batch |= {"use_cache": False} if kind is CLM else {}
        model = fastbert.graphed(fastbert.patch(copy.deepcopy(stock)))
        infer(model, batch)
        for seed in (3, 4):
            other = make_like(batch, seed)
            results = run(model, other, backward=False, within=torch.inference_mode())
            exact = run(copy.deepcopy(stock).double(), other, backward=False)
            assert_equal(results, run(stock, other, backward=False), exact, computed=dtype)
        assert row_of(model).kernel_calls == 3 and not row_of(model).fallback_calls

    def test_under_autocast_after_weights_changed(self):
        model, batch = make_graphed(CLASSIFICATION), make_inputs()
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                found = infer(model, batch)
                with torch.no_grad():
                    expected = fastbert.unpatch(copy.deepcopy(model))(**batch)
            equal(found, expected)
            with torch.no_grad():
                model.bert.encoder.layer[0].output.dense.weight.mul_(1.3)
        assert row_of(model).kernel_calls == 3


class TestReplays:
    def test_wait_for_nothing(self):
        """The host waits only to count the tokens of a batch whose lengths nobody gave."""
        packed, whole = make_graphed(CLASSIFICATION), make_graphed(BASE)
        counted = make_inputs() | {"lengths": Counted([9, 6])}
        full = make_inputs(BASE, "none", length=16)
        infer(packed, counted)
        infer(whole, full)
        with no_synchronisation():
            infer(packed, counted)
            infer(whole, full)
        with pytest.raises(RuntimeError), no_synchronisation():
            infer(packed, make_inputs())

    def test_streams_take_turns(self):
        """Each stream's replay waits for the one before on another stream, with whose memory it works."""
        model = make_graphed(CLASSIFICATION)
        requests = make_requests(CLASSIFICATION, 12)
        expected = [infer(model, batch).logits for batch in requests]
        streams = [torch.cuda.Stream() for _ in range(3)]
        for _ in range(20):
            found = []
            for i, batch in enumerate(requests):
                stream = streams[i % 3]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found.append(infer(model, batch).logits)
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, expected))

    def test_threads_take_turns(self):
        model = make_graphed(CLASSIFICATION)
        requests = make_requests(CLASSIFICATION, 24)
        start = threading.Barrier(8)

        def serve(i):
            if i < 8:
                start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                found = infer(model, requests[i]).logits
                torch.cuda.current_stream().synchronize()
                return found

        with ThreadPoolExecutor(8) as pool:
            first = list(pool.map(serve, range(24)))
        assert all(map(torch.equal, first, [infer(model, batch).logits for batch in requests]))
        assert row_of(model).kernel_calls == 48

    def test_beside_a_thread_that_computes(self):
        """A capture stands work of other threads: allocations, copies, random numbers on streams of their own."""
        model, stop = make_graphed(BASE), threading.Event()
        failed = []

        def compute():
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    while not stop.is_set():
                        x = torch.ones(256, 256, device=DEVICE)
                        assert (x @ x).sum().item() == 256.0**3
            except Exception as error:
                failed.append(error)

        other = threading.Thread(target=compute)
        other.start()
        try:
            for rows in range(1, 9):
                infer(model, {"input_ids": torch.ones(rows, 9, dtype=torch.int64, device=DEVICE)})
        finally:
            stop.set()
            other.join()
        assert not failed and row_of(model).kernel_calls == 8, row_of(model)

    def test_captured_by_the_user(self):
        model, batch = make_graphed(BASE), make_inputs(BASE, "none", length=16)
        expected = infer(model, batch)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a graph of another test that were collected meanwhile would invalidate the capture
        with torch.cuda.graph(graph):
            found = infer(model, batch)
        graph.replay()
        equal(found, expected)
        assert row_of(model).fallback_calls == {"a graph is being captured": 1}

    def test_a_graph_becomes_garbage_during_a_capture(self):
        """Destroying a graph would invalidate the capture, so nothing is collected until its end."""
        model, batch = make_graphed(BASE), make_inputs(BASE, "none", length=16)
        cycle = [torch.cuda.CUDAGraph()]
        with torch.cuda.graph(cycle[0]):
            torch.zeros(1, device=DEVICE)
        cycle.append(cycle)
        destroyed = weakref.ref(cycle[0])
        before = gc.get_threshold()
        gc.set_threshold(1)
        del cycle
        try:
            expected = infer(model, batch)
        finally:
            gc.set_threshold(*before)
        equal(infer(model, batch), expected)
        assert row_of(model).kernel_calls == 2 and gc.isenabled()
        gc.collect()
        assert destroyed() is None


class TestMemory:
    def test_is_bounded(self):
        """Graphs share one pool: thirty of them hold little more than the largest."""
        model = make_graphed(BASE, max_graphs=30)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for rows in range(1, 40):
            for _ in range(2):
                infer(model, {"input_ids": torch.ones(rows, 16, dtype=torch.int64, device=DEVICE)})
        assert len(graphs_of(model)) <= 30
        assert torch.cuda.memory_reserved() - before < 256 << 20

    def test_weights_moved_to_the_host_and_back(self):
        model, batch = make_graphed(CLASSIFICATION), make_inputs()
        expected = infer(model, batch)
        model.cpu()
        assert len(graphs_of(model)) in (0, 1)
        model.to(DEVICE)
        equal(infer(model, batch), expected)
        assert row_of(model).kernel_calls == 2

    def test_training_between_inferences(self):
        model, batch = make_graphed(CLASSIFICATION), make_batch(CLASSIFICATION)
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        optimizer = fastbert.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            model.train()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            found = infer(model, inputs)
            with torch.no_grad():
                expected = fastbert.unpatch(copy.deepcopy(model))(**inputs)
            equal(found, expected)
        assert row_of(model).kernel_calls == 3
