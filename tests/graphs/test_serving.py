"""A model with graphs behind the interfaces that people serve with: the answers are stock's, and graphs gave them."""

import copy
import io
import json
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import fastbert
from fastbert.graphs import inference
from fastbert.layers.encoder import PackingEncoder
from fastbert.testing.models import assert_equal, run
from fastbert.testing.rows import DEVICE
from tests.graphs import serving
from tests.graphs.serving import LINES, TASKS, assert_same, forwards, graphs_row, in_float64, numbers
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, MLM, make, make_batch

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="graphs recorded on the CPU; test_gpu_serving.py has CUDA graphs"),
    pytest.mark.usefixtures("recorders"),
]


def captures(recorders):
    return sum(recorder.captures for recorder in recorders)


def assert_served(model, calls, ordinary=None):
    """So many calls came from graphs, and these ran the ordinary way, by reason."""
    row = graphs_row(model)
    assert row.state == "active" and row.kernel_calls == calls, row
    assert row.fallback_calls == (ordinary or {}), row


def batch_of(kind=CLASSIFICATION, **keywords):
    return make_batch(kind, labels=False, **keywords)


class Three:
    """A graphed model beside the same stock and in float64."""

    def __init__(self, model, **options):
        self.stock, self.exact = copy.deepcopy(model), in_float64(model)
        self.served = fastbert.graphed(fastbert.patch(model), **options)

    def __iter__(self):
        return iter((self.served, self.stock, self.exact))

    def check(self, batch, **settings):
        with torch.inference_mode():
            assert_equal(*(run(model, batch | settings, backward=False) for model in self))


@pytest.mark.parametrize("task", TASKS)
def test_pipeline(task):
    model, shapes = serving.check_pipeline(task)
    assert {rows for rows, _ in shapes} == {1, 4}
    assert_served(model, len(shapes))
    assert type(model).__name__ == TASKS[task][0].__name__


def test_numbers_are_compared():
    assert numbers([{"score": 0.25, "label": "b"}, {"score": 0.5, "label": "a"}]).tolist() == [0.5, 0.25]
    assert len(numbers([[[0.0, 1.0], [2.0, 3.0]]])) == 4 and len(LINES) == 6
    with pytest.raises(AssertionError):
        assert_same([0.0, 1.0, 2.0, 3.001], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize("unpad", [False, True])
def test_sentence_transformer(unpad, recorders):
    model = serving.sentence_transformer(6 if unpad else 2)
    exact = in_float64(model)
    tensors = {"convert_to_tensor": True}
    for keywords in ({"batch_size": 4} | tensors, {"batch_size": 1, "normalize_embeddings": True}):
        stock, reference = (one.encode(LINES, **keywords) for one in (fastbert.unpatch(model), exact))
        fastbert.patch(model, unpad=unpad, cuda_graphs=True)
        with forwards() as shapes:
            for _ in range(2):
                before = captures(recorders)
                answer = model.encode(LINES, **keywords)
                assert type(answer) is type(stock)
                assert_same(answer, stock, reference)
            assert captures(recorders) == before, "the second time nothing is captured"
        assert len(shapes) == 2 * (2 if keywords["batch_size"] == 4 else len(LINES))
        assert_served(model, len(shapes))
    one = model.encode(LINES[0])
    assert one.shape == answer[0].shape and graphs_row(model).module.startswith("0.")


def test_cross_encoder():
    model = serving.cross_encoder()
    pairs = [(LINES[0], line) for line in LINES[1:]]
    exact = in_float64(model)
    stock, reference = (one.predict(pairs, batch_size=2) for one in (model, exact))
    ranks = model.rank(LINES[0], LINES[1:])
    fastbert.patch(model, cuda_graphs=True)
    with forwards() as shapes:
        assert_same(model.predict(pairs, batch_size=2), stock, reference)
        assert_same(model.predict(pairs, batch_size=32), stock, reference)
        assert [found["corpus_id"] for found in model.rank(LINES[0], LINES[1:])] == [found["corpus_id"] for found in ranks]
    assert_served(model, len(shapes))
    assert len(shapes) == 5


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_loop(kind, mode):
    """Answers are the caller's: they stay as they are, and are of the kind that stock's are."""
    three = Three(make(kind))
    arguments = {"use_cache": False} if kind.name == "clm" else {}
    batches = [batch_of(kind, seed=seed, length=length) | arguments for seed, length in enumerate((9, 5, 12, 9))]
    kept = []
    with mode():
        for batch in DataLoader(batches, batch_size=None):
            kept.append([model(**batch) for model in three])
        for served, stock, exact in kept:
            assert_equal(served, stock, exact)
            assert type(served) is type(stock) and served.keys() == stock.keys()
            assert all(served[name].is_inference() == stock[name].is_inference() for name in stock)
            assert all(served[name].stride() == stock[name].stride() for name in stock)
    assert_served(three.served, len(batches))


def test_trainer_predicts(tmp_path):
    three = Three(make(CLASSIFICATION))
    rows = [{name: x[row] for name, x in batch_of(seed=seed).items()} for seed in range(3) for row in range(2)]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=4)
    answers = [Trainer(model=model, args=arguments).predict(rows).predictions for model in three]
    assert_same(*answers)
    assert_served(three.served, 2)


