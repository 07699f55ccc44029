"""`bench train --stream`: the same batches in both lanes, on one rank and two, and after an interruption."""

import json

import pytest
import torch

from bench.train import report
from bench.train.lanes import Watch
from tests.bench.stream.corpora import make_documents, write
from tests.bench.train.test_ranks import launched
from tests.bench.train.training import FILES, invoke, save_model, written
from tests.ranks import on_ranks

OPTIONS = ("--stream", "--readers", 4, "--batch", 8, "--max-length", 24, "--lr", 1e-2, "--dtype", "fp32", "--dropout", 0)
STEPS = ("--steps", 4, "--accumulation", 2, "--save-steps", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and shards."""
    folder = tmp_path_factory.mktemp("stream")
    torch.manual_seed(0)
    save_model(folder / "model")
    write(folder / "shards", make_documents(120), 12)
    return folder


def train(folder, out, *options, task="mlm", lanes=("stock",)):
    data = ("--task", task, "--data", folder / "shards", "--model", folder / "model", "--out", folder / out)
    return invoke(*data, *OPTIONS, *STEPS, *(word for lane in lanes for word in ("--lane", lane)), *options)


def stopped_at(step, *arguments, **options):
    """A run that is interrupted after a step."""
    ends = Watch.on_step_end

    def stop(self, args, state, control, **kwargs):
        ends(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "on_step_end", stop)
        return train(*arguments, **options)


def results(folder, out):
    return report.read(folder / out / report.RESULTS)


@pytest.fixture(scope="module")
def whole(place):
    """The only lane of an uninterrupted run."""
    code, text = train(place, "whole", "--whole-words")
    assert code == 0, text
    found = results(place, "whole")
    said = "11 shards to train on, 1 held back to evaluate; 4 readers, 48 tokens of each in a batch"
    assert found.data.stream == said and said in text
    (lane,) = found.lanes
    assert lane.tokens == pytest.approx(4 * 2 * 8 * 24, abs=4 * 12) and len(set(lane.checksums)) == 4
    return lane


def test_both_lanes_see_the_same_batches(place):
    write(place / "few", make_documents(2), 1)
    small = ("--readers", 2, "--batch", 4, "--steps", 2, "--accumulation", 1, "--eval-data", place / "few")
    code, text = train(place, "both", *small, lanes=("stock", "fastbert"))
    assert code == 0, text
    found = results(place, "both")
    stock, fast = found.lanes
    assert stock.checksums == fast.checksums and len(set(fast.checksums)) == 2 and fast.launches > 0
    assert found.comparison.problems == [] and fast.metrics == pytest.approx(stock.metrics, rel=1e-5)
    assert found.data.stream == "12 shards to train on; 2 readers, 48 tokens of each in a batch"
    assert found.data.stream in text and f"rows of up to 24 tokens (--max-length), {found.data.eval_rows} to evaluate" in text


def test_an_interrupted_run_goes_on_with_the_next_batch(place, whole):
    """With worker processes, which had more batches ready when it was interrupted."""
    code, text = stopped_at(3, place, "again", "--whole-words", "--workers", 2)
    assert code == 130, text
    state = json.loads((place / "again/stock/checkpoint-2/stream.json").read_text())
    assert state["batches"] == 4 and list(state["readers"]) == ["0", "1", "2", "3"]
    code, text = train(place, "again", "--whole-words", "--resume", "--workers", 1)
    assert code == 0, text
    (other,) = results(place, "again").lanes
    assert other.resumed_at == 2 and other.checksums == whole.checksums[2:] and other.losses == whole.losses
    assert (other.final_eval_loss, other.metrics) == (whole.final_eval_loss, whole.metrics)


def work_of_a_rank(rank, folder):
    done = {
        "pairs": train(folder, "two", "--workers", 1, task="pretraining"),
        "resumed": train(folder, "resumed", "--whole-words", "--resume"),
        "readers": train(folder, "readers", "--readers", 3),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(done))


def test_two_ranks_train_on_the_batches_of_one_and_resume_its_run(place, whole):
    assert stopped_at(3, place, "resumed", "--whole-words")[0] == 130
    on_ranks(2, work_of_a_rank, place)
    first, second = (json.loads((place / f"rank{rank}.json").read_text()) for rank in range(2))
    assert [first[name][0] for name in ("pairs", "resumed")] == [0, 0] and second["pairs"] == [0, ""], first
    code, text = train(place, "one", task="pretraining")
    assert code == 0, text
    for out, alone, start in (("two", results(place, "one").lanes[0], 0), ("resumed", whole, 2)):
        (shared,) = results(place, out).lanes
        assert shared.ranks == 2 and shared.imbalance < 1.2
        assert shared.checksums == alone.checksums[start:]
        assert shared.losses == pytest.approx(alone.losses, abs=5e-6)
        assert shared.final_eval_loss == pytest.approx(alone.final_eval_loss, abs=5e-6)
    assert (place / "two/stock/checkpoint-2/stream.json").read_text() == (
        place / "one/stock/checkpoint-2/stream.json"
    ).read_text()
    assert first["readers"][0] == 2 and "--readers: expected a multiple of the 2 ranks, got 3" in first["readers"][1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "classification"), "--stream: is for mlm and pretraining, not for classification"),
        (("--truncation", "head"), "--truncation: a stream cuts nothing but sentences"),
        (("--readers", 9), "--readers: expected at most the 8 rows of a batch over all ranks, got 9"),
        (("--workers", 5), "--workers: expected at most the 4 readers (--readers), got 5"),
        (("--max-length", 500), "--max-length: the model has 48 positions, got 500"),
        (("--data", "no-such-folder"), "--data: no-such-folder: no such file, folder or pattern"),
        (("--data", FILES["mlm"]), "--eval-data: expected with --stream of one shard"),
        (("--eval-data", "no-such-folder"), "--eval-data: no-such-folder: no such file, folder or pattern"),
    ],
)
def test_a_fault_is_one_line(options, said, place):
    code, text = train(place, "fault", *options)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0], text
    assert not (place / "fault").exists()


@pytest.mark.parametrize(("text", "said"), [("", "finds no text"), ("a\n", "finds no rows: expected two documents")])
def test_too_little_text_to_evaluate_with(text, said, place, tmp_path):
    data = ("--eval-data", written(tmp_path, text, "few.txt"))
    code, printed = train(place, "fault", *data, task="pretraining")
    assert code == 2 and f"error: --eval-data: reader 0 of 1 {said}" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--readers", 2), "--readers: share the shards of --stream"),
        (("--workers", 2), "--workers: share the readers of --stream"),
        (("--task", "clm", "--whole-words"), "--whole-words: is for mlm and pretraining, not for clm"),
    ],
)
def test_options_of_a_stream_alone(options, said, place):
    code, text = invoke("--task", "mlm", "--data", FILES["mlm"], "--model", place / "model", "--out", place / "fault", *options)
    assert code == 2 and f"error: {said}" in text


def test_a_checkpoint_without_its_place_in_the_stream_is_refused(place):
    assert stopped_at(3, place, "lost")[0] == 130
    (place / "lost/stock/checkpoint-2/stream.json").unlink()
    code, text = train(place, "lost", "--resume")
    assert code == 2 and "stream.json cannot be read" in text


@pytest.mark.long
def test_a_shard_that_one_rank_cannot_read_ends_all(place):
    """In the middle of training: the launcher ends the rank that waits for the other."""
    write(place / "bad", make_documents(120), 12)
    with (place / "bad/05.txt").open("ab") as shard:
        shard.write(b"\n\xff")
    data = ("--task", "mlm", "--data", place / "bad", "--model", place / "model", "--out", place / "bad-run", *OPTIONS)
    done = launched("torchrun", *data, "--lane", "stock", "--steps", 50)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: --data: {place}/bad/05.txt, row ") and (place / "bad-run/settings.json").exists()


def test_whole_words_without_a_stream(place):
    code, text = invoke(
        "--task",
        "mlm",
        "--data",
        FILES["mlm"],
        "--model",
        place / "model",
        "--out",
        place / "file",
        "--whole-words",
        "--steps",
        1,
        "--batch",
        2,
        "--lane",
        "stock",
    )
    assert code == 0, text
