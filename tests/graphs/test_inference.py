"""Inference from graphs gives what an ordinary call gives, whatever changed since the capture, and says when it is not used.

A stand-in for CUDA graphs runs on the CPU (fastbert/testing/graphs.py): it repeats recorded operations and no Python.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastbert
from fastbert.graphs.classes import graphs_of
from fastbert.lengths import Counted
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.models import assert_equal, run
from fastbert.testing.rows import DEVICE
from tests.graphs.support import close, infer, make_graphed, make_inputs, make_like, ordinary, row_of
from tests.models.tiny import BASE, CLASSIFICATION, CLM, KINDS, MLM, make, make_batch

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs"),
    pytest.mark.usefixtures("recorders"),
]
BY_NAME = {kind.name: kind for kind in KINDS}


class TestEquality:
    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("mask", ["none", "right", "holes"])
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_every_class(self, kind, mask):
        stock, batch = make(kind), make_inputs(kind, mask)
        batch |= {"use_cache": False} if kind is CLM else {}
        model = fastbert.graphed(fastbert.patch(copy.deepcopy(stock)))
        infer(model, batch)
        results = run(model, make_like(batch, seed=3), backward=False, within=torch.inference_mode())
        exact = run(copy.deepcopy(stock).double(), make_like(batch, seed=3), backward=False)
        assert_equal(results, run(stock, make_like(batch, seed=3), backward=False), exact)
        assert row_of(model).kernel_calls == 2 and not row_of(model).fallback_calls

    @pytest.mark.parametrize("name", ["base", "token-classification", "question-answering", "mlm", "single-label"])
    def test_packed_everywhere(self, name):
        kind = BY_NAME[name]
        patched = fastbert.patch(make(kind), unpad=True)
        model = fastbert.graphed(copy.deepcopy(patched))
        for seed, mask in ((1, "right"), (2, "right"), (3, "holes"), (4, "none")):
            batch = make_inputs(kind, mask, seed)
            close(infer(model, batch), ordinary(patched, batch))
        assert row_of(model).kernel_calls == 4

    def test_positions_and_types_that_are_left_out(self):
        model, batch = make_graphed(BASE), make_inputs(BASE)
        for left_out in (["token_type_ids"], ["attention_mask"], ["token_type_ids", "attention_mask"], []):
            given_ = {name: x for name, x in batch.items() if name not in left_out}
            close(infer(model, given_), ordinary(model, given_))
        with torch.no_grad():
            close(model(batch["input_ids"], batch["attention_mask"]), ordinary(model, batch | {"token_type_ids": None}))

    def test_smaller_batches_after_larger_ones(self):
        """What a larger batch left in a bucket reaches no output of a smaller one."""
        model = make_graphed(BASE, buckets=[(4, 16)])
        for rows, length in ((4, 16), (1, 3), (2, 16), (4, 5), (3, 9), (1, 1)):
            ids = torch.randint(1, 61, (rows, length))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            close(infer(model, batch), ordinary(model, batch))
        assert len(graphs_of(model)) == 1

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
    def test_masks_of_other_types(self, dtype):
        model, batch = make_graphed(BASE), make_inputs(BASE)
        batch["attention_mask"] = (
            0.4 * batch["attention_mask"] if dtype.is_floating_point else batch["attention_mask"].to(dtype)
        )
        close(infer(model, batch), ordinary(model, batch))

    def test_reproduces_every_bit_of_an_ordinary_call_of_its_shape(self):
        model = make_graphed(BASE)
        ids = torch.randint(1, 61, (2, 16))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        infer(model, batch)
        found, expected = infer(model, batch), ordinary(model, batch)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


class TestOutputs:
    def test_belong_to_the_caller(self):
        model, first, second = make_graphed(BASE), make_inputs(BASE), make_inputs(BASE, seed=2)
        kept = infer(model, first)
        expected = {name: x.clone() for name, x in kept.items()}
        infer(model, second)
        assert all(torch.equal(kept[name], x) for name, x in expected.items())
        with torch.inference_mode():
            kept.last_hidden_state.fill_(5.0)
        close(infer(model, first), expected)

    def test_are_reused_on_request(self):
        model, first, second = make_graphed(reuse_outputs=True), make_inputs(), make_inputs(seed=2)
        kept = infer(model, first).logits
        copied = kept.clone()
        found = infer(model, second).logits
        assert torch.equal(kept, found) and not torch.equal(kept, copied)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_have_the_mode_of_their_call(self, mode):
        model, batch = make_graphed(), make_inputs()
        infer(model, batch)
        with mode():
            found = model(**batch).logits
        assert found.is_inference() == (mode is torch.inference_mode) and not found.requires_grad

    def test_have_stocks_class(self):
        stock, batch = make(BY_NAME["question-answering"]), make_inputs(BY_NAME["question-answering"])
        model = fastbert.graphed(fastbert.patch(copy.deepcopy(stock)))
        assert type(infer(model, batch)) is type(infer(stock, batch))
        assert [x.shape for x in infer(model, batch).to_tuple()] == [x.shape for x in infer(stock, batch).to_tuple()]


BATCH = make_inputs()
REASONS = {
    "labels was given": make_batch(CLASSIFICATION),
    "output_hidden_states was given": BATCH | {"output_hidden_states": True},
    "output_attentions was given": BATCH | {"output_attentions": True},
    "return_dict was given": BATCH | {"return_dict": False},
    "position_ids was given": BATCH | {"position_ids": torch.arange(9)[None]},
    "inputs_embeds was given": {"inputs_embeds": torch.randn(2, 9, 40)},
    "attention_mask of shape (2, 1, 9, 9) beside": make_inputs(mask="4-D"),
    "a padded position is read": make_inputs(mask="left"),
    "no bucket for a batch of 2 rows and 17": make_inputs(length=17),
}
SETTINGS = {
    "default dtype": (torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "deterministic": (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True),
    "precision": (
        lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value),
        lambda: torch.backends.cuda.matmul.fp32_precision,
        "tf32",
    ),
    "attention": (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled, False),
}


class TestOrdinaryCalls:
    @pytest.mark.parametrize("reason", REASONS)
    def test_reason(self, reason):
        model = make_graphed(buckets=[(2, 16)])
        batch = REASONS[reason]
        fresh = fastbert.patch(make(CLASSIFICATION))
        found, expected = infer(model, batch), infer(fresh, batch)
        if isinstance(found, tuple):
            assert torch.equal(found[0], expected[0])
        else:
            assert torch.equal(found.logits, expected.logits)
        (counted,) = row_of(model).fallback_calls
        assert counted.startswith(reason)
        assert row_of(model).kernel_calls == 0 and row_of(model).state == "fell back"

    def test_gradients(self):
        model, batch = make_graphed(), make_inputs()
        model(**batch).logits.sum().backward()
        assert model.classifier.weight.grad is not None
        model.requires_grad_(False)
        model(**batch)
        assert row_of(model).kernel_calls == 1, "nothing requires a gradient"

    def test_a_row_that_is_all_padding(self):
        """It gets the average over all positions, of which a bucket would have more."""
        model, batch = make_graphed(BASE), make_inputs(BASE)
        batch["attention_mask"][1] = 0
        close(infer(model, batch), ordinary(model, batch))
        assert row_of(model).fallback_calls["a row that is all padding, in a batch smaller than its bucket"] == 1
        ids = torch.randint(1, 61, (2, 16))
        batch = {"input_ids": ids, "attention_mask": torch.tensor([[1], [0]]).repeat(1, 16)}
        close(infer(model, batch), ordinary(model, batch))
        assert row_of(model).kernel_calls == 1

    def test_a_batch_of_padding_only(self):
        model = make_graphed(BASE, {"unpad": True})
        batch = make_inputs(BASE) | {"attention_mask": torch.zeros(2, 9), "lengths": Counted([0, 0])}
        close(infer(model, batch), ordinary(model, batch))
        assert row_of(model).fallback_calls["a batch of padding only"] == 1

    def test_a_cache(self):
        model, batch = make_graphed(CLM), make_inputs(CLM)
        assert infer(model, batch).past_key_values is not None
        assert list(row_of(model).fallback_calls) == ["a decoder's cache: pass use_cache=False"]
        close(infer(model, batch | {"use_cache": False}), ordinary(model, batch | {"use_cache": False}))
        assert row_of(model).kernel_calls == 1

    def test_modes_of_torch(self):
        from torch.utils.flop_counter import FlopCounterMode

        model, batch = make_graphed(), make_inputs()
        with FlopCounterMode(display=False):
            infer(model, batch)
        with torch.device("cpu"):
            infer(model, batch)
        assert row_of(model).fallback_calls == {"a torch dispatch or function mode is active": 1}
        assert row_of(model).kernel_calls == 1

    def test_errors_are_stocks(self):
        model = make_graphed()
        for batch in ({"input_ids": torch.full((1, 4), 61)}, {"input_ids": torch.ones(1, 25, dtype=torch.int64)}, {}):
            with pytest.raises(Exception) as stock:
                infer(make(CLASSIFICATION), batch)
            with pytest.raises(type(stock.value)):
                infer(model, batch)
        close(infer(model, make_inputs()), ordinary(model, make_inputs()))

    def test_a_forward_that_cannot_be_captured(self):
        model, batch = make_graphed(), make_inputs()
        model.bert.pooler.activation = Waiting().eval()
        expected = ordinary(model, batch)
        for _ in range(3):
            close(infer(model, batch), expected)
        reason = next(reason for reason in row_of(model).fallback_calls if reason.startswith("no graph: RuntimeError"))
        assert row_of(model).fallback_calls[reason] == 3

    def test_arguments_that_are_given_twice(self):
        model, batch = make_graphed(BASE), make_inputs(BASE)
        with torch.no_grad(), pytest.raises(TypeError, match="input_ids"):
            model(batch["input_ids"], **batch)

    def test_gradients_of_a_buffer(self):
        model, batch = make_graphed(BASE), make_inputs(BASE)
        model.requires_grad_(False)
        model.pooler.activation = nn.Tanh().eval()
        model.pooler.activation.register_buffer("scale", torch.ones(40, requires_grad=True))
        model.pooler.activation.register_forward_pre_hook(lambda module, inputs: (module.scale * inputs[0],))
        assert model(**batch).pooler_output.requires_grad

    def test_inside_another_call(self):
        """A module that calls the model again would overwrite the batch in the graph's inputs."""
        model, batch, inner = make_graphed(BASE), make_inputs(BASE), make_inputs(BASE, seed=5)

        class Recursive(nn.Tanh):
            def forward(self, x):
                if "busy" not in outer:
                    outer.append("busy")
                    model(**inner)
                    outer.remove("busy")
                return super().forward(x)

        outer = []
        model.pooler.activation = Recursive().eval()
        for _ in range(2):
            close(infer(model, batch), ordinary(model, batch))
        assert row_of(model).fallback_calls["inside another call of the model"]

    def test_reasons_are_bounded(self, monkeypatch):
        monkeypatch.setattr("fastbert.graphs.inference.MOST_REASONS", 4)
        model = make_graphed(BASE, buckets=[(1, 4)])
        for length in range(1, 12):
            infer(model, {"input_ids": torch.ones(1, length, dtype=torch.int64)})
        counted = row_of(model).fallback_calls
        assert len(counted) == 5 and counted["other reasons"] == 3

    @pytest.mark.parametrize("name", SETTINGS)
    def test_settings_of_torch(self, name):
        change, current, value = SETTINGS[name]
        model, batch, before = make_graphed(BASE), make_inputs(BASE), current()
        expected = infer(model, batch)
        change(value)
        try:
            close(infer(model, batch), expected)
        finally:
            change(before)
        infer(model, batch)
        assert len(graphs_of(model)) == 2 and row_of(model).kernel_calls == 3

    def test_without_a_gpu(self):
        model, batch = make_graphed(), make_inputs()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastbert.graphs.capture.RECORDERS", {})
            infer(model, batch)
        assert list(row_of(model).fallback_calls) == ["a model on cpu: graphs need an NVIDIA GPU"]