LENGTHS = (5, 9, 12, 14, 20, 23)


def test_threads_as_in_a_web_server(recorders):
    """Requests of all lengths, some with labels, from eight threads."""
    three = Three(make(CLASSIFICATION))
    requests = [make_batch(CLASSIFICATION, labels=n % 4 == 0, seed=n, length=LENGTHS[n % 6]) for n in range(12)]
    with torch.inference_mode():
        expected = [[run(model, request, backward=False) for request in requests] for model in (three.stock, three.exact)]
    start, calls = threading.Barrier(8), Counter()

    def serve(worker):
        start.wait()
        answers = {}
        for n in ((worker * 5 + i * 7) % 12 for i in range(6)):
            with torch.inference_mode():
                answers[n] = run(three.served, requests[n], backward=False)
        return answers

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(serve, range(8), timeout=300):
            for n, answer in answers.items():
                calls[n % 4 == 0] += 1
                assert_equal(answer, *(found[n] for found in expected))
    assert_served(three.served, calls[False], {"labels was given": calls[True]})
    assert captures(recorders) <= 6


def test_an_ordinary_call_while_another_thread_captures():
    """What the capture asks of the encoder does not reach the other call."""
    three = Three(make(CLASSIFICATION))
    labelled = make_batch(CLASSIFICATION, length=20)
    began, capturing = threading.Event(), threading.Event()
    packing, answers = PackingEncoder._packing, []

    def in_turns(encoder, *arguments):
        if threading.current_thread() is caller:
            began.set()
            assert capturing.wait(60)
        elif not capturing.is_set():
            capturing.set()
            caller.join(60)
        return packing(encoder, *arguments)

    def call():
        with torch.inference_mode():
            answers.append(run(three.served, labelled, backward=False))

    caller = threading.Thread(target=call)
    with mock.patch.object(PackingEncoder, "_packing", in_turns):
        caller.start()
        assert began.wait(60)
        with torch.inference_mode():
            served = run(three.served, batch_of(mask="one token"), backward=False)
    with torch.inference_mode():
        assert_equal(served, *(run(model, batch_of(mask="one token"), backward=False) for model in (three.stock, three.exact)))
        assert_equal(*answers, *(run(model, labelled, backward=False) for model in (three.stock, three.exact)))
    assert_served(three.served, 1, {"labels was given": 1})


def step(model, batch, optimizer):
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def test_fine_tuned_between_servings(recorders):
    """New values of the weights are seen, without a new capture, by the graph of each shape."""
    three, batch = Three(make(CLASSIFICATION)), make_batch(CLASSIFICATION)
    optimizer = fastbert.AdamW(three.served.parameters(), lr=0.01)
    long = batch_of(length=20)
    answers = []
    for _ in range(3):
        three.check(long)
        with torch.no_grad():
            answers.append(three.served(**long).logits)
        step(three.served, batch, optimizer)
        for other in (three.stock, three.exact):
            other.load_state_dict(three.served.state_dict())
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    assert captures(recorders) == 1
    assert_served(three.served, 6, {"train mode": 3})


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_while_serving(assign, recorders):
    three, batch = Three(make(CLASSIFICATION)), batch_of()
    for seed in (0, 1, 2):
        weights = make(CLASSIFICATION, seed=seed).state_dict()
        for model in three:
            dtype = next(model.parameters()).dtype
            model.load_state_dict({name: x.clone().to(dtype) for name, x in weights.items()}, assign=assign)
        three.check(batch)
    assert captures(recorders) == (3 if assign else 1)
    assert_served(three.served, 3)


def test_another_dtype_and_other_memory(recorders):
    three, batch = Three(make(CLASSIFICATION)), batch_of()
    for change in (lambda model: model.half(), lambda model: model.float(), lambda model: model._apply(torch.clone)):
        three.check(batch)
        weights = {name: x.clone() for name, x in three.served.state_dict().items()}
        for model in (three.served, three.stock):
            change(model).load_state_dict(weights)
    three.exact = in_float64(three.stock)
    three.check(batch)
    assert_served(three.served, 4)


