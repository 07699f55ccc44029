"""`bench train` on two ranks against one: the same batches, losses, evaluations and metrics; resumed on another number of
ranks; one log; errors that end every rank.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.runner.isolate import ROOT
from bench.train import lanes, report
from bench.train.ranks import joined
from fastbert.errors import InputError
from tests.bench.train.training import FILES, invoke, save_model
from tests.ranks import on_ranks

OPTIONS = ("--batch", 4, "--max-length", 24, "--lr", 1e-2, "--dtype", "fp32", "--dropout", 0)
# Three steps over batches that do not divide into steps, an evaluation whose last batch is not full, and one before the end.
STEPS = ("--steps", 3, "--accumulation", 2, "--eval-steps", 2, "--eval-share", 0.4)
SHORT = {
    "mlm": (),
    "pretraining": ("--lane", "stock"),
    "ner": ("--lane", "stock"),
    "classification": ("--lane", "stock", "--windows", "overlap", "--max-length", 12),
}
RESUMED = ("--steps", 6, "--save-steps", 2, "--eval-steps", 2)


def of_task(task, model, out, options):
    data = ["--task", task, "--data", FILES[task], "--model", model, "--out", out]
    return invoke(*data, *OPTIONS, *options)


def stopped_at(step, model, out, *options):
    """Resume the run in `out`, and interrupt it after a step; 0: let it end."""
    ends = lanes.Watch.on_step_end

    def stop(self, args, state, control, **kwargs):
        ends(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes.Watch, "on_step_end", stop)
        return of_task("mlm", model, out, ("--lane", "fastbert", *RESUMED, *options))


def tasks_of_a_rank(rank, model, folder, tasks):
    for task, options in tasks.items():
        said(folder, task, rank, of_task(task, model, folder / task, (*STEPS, *options)))


def work_of_a_rank(rank, model, folder):
    """All that the tests below look at, in one start of the ranks."""
    tasks_of_a_rank(rank, model, folder, SHORT)
    said(folder, "resumed", rank, stopped_at(5, model, folder / "resumed", "--resume"))
    few = ("--data", folder / "few.txt", "--batch", 2)
    file = folder / f"no-file-of-rank-{rank}.txt"
    faults = {
        "small": few,
        "a rank's own": ("--data", FILES["mlm"] if rank == 0 else file),
        "the first one's": ("--out", folder / "taken" / "out"),
    }
    for name, options in faults.items():
        said(folder, name, rank, of_task("mlm", model, folder / "faults", ("--steps", 1, *options)))


def said(folder, name, rank, done):
    (folder / f"{name} {rank}.json").write_text(json.dumps(done))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ranks(model, tmp_path_factory):
    """The folder of what two ranks did, and codes and outputs by name and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    assert stopped_at(3, model, folder / "resumed")[0] == 130
    few = FILES["mlm"].read_text().splitlines(keepends=True)[5:10]
    (folder / "few.txt").write_text("".join(few))
    (folder / "taken").write_text("a file")
    on_ranks(2, work_of_a_rank, model, folder)
    return folder, {path.stem: tuple(json.loads(path.read_text())) for path in folder.glob("*.json")}


def compare(one, several, count):
    assert one.lanes and len(one.lanes) == len(several.lanes)
    for alone, shared in zip(one.lanes, several.lanes, strict=True):
        assert (alone.ranks, shared.ranks) == (1, count) and alone.imbalance == 1 <= shared.imbalance
        assert shared.checksums == alone.checksums and shared.tokens == alone.tokens
        assert shared.losses == pytest.approx(alone.losses, abs=5e-6)
        assert [loss.loss for loss in shared.evaluations] == pytest.approx([loss.loss for loss in alone.evaluations], abs=5e-6)
        assert shared.final_eval_loss == pytest.approx(alone.final_eval_loss, abs=5e-6)
        assert shared.metrics == pytest.approx(alone.metrics, rel=1e-5)
        assert len(set(alone.losses)) == len(alone.losses) == 3 and alone.evaluations


@pytest.mark.parametrize("task", SHORT)
def test_two_ranks_are_the_same_run_as_one(task, model, ranks, tmp_path):
    folder, done = ranks
    assert done[f"{task} 0"][0] == done[f"{task} 1"][0] == 0, done[f"{task} 0"][1]
    code, text = of_task(task, model, tmp_path / "one", (*STEPS, *SHORT[task]))
    assert code == 0, text
    compare(report.read(tmp_path / "one" / report.RESULTS), report.read(folder / task / report.RESULTS), 2)


def test_one_log(ranks):
    _, done = ranks
    text = done["mlm 0"][1]
    assert [text.count(words) for words in ("rows to train on", "│ ranks ", "final training loss", "losses.png")] == [1] * 4
    assert {text for name, (_, text) in done.items() if name.endswith(" 1")} == {""}