class Waiting(nn.Module):
    def forward(self, x):
        return x * float(x.sum().item() > -1e9)


class TestBuckets:
    def test_are_few(self, recorders):
        model = make_graphed(BASE)
        for length in range(1, 25):
            ids = torch.randint(1, 61, (1, length))
            close(infer(model, {"input_ids": ids}), ordinary(model, {"input_ids": ids}))
        assert len(graphs_of(model)) == 2  # of lengths 16 and 24
        assert sum(recorder.captures for recorder in recorders) == 2

    def test_least_recently_used_is_dropped(self):
        model = make_graphed(BASE, max_graphs=2, buckets=[(1, 8), (2, 8), (3, 8)])
        graphs, batches = graphs_of(model), [{"input_ids": torch.randint(1, 61, (rows, 8))} for rows in (1, 2, 3)]
        expected = [ordinary(model, batch) for batch in batches]
        for i in (0, 1, 0, 2, 2, 2, 0, 1):
            close(infer(model, batches[i]), expected[i])
        assert len(graphs) == 2
        assert graphs.fallbacks["a new shape, while all 2 graphs are in use"] == 2, (
            "the first request of a third, and of a second"
        )

    def test_memory_of_dropped_graphs_is_given_back(self):
        import gc
        import weakref

        model = make_graphed(BASE, max_graphs=1)
        batches = [{"input_ids": torch.randint(1, 61, (rows, 8))} for rows in (1, 2)]
        infer(model, batches[0])
        dropped = weakref.ref(next(iter(graphs_of(model)._captured.values())))
        infer(model, batches[1])
        infer(model, batches[1])
        gc.collect()
        assert dropped() is None and len(graphs_of(model)) == 1

    def test_a_model_with_graphs_is_not_kept_alive(self):
        import gc
        import weakref

        model = make_graphed()
        infer(model, make_inputs())
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None

    def test_no_bucket_exceeds_the_positions(self):
        ids = torch.randint(1, 61, (1, 10))
        model = make_graphed(BASE, buckets=[(1, 32), (2, 24)])  # 24 positions
        close(infer(model, {"input_ids": ids}), ordinary(model, {"input_ids": ids}))
        assert row_of(model).kernel_calls == 1
        model.embeddings.position_embeddings = nn.Embedding(20, 40).eval()
        fastbert.graphed(model)
        ids = torch.randint(1, 61, (1, 18))
        close(infer(model, {"input_ids": ids}), ordinary(model, {"input_ids": ids}))
        assert row_of(model).kernel_calls == 1

    def test_warmup(self):
        for kind in (CLASSIFICATION, BASE, BY_NAME["multiple-choice"]):
            model = make_graphed(kind)
            fastbert.warmup(model, [(1, 16), (2, 9)])
            before = len(graphs_of(model))
            shape = (1, 2, 16) if kind.rows[1:] else (1, 16)
            infer(model, {"input_ids": torch.randint(1, 61, shape)})
            assert len(graphs_of(model)) == before == 2
        with pytest.raises(RuntimeError, match=r"\(1, 30\) runs without a graph: 30 positions, of which the model has 24"):
            fastbert.warmup(model, [(1, 30)])