def test_changes_from_call_to_call_end_capturing_until_the_model_rests(recorders):
    three, batch = Three(make(CLASSIFICATION)), batch_of()
    with torch.no_grad(), mock.patch.object(inference, "STEADY", 5):
        for _ in range(inference.RESTLESS + 1):
            three.served(**batch)
            three.served.classifier.weight = torch.nn.Parameter(three.served.classifier.weight.clone())
        assert captures(recorders) == inference.RESTLESS
        three.check(batch)
        reason = "weights or modules change from call to call"
        assert_served(three.served, inference.RESTLESS, {reason: 2})
        for _ in range(5):
            three.check(batch)
        assert_served(three.served, inference.RESTLESS + 2, {reason: 5})


@pytest.mark.parametrize("order", ["patched after", "patched before"])
def test_lora(order, monkeypatch):
    """Adapters that are merged, taken apart, scaled, switched off, exchanged: lists and dictionaries on modules change."""
    monkeypatch.setattr(inference, "CALM", 2)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "dense"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(make(CLASSIFICATION), lora)
    adapted.add_adapter("other", lora)
    model = copy.deepcopy(adapted).eval()
    if order == "patched before":
        model = get_peft_model(fastbert.patch(make(CLASSIFICATION), cuda_graphs=True), lora).eval()
        model.add_adapter("other", lora)
        model.eval().load_state_dict(adapted.state_dict())
        three = Three(adapted.eval())
        three.served = model
    else:
        three = Three(model)
    batch = batch_of()

    def scale(model):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("other", 3.0)

    changes = (
        lambda model: model.base_model.merge_adapter(),
        lambda model: model.base_model.unmerge_adapter(),
        lambda model: model.set_adapter("other"),
        scale,
        lambda model: model.base_model.disable_adapter_layers(),
    )
    answers = []
    for change in (None, *changes):
        if change is not None:
            for each in three:
                change(each)
        for _ in range(inference.CALM):
            three.check(batch)
        with torch.inference_mode():
            answers.append(three.served(**batch).logits)
    assert_served(three.served, 6 * (inference.CALM + 1))
    apart = [(a - b).abs().max() > 1e-3 for a, b in zip(answers, answers[1:], strict=False)]
    assert apart == [False, False, True, True, True]
    merged = [each.merge_and_unload() for each in three]
    three.served, three.stock, three.exact = merged
    three.check(batch)
    assert graphs_row(three.served).kernel_calls == 6 * (inference.CALM + 1) + 1


@pytest.mark.parametrize("kind", [CLASSIFICATION, MLM], ids=str)
def test_beside_torch_compile(kind):
    """A compiled call is traced as without graphs; the same model goes on replaying outside it."""
    three, batch, traced = Three(make(kind)), batch_of(kind), []

    def backend(module, inputs):
        traced.append(1)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(three.served, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            three.check(batch)
            assert_equal(compiled(**batch), three.stock(**batch), three.exact(**batch))
    torch._dynamo.reset()
    assert len(traced) == 1, "replays between the calls make no difference"
    assert_served(three.served, 3)


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model, folder):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [pickled, saved_whole, lambda model, folder: copy.deepcopy(model)])
def test_a_copy_has_graphs_of_its_own(again, tmp_path, recorders):
    three, batch = Three(make(CLASSIFICATION), buckets=[(2, 16)], max_graphs=3, reuse_outputs=True), batch_of()
    three.check(batch)
    original, three.served = three.served, again(three.served, tmp_path)
    with torch.no_grad():
        three.served.classifier.bias.add_(1.0)
        assert (original(**batch).logits - three.stock(**batch).logits).abs().max() < 0.5
        three.stock.classifier.bias.add_(1.0)
        three.exact.classifier.bias.add_(1.0)
    three.check(batch)
    assert captures(recorders) == 2
    assert_served(three.served, 1)
    options = three.served._fastbert_graphs.options
    assert options == original._fastbert_graphs.options and options.max_graphs == 3


def test_saved_and_loaded(tmp_path):
    three, batch = Three(make(CLASSIFICATION)), batch_of()
    three.check(batch)
    three.served.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(three.stock) and loaded.state_dict().keys() == three.served.state_dict().keys()
    three.served, served = loaded, three.served
    three.check(batch)
    three.served = served
    fastbert.unpatch(three.served)
    assert type(three.served) is type(three.stock) and vars(three.served).keys() == vars(three.stock).keys()


def test_warmed_up_at_the_start(recorders):
    three = Three(make(BASE))
    fastbert.warmup(three.served, [(1, 16), (1, 24), (2, 16), (2, 24)])
    before = captures(recorders)
    for length in range(5, 25):
        three.check(batch_of(BASE, length=length))
    assert captures(recorders) == before == 4
    assert_served(three.served, 4 + 20)
