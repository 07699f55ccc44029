"""What --resume reads may be damaged or hostile: one line and exit code 2, and no code in a checkpoint runs."""

import json
import shutil

import pytest

from bench.__main__ import app
from bench.train.lanes import RECORD
from bench.train.run import SETTINGS
from tests.bench.train.training import FILES, invoke
from tests.trust.hostile import changed, pickled, refused

CHECKPOINT, STATE = "stock/checkpoint-1", "trainer_state.json"


@pytest.fixture(scope="module")
def arguments(saved_once):
    run = ("--task", "classification", "--data", FILES["classification"], "--model", saved_once, "--lane", "stock")
    return (*run, "--steps", 2, "--save-steps", 1, "--batch", 2, "--max-length", 24)


@pytest.fixture(scope="module")
def stopped_once(arguments, tmp_path_factory):
    """A run of two steps as it is between its first checkpoint and its end."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    code, text = invoke(*arguments, "--out", out)
    assert code == 0, text
    shutil.rmtree(out / "stock/checkpoint-2")
    (out / "stock" / RECORD).rename(out / RECORD)
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "out")


def resumed(arguments, out):
    return refused(app, "train", *arguments, "--out", out, "--resume")


def test_the_run_can_be_resumed(arguments, stopped):
    code, text = invoke(*arguments, "--out", stopped, "--resume")
    assert code == 0, text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_that_would_run_code(name, arguments, stopped, tmp_path):
    (stopped / CHECKPOINT / name).write_bytes(pickled(tmp_path / "marker"))
    line = resumed(arguments, stopped)
    assert "a file in it is damaged, or would run code, which is not done" in line and "checkpoint-1" in line
    assert not (tmp_path / "marker").exists()


def test_weights_in_a_pickle(arguments, stopped, tmp_path):
    (stopped / CHECKPOINT / "model.safetensors").unlink()
    (stopped / CHECKPOINT / "pytorch_model.bin").write_bytes(pickled(tmp_path / "marker"))
    assert "checkpoint-1 cannot be loaded" in resumed(arguments, stopped)
    assert not (tmp_path / "marker").exists()


def test_training_arguments_are_not_loaded(arguments, stopped, tmp_path):
    (stopped / CHECKPOINT / "training_args.bin").write_bytes(pickled(tmp_path / "marker"))
    code, text = invoke(*arguments, "--out", stopped, "--resume")
    assert code == 0 and not (tmp_path / "marker").exists(), text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("content", [b"", b"\x80"], ids=repr)
def test_damaged_tensors(name, content, arguments, stopped):
    (stopped / CHECKPOINT / name).write_bytes(content)
    assert "checkpoint-1 cannot be loaded" in resumed(arguments, stopped)


NOT_OBJECTS = [b"", b"[]", b"null", b"7", b'"schema"', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:9]))
@pytest.mark.parametrize("name", [SETTINGS, f"stock/{RECORD}", f"{CHECKPOINT}/{STATE}"])
def test_a_file_that_is_no_object(name, content, arguments, stopped):
    (stopped / name).write_bytes(content)
    line = resumed(arguments, stopped)
    assert line.startswith("error: --resume: ") and str(stopped / name) in line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"global_step": 5}, "expected global_step 1, got 5"),
        ({"global_step": "1"}, "state.global_step"),
        ({"log_history": [{"loss": "low", "step": 1}]}, "log_history[0]: expected numbers"),
        ({"log_history": [{}]}, "log_history[0]: expected numbers"),
        ({"epoch": None}, "state.epoch"),
        ({"stateful_callbacks": []}, "state.stateful_callbacks"),
    ],
)
def test_the_state_of_a_checkpoint(values, said, arguments, stopped):
    changed(stopped / CHECKPOINT / STATE, **values)
    assert said in resumed(arguments, stopped)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lane": "fastbert"}, "expected the lane 'stock', got 'fastbert'"),
        ({"losses": []}, "expected 1 to 2 losses, got 0"),
        ({"losses": [1.0] * 3}, "expected 1 to 2 losses, got 3"),
        ({"checksums": []}, "its checksums do not go with its 2 losses"),
        ({"resumed_at": -1}, "its checksums do not go with its 2 losses"),
        ({"metrics": {"accuracy": "high"}}, "lane.metrics.accuracy"),
    ],
)
def test_the_record_of_a_finished_lane(values, said, arguments, stopped):
    record = json.loads((stopped / RECORD).read_text())
    (stopped / "stock" / RECORD).write_text(json.dumps(record | values))
    assert said in resumed(arguments, stopped)


def test_a_checkpoint_whose_name_is_no_number(arguments, stopped):
    shutil.copytree(stopped / CHECKPOINT, stopped / "stock/checkpoint-²")
    code, text = invoke(*arguments, "--out", stopped, "--resume")
    assert code == 0, text