class TestPacking:
    def test_one_graph_serves_many_batches(self):
        model = make_graphed(CLASSIFICATION)
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(1, 61, (4, 16), generator=generator)
            lengths = torch.randint(9, 13, (4,), generator=generator)
            mask = (torch.arange(16) < lengths[:, None]).long()
            close(
                infer(model, {"input_ids": ids, "attention_mask": mask}),
                ordinary(model, {"input_ids": ids, "attention_mask": mask}),
            )
        assert len(graphs_of(model)) <= 2

    def test_the_callers_counts(self):
        model, batch = make_graphed(), make_inputs()
        counted = batch | {"lengths": Counted([9, 6])}
        close(infer(model, counted), ordinary(model, batch))
        with fastbert.lengths(model, [9, 6]):
            close(infer(model, batch), ordinary(model, batch))
        with fastbert.lengths(model, token_budget=17):
            close(infer(model, batch), ordinary(model, batch))
        assert row_of(model).kernel_calls == 3 and len(graphs_of(model)) == 2
        with pytest.raises(ValueError, match="lengths: expected 2 numbers from 0 to 9"):
            infer(model, batch | {"lengths": Counted([9, 10])})

    def test_waits_for_the_device_only_to_count(self, monkeypatch):
        counted = []
        from fastbert.graphs import inference

        count = inference.count_tokens
        monkeypatch.setattr(inference, "count_tokens", lambda mask: counted.append(1) or count(mask))
        model, batch = make_graphed(), make_inputs()
        infer(model, batch)
        assert len(counted) == 1
        infer(model, batch | {"attention_mask": None})
        infer(model, batch | {"lengths": Counted([9, 6])})
        whole = make_inputs(BASE, length=16)
        infer(make_graphed(BASE), whole)
        assert len(counted) == 1


