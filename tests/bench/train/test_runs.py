"""`python -m bench train` from the file to the table and the picture, under every task; resuming, stopping, faults."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import DistilBertConfig, XLMRobertaConfig

import fastbert
from bench.runner.isolate import ROOT
from bench.train import lanes, report, run, tally
from bench.train.options import NEEDED
from fastbert.testing.rows import DEVICE
from tests.bench.train.training import FILES, invoke, save_model

STEPS = 2
SHORT = ("--batch", 2, "--max-length", 24, "--lr", 1e-2, "--dtype", "fp32")
METRICS = {
    "classification": {"accuracy", "macro F1"},
    "matching": {"accuracy", "macro F1"},
    "ner": {"entity F1", "token accuracy"},
    "qa": {"exact match", "F1"},
    "multiple-choice": {"accuracy"},
    "mlm": {"perplexity"},
    "pretraining": {"perplexity", "next-sentence accuracy"},
    "clm": {"perplexity"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(model, tmp_path):
    """Call the command for a task; returns exit code, output and, if it got that far, the results."""

    def call(task, *options, out="out"):
        folder = tmp_path / out
        arguments = ["--task", task, "--data", FILES[task], "--model", model, "--out", folder, *SHORT, *options]
        code, text = invoke(*arguments)
        path = folder / report.RESULTS
        return code, text, report.read(path) if path.exists() else None

    return call


DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
FAMILIES = {"xlm-roberta": (XLMRobertaConfig, None), "distilbert": (DistilBertConfig, DISTIL)}


@pytest.mark.parametrize("task", ["matching", "mlm"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_other_families(family, task, tmp_path):
    torch.manual_seed(0)
    model = save_model(tmp_path / "model", *family)
    options = ("--task", task, "--data", FILES[task], "--model", model, "--out", tmp_path / "out", "--steps", STEPS)
    code, text = invoke(*options, *SHORT, "--dropout", 0)
    assert code == 0, text
    stock, fast = report.read(tmp_path / "out" / report.RESULTS).lanes
    assert fast.attention == "fastbert over sdpa" and "fastbert" not in stock.attention


@pytest.mark.one_in(2)
@pytest.mark.parametrize("task", FILES)
def test_every_task(task, train, tmp_path, launches):
    code, text, results = train(task, "--steps", STEPS, "--dropout", 0)
    assert code == 0, text
    stock, fast = results.lanes
    assert stock.lane == "stock" and "fastbert" not in stock.attention and stock.optimizer.startswith("torch AdamW")
    assert fast.attention == "fastbert over sdpa" and fast.optimizer == "fastbert AdamW"
    counted = launches()
    assert stock.launches == 0 and fast.launches > counted["adamw_kernel"] == STEPS
    assert counted["attention_fwd_kernel"] == counted["attention_bwd_q_kernel"] + evaluations(results) > STEPS
    assert len(fast.losses) == STEPS and fast.losses[0] != fast.losses[1]
    assert results.comparison.greatest <= 1e-5 and results.comparison.judged_steps == STEPS
    assert stock.checksums == fast.checksums and len(set(fast.checksums)) == STEPS
    assert fast.metrics.keys() == METRICS[task] and fast.metrics == pytest.approx(stock.metrics, rel=1e-5)
    assert all(f"{name} " in text for name in METRICS[task])
    assert (tmp_path / "out/losses.png").read_bytes()[1:4] == b"PNG"
    if DEVICE.type == "cpu":
        assert "not measured" in text and fast.seconds is fast.tokens_per_second is fast.peak_bytes is None
    assert "length limit 24 tokens (--max-length)" in text


def evaluations(results):
    """Batches of the one evaluation at the end, each twice as large as one of training."""
    return -(-results.data.eval_sequences // 4)


def test_with_dropout_the_difference_is_noise_and_the_batches_are_the_same(train):
    code, text, results = train("mlm", "--steps", STEPS)
    assert code == 0, text
    stock, fast = results.lanes
    assert results.comparison.tolerance is None and results.comparison.greatest > 1e-5
    assert "each lane draws its own random bits" in text
    assert stock.checksums == fast.checksums and len(set(fast.checksums)) == STEPS


def test_a_wrong_optimizer_fails(train, monkeypatch):
    right = fastbert.trainer_optimizer

    def wrong(arguments):
        cls, numbers = right(arguments)
        return cls, numbers | {"betas": (0.9, 0.9), "eps": 1e-1}

    monkeypatch.setattr(fastbert, "trainer_optimizer", wrong)
    code, text, results = train("classification", "--steps", STEPS, "--dropout", 0, "--warmup", 0)
    assert code == 1 and "the losses are further apart than 0.0001 x max(1, loss)" in text
    assert results.comparison.problems[0].startswith("step ")


def test_a_lane_without_kernels_fails(train, monkeypatch):
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    monkeypatch.setattr(fastbert, "trainer_optimizer", lambda arguments: (torch.optim.AdamW, {"lr": arguments.learning_rate}))
    code, text, _ = train("classification", "--steps", 1, "--dropout", 0)
    assert code == 1 and "no kernel of fastbert was launched" in text


@pytest.mark.parametrize(
    ("lane", "batch", "accumulation"), [("stock", 2, 2), pytest.param("fastbert", 4, 1, marks=pytest.mark.long)]
)
def test_resumed_is_as_if_never_stopped(lane, batch, accumulation, train, monkeypatch, tmp_path):
    """In the middle of the second epoch, with dropout and masks: all that is drawn has to go on."""
    few = tmp_path / "few.txt"
    few.write_text("".join(FILES["mlm"].read_text().splitlines(keepends=True)[5:19]))
    options = ("--data", few, "--lane", lane, "--batch", batch, "--accumulation", accumulation)
    options += ("--steps", 4, "--save-steps", 3, "--eval-steps", 2)
    code, text, whole = train("mlm", *options, out="whole")
    assert code == 0, text
    assert 4 < whole.data.train_sequences <= 8, "an epoch is two steps, so the third ends in the middle of one"
    ends = lanes.Watch.on_step_end

    def stop(self, args, state, control, **kwargs):
        ends(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lanes.Watch, "on_step_end", stop)
        code, text, _ = train("mlm", *options)
    assert code == 130 and "--resume continues" in text
    assert not (tmp_path / "out" / report.RESULTS).exists()

    code, text, resumed = train("mlm", *options, "--resume")
    assert code == 0, text
    (one,), (other,) = whole.lanes, resumed.lanes
    assert other.resumed_at == 3 and len(other.losses) == len(set(other.losses)) == 4
    assert max(one.losses) < 7, "a step's loss is the mean of its batches"
    assert other.losses == one.losses and other.evaluations == one.evaluations
    assert (other.final_eval_loss, other.metrics) == (one.final_eval_loss, one.metrics)
    assert other.checksums == one.checksums[3:]

    code, text, again = train("mlm", *options, "--resume")  # nothing is left to do
    assert code == 0 and again.lanes == resumed.lanes
    code, text, _ = train("mlm", *options)
    assert code == 2 and "already holds a run" in text
    code, text, _ = train("mlm", *options, "--resume", "--seed", 3)
    assert code == 2 and "has seed 0, this one 3" in text
    settings = tmp_path / "out" / run.SETTINGS
    settings.write_text(settings.read_text().replace('"schema": 2', '"schema": 1'))
    code, text, _ = train("mlm", *options, "--resume")
    assert code == 2 and "was made by another version of this command" in text


def test_early_stopping(train):
    options = ("--lane", "stock", "--steps", 12, "--patience", 2, "--eval-steps", 1, "--lr", 1.0, "--warmup", 0)
    code, text, results = train("classification", *options)
    assert code == 0, text
    (stock,) = results.lanes
    assert stock.stopped_early and len(stock.losses) == len(stock.evaluations) < 12
    assert "(stopped early)" in text
    best = min(stock.evaluations, key=lambda evaluation: evaluation.loss)
    assert stock.evaluations[-1].step == best.step + 2 and stock.final_eval_loss == pytest.approx(best.loss)


def test_another_files_rows_to_evaluate_with(train, tmp_path):
    other = tmp_path / "other.tsv"
    other.write_text("A fine cake\tgood\nA burnt soup\tbad\nNo soup at all\tbad\n")
    code, text, results = train("classification", "--lane", "stock", "--steps", 1, "--eval-data", other)
    assert code == 0, text
    assert (results.data.train_rows, results.data.eval_rows) == (16, 3)
    other.write_text("A fine cake\tgood\nA burnt soup\tawful\n")
    code, text, _ = train("classification", "--steps", 1, "--eval-data", other, out="second")
    assert code == 2 and "row 2: the label 'awful' does not occur in training: bad, fair, good" in " ".join(text.split())


def test_the_limit_is_said(train, model, tmp_path):
    options = ("--lane", "stock", "--steps", 1, "--max-length", 0)
    code, text, results = train("classification", *options, "--truncation", "head+tail")
    assert code == 0, text
    data = results.data
    assert f"length limit {data.limit} tokens (the 95th percentile); the longest has {data.longest}" in text
    words = tmp_path / "words.tsv"
    words.write_text("".join(f"{' soup' * 60}\t{label}\n" for label in "abab"))
    code, text, results = train("classification", *options, "--data", words, out="long")
    assert code == 0 and results.data.limit == 48 and results.data.cut == 1.0
    assert f"length limit 48 tokens (the model's positions; the 95th percentile is {results.data.longest})" in text
    assert "100.0% are over the limit: their beginning is kept" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data", "none.tsv"), "--data: cannot read none.tsv"),
        (("--model", "./no/such"), "--model: there is no directory ./no/such"),
        (("--max-length", 5), "--max-length: expected 8 or more, got 5"),
        (("--max-length", 500), "--max-length: the model has 48 positions, got 500"),
        (("--truncation", "split"), "cuts the texts of mlm and clm"),
        (("--resume",), "--resume: there is no run in"),
        (("--patience", 1, "--eval-steps", 2, "--save-steps", 3), "--save-steps: with --patience, expected a multiple"),
    ],
)
def test_a_fault_is_one_line(options, said, train, tmp_path):
    code, text, _ = train("classification", "--steps", 4, *options)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0], text
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_one_label_is_nothing_to_learn(train, tmp_path):
    same = tmp_path / "same.tsv"
    same.write_text("one\ta\ntwo\ta\n")
    code, text, _ = train("classification", "--data", same)
    assert code == 2 and "has only one label, 'a'" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="only refused where there is no GPU")
def test_half_precision_needs_a_gpu(train):
    code, text, _ = train("mlm", "--dtype", "bf16")
    assert code == 2 and "--dtype bf16: needs a GPU" in text


def test_a_missing_package_is_one_line(train, monkeypatch):
    monkeypatch.setitem(NEEDED, "no_such_module", "no-such-package")
    code, text, _ = train("mlm")
    assert code == 2 and "error: not installed: no-such-package; to fix: pip install no-such-package" in text


def test_settings_can_be_read_beside_the_results(train, tmp_path):
    code, _, results = train("clm", "--lane", "stock", "--steps", 1, "--seed", 7)
    assert code == 0
    data = json.loads((tmp_path / "out/settings.json").read_text())
    assert data["seed"] == results.settings.seed == 7 and results.comparison is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself")
def test_the_readmes_command_runs_the_kernels_without_a_gpu(model, tmp_path):
    """In a process whose environment says nothing of the interpreter."""
    data = tmp_path / "reviews.tsv"
    data.write_text("Review\tSentiment\n" + FILES["classification"].read_text())
    command = [sys.executable, "-m", "bench", "train", "--task", "classification", "--data", data, "--model", model]
    command += ["--steps", "1", "--batch", "2", "--out", tmp_path / "out"]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "no NVIDIA GPU here: Triton's interpreter runs the kernels on the CPU, on small inputs; no times are taken"
    assert done.stderr.count(said) == 1
    assert report.read(tmp_path / "out" / report.RESULTS).lanes[1].launches > 0
    before = done.stdout.partition("14 rows to train on")[0].splitlines()
    assert before == [
        "--data: columns used: Review (text), Sentiment (label)",
        "--data: 16 rows, labels found: bad (7), fair (2), good (7)",
    ]


def test_what_was_read_is_said_in_80_columns(train, tmp_path):
    long = tmp_path / "many.tsv"
    long.write_text("".join(f"a text of {i}\ta label of number {i % 20}\n" for i in range(60)))
    code, text, _ = train("classification", "--lane", "stock", "--steps", 1, "--data", long)
    lines = text[text.index("--data") :].partition("rows to train on")[0].splitlines()[:-1]
    assert code == 0 and len(lines) > 5 and max(map(len, lines)) <= 80
    assert lines[0].startswith("--data: 60 rows, labels found: a label of number 0 (3), ")
    assert lines[-1] == "warning: 20 labels are many for 60 rows; are these the labels?"


def test_columns_are_for_files_that_have_some(train):
    code, text, _ = train("mlm", "--columns", "text=1")
    assert code == 2 and "--columns: a file for mlm has no columns; classification, matching, ner" in " ".join(text.split())


def test_the_command_line_leaves_the_interpreter_to_be_chosen():
    """triton reads TRITON_INTERPRET when it is first imported: that has to come after the command has set it."""
    command = [sys.executable, "-c", "import sys, bench.__main__; sys.exit('triton' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_gpu_gives_times(dtype, train):
    code, text, results = train("mlm", "--steps", 12, "--dropout", 0, "--dtype", dtype, "--lr", 1e-3)
    assert code == 0, text
    for lane in results.lanes:
        assert lane.seconds.rounds == 12 - tally.WARM_UP and lane.tokens_per_second > 0 and lane.peak_bytes > 0
    assert "not measured" not in text
