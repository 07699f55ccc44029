"""The comparison of two lanes and what is shown of it, on invented records."""

from dataclasses import replace

import pytest
from rich.console import Console

from bench.core import schema
from bench.core.records import Environment, Spread
from bench.core.schema import ResultsError
from bench.train import report
from bench.train.compare import compare
from bench.train.records import DataRecord, Evaluation, LaneRecord, Settings, TrainResults

SETTINGS = Settings(task="mlm", data="text.txt", model="", steps=3)
STOCK = LaneRecord(
    lane="stock",
    attention="sdpa",
    optimizer="torch AdamW fused",
    losses=[3.0, 2.0, 1.0],
    evaluations=[Evaluation(2, 2.5)],
    final_eval_loss=2.25,
    metrics={"perplexity": 9.5},
    tokens=96,
    launches=0,
    resumed_at=0,
    stopped_early=False,
    checksums=[1, 2, 3],
)
FAST = replace(STOCK, lane="fastbert", launches=30)
SET = {"clocks": {}, "date": "2000-01-01", "pretended": False}
ENVIRONMENT = Environment(**dict.fromkeys(Environment.__annotations__) | SET)


def problems(fast, dropout=0.0, dtype="fp32"):
    return compare(replace(SETTINGS, dtype=dtype), dropout, STOCK, fast).problems


def test_the_greatest_difference():
    found = compare(SETTINGS, 0.0, STOCK, replace(FAST, losses=[3.0, 2.00005, 0.99999]))
    assert found.greatest == pytest.approx(5e-5) and found.greatest_step == 2
    assert found.problems == [] and found.tolerance == 1e-4 and found.judged_steps == 3


def test_what_fails():
    assert problems(FAST) == []
    assert problems(replace(FAST, losses=[3.0, 2.001, 1.0]))[0].startswith("step 2: the losses are further apart than 0.0001")
    assert problems(replace(FAST, losses=[3.0, 2.001, 1.0]), dtype="bf16") == []
    assert problems(replace(FAST, losses=[3.0, 2.5, 1.0]), dropout=0.1) == [], "dropout's noise is not judged"
    assert problems(replace(FAST, losses=[3.0, None, 1.0]), dropout=0.1) == ["step 2: only one lane's loss is finite"]
    assert problems(replace(FAST, launches=0), dropout=0.1) == ["no kernel of fastbert was launched in its lane"]
    assert problems(replace(FAST, checksums=[1, 2, 4]), dropout=0.1) == ["the lanes did not see the same batches"]
    nothing = replace(FAST, losses=[None] * 3)
    found = compare(SETTINGS, 0.0, replace(nothing, lane="stock"), nothing)
    assert found.problems == ["no step has a finite loss in both lanes"]


def test_a_resumed_lane_is_compared_where_both_have_batches():
    resumed = replace(FAST, resumed_at=2, checksums=[3])
    assert problems(resumed) == []
    assert problems(replace(resumed, checksums=[2])) == ["the lanes did not see the same batches"]
    assert problems(replace(FAST, resumed_at=3, checksums=[], launches=0)) == [], "nothing was left to launch"


def made(stock=STOCK, fast=FAST, dropout=0.0, gpu=None, **data):
    numbers = dict(train_rows=9, eval_rows=2, train_sequences=12, eval_sequences=3, limit=32, longest=90, cut=0.05, unknown=0.0)
    record = DataRecord(**numbers | {"limit_from": "the 95th percentile"} | data)
    strings = dict.fromkeys(("python", "torch", "transformers", "fastbert"), "0")
    environment = replace(ENVIRONMENT, gpu=gpu, **strings)
    comparison = compare(SETTINGS, dropout, stock, fast)
    return TrainResults(environment, SETTINGS, record, [stock, fast], comparison)


def shown(results):
    console = Console(width=120)
    with console.capture() as capture:
        report.show(results, console)
    return capture.get()


def test_without_a_time_nothing_looks_like_one():
    text = shown(made())
    assert text.count("not measured") == 3 * 2 + 1 and " ms" not in text and "tokens/s" in text
    assert "the curves must coincide: within 0.0001 x max(1, loss) in the first 3 steps" in text


def test_times_of_a_gpu():
    timed = {"seconds": Spread(0.009, 0.01, 0.011, 20), "tokens_per_second": 12345.6, "peak_bytes": 3 << 30}
    text = shown(made(replace(STOCK, **timed), replace(FAST, **timed), gpu="Invented GPU"))
    assert "not measured" not in text and "interpreter" not in text
    assert "12,346" in text and "10 ms [9, 11]" in text and "3.00 GiB" in text and "Invented GPU" in text


def test_of_several_ranks():
    of_ranks = {"ranks": 4, "imbalance": 1.0625}
    text = shown(made(replace(STOCK, **of_ranks), replace(FAST, **of_ranks)))
    assert "ranks" in text and "1.062 x the mean" in text and "ranks" not in shown(made())


def test_what_the_reader_has_to_know():
    assert "--dropout 0 makes them comparable" in shown(made(dropout=0.1))
    assert "failed: the lanes did not see the same batches" in shown(made(fast=replace(FAST, checksums=[0, 0, 0])))
    assert "5.0% are over the limit: they are split into pieces" in shown(made())
    assert "7.0% of the tokens are unknown to the model's vocabulary" in shown(made(unknown=0.07))
    assert "unknown" not in shown(made())


@pytest.mark.parametrize("steps", [3, 200])
def test_picture_and_file(steps, tmp_path):
    losses = [1 + 2 / (i + 1) for i in range(steps)]
    results = made(replace(STOCK, losses=losses), replace(FAST, losses=[*losses[:-1], None]), dropout=0.1)
    report.draw(results, tmp_path / "both.png")
    results.lanes.pop()
    results.comparison = None
    report.draw(results, tmp_path / "one.png")
    assert (tmp_path / "both.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 10_000
    schema.write(results, tmp_path / "results.json")
    assert report.read(tmp_path / "results.json") == results


@pytest.mark.parametrize(("text", "said"), [("{", "Expecting"), ('{"schema": 1}', "not results of"), ("[]", "not results of")])
def test_other_files_are_refused(text, said, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=said):
        report.read(path)