def test_a_checkpoint_is_resumed_on_another_number_of_ranks(model, ranks, tmp_path):
    """One rank, then two, then one: the steps of a run that was never stopped."""
    folder, done = ranks
    assert done["resumed 0"][0] == done["resumed 1"][0] == 130 and "--resume continues" in done["resumed 0"][1]
    files = {path.name for path in (folder / "resumed/fastbert/checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} < files and "rng_state.pth" not in files
    code, text = stopped_at(0, model, folder / "resumed", "--resume")
    assert code == 0, text
    code, text = stopped_at(0, model, tmp_path / "whole")
    assert code == 0, text
    (one,), (other,) = (report.read(path / report.RESULTS).lanes for path in (tmp_path / "whole", folder / "resumed"))
    assert other.resumed_at == 4 and other.checksums == one.checksums[4:]
    assert len(one.losses) == 6 and other.losses == pytest.approx(one.losses, abs=5e-6)
    assert [at.loss for at in other.evaluations] == pytest.approx([at.loss for at in one.evaluations], abs=5e-6)
    assert other.final_eval_loss == pytest.approx(one.final_eval_loss, abs=5e-6)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("small", "--batch: expected a row for each of 2 ranks in every batch, got batches of 1"),
        ("a rank's own", "no-file-of-rank-1.txt"),
        ("the first one's", "--out: cannot write into"),
    ],
)
def test_a_fault_of_any_rank_is_one_line_and_ends_all(fault, words, ranks):
    folder, done = ranks
    (code, text), (other, silence) = done[f"{fault} 0"], done[f"{fault} 1"]
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert (code, other) == (2, 2) and len(lines) == 1 and words in lines[0] and silence == "", text
    assert not (folder / "faults").exists()


@pytest.mark.long
@pytest.mark.parametrize(("count", "batch"), [(2, 4), (4, 9)])
def test_every_task_on_more_ranks(count, batch, model, tmp_path):
    tasks = dict.fromkeys(FILES, ("--batch", batch))
    on_ranks(count, tasks_of_a_rank, model, tmp_path, tasks)
    for task in tasks:
        code, text = of_task(task, model, tmp_path / "one" / task, (*STEPS, "--batch", batch))
        assert code == 0, text
        several = report.read(tmp_path / task / report.RESULTS)
        compare(report.read(tmp_path / "one" / task / report.RESULTS), several, count)
        assert several.comparison.problems == []


def stopped_on_a_rank(rank, step, model, out):
    assert stopped_at(step, model, out, *(("--resume",) if out.exists() else ()))[0] == (130 if step else 0)


@pytest.mark.long
@pytest.mark.parametrize("order", [(2, 1, 2), (4, 2, 1), (1, 4, 2)])
def test_resumed_on_several_numbers_of_ranks(order, model, tmp_path):
    for count, step in zip(order, (3, 5, 0), strict=True):
        if count == 1:
            stopped_on_a_rank(0, step, model, tmp_path / "out")
        else:
            on_ranks(count, stopped_on_a_rank, step, model, tmp_path / "out")
    assert stopped_at(0, model, tmp_path / "whole")[0] == 0
    (one,), (other,) = (report.read(tmp_path / name / report.RESULTS).lanes for name in ("whole", "out"))
    assert (other.resumed_at, other.ranks) == (4, order[-1]) and other.checksums == one.checksums[4:]
    assert len(one.losses) == 6 and other.losses == pytest.approx(one.losses, abs=5e-6)
    assert other.final_eval_loss == pytest.approx(one.final_eval_loss, abs=5e-6)


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate": (*ACCELERATE, "--dynamo_backend", "no", "--mixed_precision", "bf16", "-m"),  # --dtype decides
}


def launched(launcher, *arguments):
    """`bench train` under a launcher, whose environment says nothing of the interpreter."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "bench", "train", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher(launcher, model, tmp_path):
    options = ("--task", "mlm", "--data", FILES["mlm"], "--model", model, *OPTIONS, *STEPS)
    done = launched(launcher, *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stderr.count("no NVIDIA GPU here") == done.stdout.count("rows to train on") == done.stdout.count("│ ranks ") == 1
    )
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert of_task("mlm", model, tmp_path / "one", STEPS)[0] == 0
    compare(*(report.read(tmp_path / name / report.RESULTS) for name in ("one", "two")), 2)


@pytest.mark.long
def test_a_killed_rank_is_started_again(model, tmp_path):
    """torchrun starts both ranks again, which continue from the last checkpoint: the curve of a run without a fault."""
    options = ("--task", "mlm", "--data", FILES["mlm"], "--model", model, *OPTIONS, *RESUMED, "--lane", "fastbert")
    command = [sys.executable, "-m", *TORCHRUN[:-1], "--max-restarts", "1", tmp_path / "rank.py", "train", *options]
    (tmp_path / "rank.py").write_text(DIES)
    done = subprocess.run(
        [str(part) for part in (*command, "--out", tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert stopped_at(0, model, tmp_path / "whole")[0] == 0
    (one,), (other,) = (report.read(tmp_path / name / report.RESULTS).lanes for name in ("whole", "out"))
    assert (other.resumed_at, other.ranks) == (2, 2) and other.checksums == one.checksums[2:]
    assert len(one.losses) == 6 and other.losses == pytest.approx(one.losses, abs=5e-6)


# Rank 1 kills itself behind the third step, when it is started for the first time.
DIES = """
import os, signal
from bench.__main__ import app

os.environ["TRITON_INTERPRET"] = "1"
from bench.train import lanes

ends = lanes.Watch.on_step_end

def die(self, args, state, control, **kwargs):
    ends(self, args, state, control, **kwargs)
    if state.global_step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

lanes.Watch.on_step_end = die
app()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "none.txt"), "error: --data: cannot read none.txt"),
        (("--max-length", 3), "error: --max-length: expected 8 or more, got 3"),
    ],
)
def test_a_launched_fault_is_said_once(options, words, model, tmp_path):
    """A launcher ends all ranks when one has failed; the first rank has to speak before."""
    given = ("--task", "mlm", "--data", FILES["mlm"], "--model", model, *OPTIONS, "--out", tmp_path / "out", *options)
    done = launched("torchrun", *given)
    assert done.returncode == 1 and done.stderr.count(words) == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="--nproc-per-node: expected at most 4, a GPU for each rank, got 8"), joined(gpu=True):
        pass
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="expected data-parallel ranks, got FSDP"), joined(gpu=True):
        pass
