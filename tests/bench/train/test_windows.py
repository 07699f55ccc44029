"""`python -m bench train --windows`: all windows of a batch in one forward, the gradient through the pooling, both lanes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import fastbert.windows
from bench.train import data, report
from bench.train.model import load, open_source
from bench.train.records import POOLINGS, WINDOWS, Settings
from bench.train.tasks import label_names
from tests.bench.train.training import FILES, invoke, save_model

SIZE, STRIDE = 16, 4
OPTIONS = ("--max-length", SIZE, "--lr", 1e-2, "--dtype", "fp32", "--dropout", 0, "--warmup", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(model, tmp_path):
    def call(task, *options, out="out"):
        folder = tmp_path / out
        code, text = invoke("--task", task, "--data", FILES[task], "--model", model, "--out", folder, *OPTIONS, *options)
        path = folder / report.RESULTS
        return SimpleNamespace(code=code, text=text, results=report.read(path) if path.exists() else None)

    return call


@pytest.fixture
def rows_of_forwards(monkeypatch):
    """The shapes that `Windows.run` gives the model."""
    seen, run = [], fastbert.Windows.run

    def noting(self, model, batch, **options):
        seen.append(tuple(batch["input_ids"].shape))
        return run(self, model, batch, **options)

    monkeypatch.setattr(fastbert.Windows, "run", noting)
    return seen


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", ("--windows", "overlap", "--pooling", "max", "--max-windows", 2)),
        ("classification", ("--windows", "head+tail")),
        ("matching", ("--windows", "overlap", "--max-length", 18, "--stride", 0, "--pooling", "token-mean")),
        pytest.param("matching", ("--windows", "tail", "--max-length", 18), marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(map(str, value[1:])),
)
def test_both_lanes_coincide(task, options, train, rows_of_forwards, launches):
    done = train(task, "--steps", 2, "--batch", 3, *options)
    assert done.code == 0, done.text
    stock, fast = done.results.lanes
    assert done.results.comparison.greatest <= 1e-5 and done.results.comparison.judged_steps == 2
    assert fast.losses[0] != fast.losses[1] and stock.checksums == fast.checksums
    assert stock.launches == 0 and fast.launches > launches()["adamw_kernel"] == 2
    assert fast.metrics == pytest.approx(stock.metrics, rel=1e-5) and "accuracy" in fast.metrics
    data, several = done.results.data, "overlap" in options
    assert (data.train_sequences > data.train_rows) == several
    assert data.windows.startswith(f"{options[1]}: ") and f"windows: {data.windows}" in " ".join(done.text.split())
    if "--pooling" in options:
        assert data.windows.endswith(f"pooling of their logits: {options[options.index('--pooling') + 1]}")
    assert any(rows > 3 for rows, _ in rows_of_forwards[:2]) == several
    assert all(length <= data.limit for _, length in rows_of_forwards)


def by_hand(model, tokenizer, rows, labels):
    """The mean loss of the rows, a text at a time and a window at a time."""
    losses = []
    for row in rows:
        ids, logits = tokenizer(row["text"], add_special_tokens=False)["input_ids"], []
        for start in range(0, max(len(ids) - STRIDE, 1), SIZE - 2 - STRIDE):
            window = [tokenizer.cls_token_id, *ids[start : start + SIZE - 2], tokenizer.sep_token_id]
            logits.append(model(input_ids=torch.tensor([window])).logits[0])
        target = torch.tensor([labels.index(row["label"])])
        losses.append(torch.nn.functional.cross_entropy(torch.stack(logits).mean(0, keepdim=True), target))
    return torch.stack(losses).mean()


def test_the_losses_are_those_of_a_loop(train, model):
    """Two steps of plain gradient descent over all rows: the second loss shows the first one's gradient."""
    rows = data.read("classification", FILES["classification"])
    labels = label_names(rows)
    settings = Settings("classification", str(FILES["classification"]), str(model), steps=2, dropout=0.0)
    start = load(open_source(str(model)), settings, labels).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = []
    optimizer = torch.optim.AdamW(start.parameters(), lr=1e-2, weight_decay=0.0)
    for share in (1.0, 0.5):  # the rate falls linearly to 0
        loss = by_hand(start, tokenizer, rows, labels)
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(start.parameters(), 1.0)  # as Trainer does
        optimizer.param_groups[0]["lr"] = 1e-2 * share
        optimizer.step()
        optimizer.zero_grad()
    whole = ("--eval-data", FILES["classification"], "--batch", len(rows), "--weight-decay", 0)
    done = train("classification", "--windows", "overlap", "--stride", STRIDE, "--steps", 2, *whole)
    assert done.code == 0, done.text
    for lane in done.results.lanes:
        assert lane.losses == pytest.approx(expected, abs=1e-5)
        assert lane.final_eval_loss == pytest.approx(by_hand(start, tokenizer, rows, labels).item(), abs=1e-4)


def test_the_size_of_a_window(train):
    done = train("classification", "--windows", "overlap", "--steps", 1, "--lane", "stock", "--max-length", 0)
    assert done.code == 0, done.text
    data = done.results.data
    assert (data.limit, data.limit_from) == (48, "a window of the model's positions")
    assert data.windows == "overlap: windows of 48 tokens that share 12; pooling of their logits: mean"


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("classification", ("--stride", 0), "--stride: is about the windows that --windows overlap makes"),
        ("classification", ("--pooling", "max"), "--pooling: is about the windows"),
        ("classification", ("--windows", "head", "--max-windows", 2), "--max-windows: is about the windows"),
        ("ner", ("--windows", "overlap"), "--windows: reads the texts of classification and matching, not those of ner"),
        ("matching", ("--windows", "tail", "--truncation", "head"), "--truncation: with --windows nothing else is cut"),
        ("classification", ("--windows", "overlap", "--stride", 14), "--stride: expected fewer than the 14 tokens of a window"),
        (
            "matching",
            ("--windows", "overlap", "--stride", 11),
            "--data: expected first texts that leave 12 or more tokens of a window of 16",
        ),
    ],
)
def test_a_fault_is_one_line(task, options, said, train, tmp_path):
    done = train(task, "--steps", 1, *options)
    lines = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(lines) == 1 and said in lines[0], done.text
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_the_command_knows_every_way():
    assert (WINDOWS, POOLINGS) == (fastbert.windows.HOW, fastbert.windows.POOLINGS)