class TestThreads:
    def test_take_turns(self):
        model = make_graphed(BASE)
        batches = [make_inputs(BASE, seed=seed, length=4 + seed % 5) for seed in range(16)]
        expected = [ordinary(model, batch) for batch in batches]
        start = threading.Barrier(4)

        def serve(i):
            if i < 4:
                start.wait()
            return infer(model, batches[i])

        with ThreadPoolExecutor(4) as pool:
            for found, wanted in zip(pool.map(serve, range(16)), expected, strict=True):
                close(found, wanted)
        assert row_of(model).kernel_calls == 16

    def test_a_capture_shows_in_no_other_call(self):
        """While one thread captures, another's ordinary call packs by its own batch."""
        model, small, large = make_graphed(), make_inputs(length=5), make_inputs(length=23)
        started, done = threading.Event(), threading.Event()

        class Slow(nn.Tanh):
            def forward(self, x):
                if threading.current_thread() is not threading.main_thread():
                    started.set()
                    done.wait()
                return super().forward(x)

        model.bert.pooler.activation = Slow().eval()
        expected = ordinary(model, large)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(infer, model, small)
            started.wait()
            try:
                close(ordinary(model, large), expected)
            finally:
                done.set()
            close(found.result(), ordinary(model, small))


CALLS = st.tuples(
    st.integers(1, 4),
    st.integers(1, 24),
    st.sampled_from(["none", "right", "holes"]),
    st.sampled_from(["", "write", "replace", "drop"]),
)


