"""`python -m bench accept`: what a GPU gave goes into the repository in one step, and what nobody measured does not."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.core import schema
from bench.core.records import Spread, StageRecord, SuiteRecord, TuneRecord
from bench.runner import acceptance

SAMPLE = Path(__file__).parents[1] / "data/invented.json"
MARKED = "".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in ("headline", "lanes"))


@pytest.fixture
def measured():
    """The sample as if a GPU had given it."""
    results = schema.read(SAMPLE)
    here = dataclasses.replace(results.environment, gpu="NVIDIA H100 80GB HBM3", date="2026-01-02T03:04:05", commit="abc+")
    return dataclasses.replace(results, invented=False, environment=here)


@pytest.fixture
def root(tmp_path):
    """A checkout with the documents, their marked tables empty."""
    for name in acceptance.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before\n{MARKED}after\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def accept(results, root, *options):
    folder = root / "from-the-gpu"
    schema.write(results, folder / "results.json")
    return CliRunner().invoke(app, ["accept", str(folder), "--root", str(root), *options])


def test_one_command_leaves_what_is_to_be_committed(measured, root):
    done = accept(measured, root)
    assert done.exit_code == 0, done.output
    stem = "nvidia-h100-80gb-hbm3-2026-01-02-abc"
    kept = root / "bench/results" / f"{stem}.json"
    assert schema.read(kept) == measured
    for name in acceptance.DOCUMENTS:
        text = (root / name).read_text()
        assert "| stock |" in text and "NVIDIA H100 80GB HBM3" in text and text.startswith("before\n")
    pictures = sorted(path.name for path in (root / "bench/results").glob("*.png"))
    assert f"{stem}-speed.png" in pictures and 1 < len(pictures) <= 6
    command = done.output.strip().splitlines()[-1]
    subprocess.run(command.split(), cwd=root, check=True)
    staged = subprocess.run(["git", "diff", "--cached", "--name-only"], cwd=root, check=True, capture_output=True, text=True)
    assert set(staged.stdout.split()) == {*acceptance.DOCUMENTS, f"bench/results/{stem}.json"} | {
        f"bench/results/{name}" for name in pictures
    }


def test_no_picture_without_a_time(measured, root):
    accept(dataclasses.replace(measured, models=[], ops=[], ceilings=[]), root)
    assert not list((root / "bench/results").glob("*.png"))


@pytest.mark.parametrize(
    ("change", "said"), [({"invented": True}, "only measured results"), ({"dry_run": True}, "a time in a dry run")]
)
def test_what_was_not_measured_is_refused(measured, root, change, said):
    done = accept(dataclasses.replace(measured, **change), root)
    assert done.exit_code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1
    assert not (root / "bench/results").exists() and MARKED in (root / "README.md").read_text()


def test_a_pretended_gpu_is_refused(measured, root):
    here = dataclasses.replace(measured.environment, pretended=True)
    done = accept(dataclasses.replace(measured, environment=here), root)
    assert done.exit_code == 2 and "pretended" in done.output and not (root / "bench/results").exists()


def test_what_is_to_be_mended_is_said(measured, root):
    wrong = next(record for record in measured.models if record.status == "ok")
    failed = dataclasses.replace(wrong, status="failed", reason="2 tensors differ:\nloss: error 0.5 > 0.1", seconds=None)
    results = dataclasses.replace(
        measured,
        models=[failed if record is wrong else record for record in measured.models],
        tests=SuiteRecord(3, 1, 0, 0, 2.0, True, ["tests/x.py::y: dq: error 2.0 > 1.0"]),
        stages=[StageRecord("host", "error", 1.0, "Traceback\nRuntimeError: no"), StageRecord("a", "ok", 1.0, None)],
    )
    lines = accept(results, root).output.splitlines()
    assert "failed test: tests/x.py::y: dq: error 2.0 > 1.0" in lines
    said = f"{wrong.lane}: 2 tensors differ: / loss: error 0.5 > 0.1"
    assert any(line.startswith(f"failed its check: {wrong.model} ") and line.endswith(said) for line in lines)
    assert any("did not run: host: " in line for line in lines)
    assert not any(wrong.lane in row and " ms " in row for row in _rows(root, failed)), "a lane that failed has no time"


def _rows(root, record):
    """The rows of the record's workload and lane."""
    from bench.report.tables import workload

    lines = (root / "README.md").read_text().splitlines()
    return [line for line in lines if line.startswith(f"| {workload(record)} | {record.lane} |")]


def test_a_faster_configuration_is_a_line_for_the_table(measured):
    def record(lane, config, seconds, width=64):
        spread = Spread(seconds, seconds, seconds, 9)
        return TuneRecord(lane, "ok", None, spread, [], None, "attention_forward", "sm_90", "bf16", width, config, {})

    now, better = {"BLOCK_M": 128, "num_warps": 4}, {"BLOCK_M": 128, "num_warps": 8}
    tuning = [record("present", now, 2.0), record("candidate", better, 1.0), record("present", now, 1.0, 128)]
    assert acceptance.configurations(dataclasses.replace(measured, tuning=tuning)) == [
        "kernels/core/configs.py, attention_forward, sm_90, bf16, 64: Config(BLOCK_M=128, num_warps=4) -> "
        "Config(BLOCK_M=128, num_warps=8)  # 2.00x of the one before"
    ]
    same = [record("present", now, 1.0), record("candidate", better, 1.0)]
    assert not acceptance.configurations(dataclasses.replace(measured, tuning=same)), "no difference beyond the noise"


def test_files_of_several_calls_are_one_result(measured, root):
    half = len(measured.models) // 2
    folders = []
    for i, models in enumerate((measured.models[:half], measured.models[half:])):
        folders.append(root / f"call-{i}" / "results.json")
        schema.write(dataclasses.replace(measured, models=models), folders[-1])
    done = CliRunner().invoke(app, ["accept", *map(str, folders), "--root", str(root)])
    assert done.exit_code == 0, done.output
    (kept,) = (root / "bench/results").glob("*.json")
    assert len(json.loads(kept.read_text())["models"]) == len(measured.models)
