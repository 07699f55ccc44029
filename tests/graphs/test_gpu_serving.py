"""Serving from CUDA graphs on a GPU: pipelines, sentence embeddings, reranking, threads with streams, weights that change."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertForSequenceClassification, BertModel

import fastbert
from fastbert.testing.models import assert_equal, run
from fastbert.testing.rows import DEVICE
from tests.gpu import no_synchronisation
from tests.graphs import serving
from tests.graphs.serving import LINES, TASKS, assert_same, graphs_row, in_float64, n_graphs
from tests.models.test_gpu import LENGTH, wide
from tests.models.tiny import CLASSIFICATION, make_batch

pytestmark = pytest.mark.gpu


def assert_served(model, calls, ordinary=None):
    row = graphs_row(model)
    assert row.kernel_calls == calls and row.fallback_calls == (ordinary or {}), row


def inferred(model, batch):
    with torch.inference_mode():
        return run(model, batch, backward=False)


def assert_graphs_give_stocks(served, stock, exact, batch):
    assert_equal(*(inferred(model, batch) for model in (served, stock, exact)))


@pytest.mark.parametrize("task", TASKS)
def test_pipeline(task):
    model, shapes = serving.check_pipeline(task)
    assert_served(model, len(shapes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("unpad", [False, True])
def test_sentence_transformer(unpad, dtype):
    model = serving.sentence_transformer().to(dtype)
    exact = in_float64(model)
    keywords = {"batch_size": 4, "normalize_embeddings": True, "convert_to_tensor": True}
    stock, reference = (one.encode(LINES, **keywords) for one in (model, exact))
    fastbert.patch(model, unpad=unpad, cuda_graphs=True)
    for _ in range(2):
        assert_same(model.encode(LINES, **keywords), stock, reference)
    assert_served(model, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cross_encoder(dtype):
    model = serving.cross_encoder().to(dtype)
    exact = in_float64(model)
    pairs = [(LINES[0], line) for line in LINES[1:]]
    keywords = {"batch_size": 2, "convert_to_tensor": True}
    stock, reference = (one.predict(pairs, **keywords) for one in (model, exact))
    fastbert.patch(model, cuda_graphs=True)
    for _ in range(2):
        assert_same(model.predict(pairs, **keywords), stock, reference)
    assert {found["corpus_id"] for found in model.rank(LINES[0], LINES[1:])} == set(range(5))
    assert_served(model, 7)


def test_threads_with_streams_of_their_own():
    """Each request is copied to the GPU, computed and read back on its thread's stream; some are ordinary calls.

    The first of every shape is captured while other threads go on.
    """
    stock = wide(CLASSIFICATION, torch.bfloat16)
    served, exact = fastbert.patch(copy.deepcopy(stock), cuda_graphs=True), copy.deepcopy(stock).double()
    lengths = (12, 20, 28, 40, 56, 80, 110, LENGTH)
    requests = [
        [make_batch(CLASSIFICATION, labels=i == 3, seed=10 * n + i, length=length) for i in range(6)]
        for n, length in enumerate(lengths)
    ]
    expected = [[[inferred(model, batch) for batch in own] for model in (stock, exact)] for own in requests]
    on_host = [[{name: x.cpu().pin_memory() for name, x in batch.items()} for batch in own] for own in requests]

    def serve(n):
        answers = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for batch in on_host[n] * 3:
                given = {name: x.to(DEVICE, non_blocking=True) for name, x in batch.items()}
                with torch.inference_mode():
                    output = served(**given)
                answers.append({name: x.cpu() for name, x in output.items()})
        return answers

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(lengths)) as pool:
        served_to = list(pool.map(serve, range(len(lengths)), timeout=300))
    for answers, (from_stock, from_exact) in zip(served_to, expected, strict=True):
        for answer, eager, true in zip(answers, from_stock * 3, from_exact * 3, strict=True):
            assert_equal(answer, *({name: x.cpu() for name, x in found.items()} for found in (eager, true)))
    assert_served(served, 8 * 15, {"labels was given": 8 * 3})


def test_counted_batches_are_served_without_a_wait():
    stock = wide(CLASSIFICATION, torch.bfloat16)
    served, exact = fastbert.patch(copy.deepcopy(stock), cuda_graphs=True), copy.deepcopy(stock).double()
    batches = [make_batch(CLASSIFICATION, labels=False, seed=seed, length=(40, 100)[seed % 2]) for seed in range(4)]
    counted = [fastbert.LengthsCollator(lambda _, batch=batch: dict(batch))([]) for batch in batches]
    for batch in counted:
        inferred(served, batch)
    with no_synchronisation(), torch.inference_mode():
        answers = [served(**batch) for batch in counted]
    for answer, batch in zip(answers, batches, strict=True):
        assert_equal(dict(answer), inferred(stock, batch), inferred(exact, batch))
    assert_served(served, 8)


def test_a_model_that_is_trained_loaded_and_moved_between_servings():
    stock = wide(CLASSIFICATION)
    served = fastbert.patch(copy.deepcopy(stock), cuda_graphs=True)
    optimizer = fastbert.AdamW(served.parameters(), lr=0.01)
    training, batch = make_batch(CLASSIFICATION, length=LENGTH), make_batch(CLASSIFICATION, labels=False, length=70)

    def check():
        stock.load_state_dict(served.state_dict())
        assert_graphs_give_stocks(served, stock, copy.deepcopy(stock).double(), batch)

    check()
    for _ in range(2):
        served.train()
        served(**training).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        served.eval()
        check()
    assert n_graphs(served) == 1
    served.load_state_dict(wide(CLASSIFICATION, seed=3).state_dict())
    check()
    served.cpu().to(DEVICE)
    check()
    served.bfloat16()
    stock.bfloat16()
    check()
    assert_served(served, 6, {"train mode": 2})


def test_lora_merged_and_unmerged():
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "dense"], init_lora_weights=False)
    torch.manual_seed(0)
    stock = get_peft_model(wide(CLASSIFICATION), lora).eval()
    served, exact = fastbert.patch(copy.deepcopy(stock), cuda_graphs=True), in_float64(stock)
    batch = make_batch(CLASSIFICATION, labels=False, length=70)
    for change in (None, "merge_adapter", "unmerge_adapter", "disable_adapter_layers"):
        for model in (served, stock, exact) if change else ():
            getattr(model.base_model, change)()
        assert_graphs_give_stocks(served, stock, exact, batch)
    assert_served(served, 4)


def test_memory_is_that_of_the_largest_graph_and_of_all_outputs():
    model = fastbert.patch(serving.trained(BertModel, layers=6).bfloat16(), cuda_graphs=True)
    shapes = [(32, 512), (16, 512), (16, 256), (8, 256), (8, 128)]
    torch.cuda.synchronize()
    before, used = torch.cuda.memory_reserved(), []
    for shape in shapes:
        fastbert.warmup(model, [shape])
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_reserved() - before)
    assert n_graphs(model) == len(shapes) and used[-1] < 1.5 * used[0], used


def test_beside_torch_compile():
    model = serving.trained(BertForSequenceClassification).bfloat16()
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    served = fastbert.patch(model, cuda_graphs=True)
    batch = make_batch(CLASSIFICATION, labels=False, length=48)
    torch._dynamo.reset()
    compiled = torch.compile(served)
    for _ in range(2):
        assert_graphs_give_stocks(served, stock, exact, batch)
        with torch.inference_mode():
            assert_equal(dict(compiled(**batch)), inferred(stock, batch), inferred(exact, batch))
    assert_served(served, 2)