class TestFuzzed:
    @given(
        calls=st.lists(CALLS, min_size=2, max_size=6),
        unpad=st.sampled_from(["auto", True, False]),
        kind=st.sampled_from([BASE, CLASSIFICATION, MLM]),
        few=st.booleans(),
    )
    @settings(max_examples=15)
    def test_any_sequence_of_calls(self, calls, unpad, kind, few):
        with recording_graphs():
            model = make_graphed(kind, {"unpad": unpad}, max_graphs=2 if few else 64)
            for seed, (rows, length, mask, change) in enumerate(calls):
                generator = torch.Generator().manual_seed(seed)
                ids = torch.randint(1, 61, (rows, length), generator=generator)
                batch = {"input_ids": ids}
                if mask == "right":
                    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
                    batch["attention_mask"] = (torch.arange(length) < lengths).long()
                elif mask == "holes":
                    batch["attention_mask"] = torch.rand(rows, length, generator=generator).lt(0.6).long()
                body = model if kind is BASE else model.bert
                with torch.no_grad():
                    if change == "write":
                        body.encoder.layer[0].output.dense.weight.mul_(1.1)
                    elif change == "replace":
                        body.encoder.layer[1].output.dense.weight = nn.Parameter(
                            body.encoder.layer[0].output.dense.weight.clone()
                        )
                    elif change == "drop":
                        fastbert.graphed(model, max_graphs=2 if few else 64)
                close(infer(model, batch), ordinary(model, batch))
