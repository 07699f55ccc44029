"""Each command's dry run, end to end on a machine without a GPU: the jobs run here, the rest as it ships."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench.__main__ import app
from bench.core import schema
from bench.core.records import SuiteRecord
from bench.report import tune_tables
from bench.runner import isolate, plan, worker
from bench.runner.isolate import Outcome
from bench.runner.plan import Job
from bench.tune import candidates

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """A job's records go through the lines that a worker writes; its process alone is saved, ten seconds a job."""

    def run_job(job, timeout):
        job = json.loads(json.dumps(job))
        lines = [schema.to_line(record) for record in worker.KINDS[job.pop("kind")](**job)]
        return Outcome("ok", 0.1, None, schema.from_lines(lines))

    monkeypatch.setattr(plan, "run_job", run_job)
    monkeypatch.setattr(isolate.SERVER, "begin", lambda: None)
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back after the command has set them


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.output


def check(folder, name="results.json"):
    results = schema.read(folder / name)
    assert results.dry_run and not results.ceilings
    assert all(stage.status == "ok" for stage in results.stages), results.stages
    assert all(
        record.seconds is None for record in (*results.models, *results.latency, *results.encode, *results.ops, *results.tuning)
    )
    return results


def statuses(records):
    return {record.lane: record.status for record in records}


def test_models(tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("3\n9\n16\n40\n")
    options = ["--lane", "stock", "--lane", "fastbert", "--lane", "flash_attention_2", "--lengths", lengths]
    invoke("models", "--dry-run", "--head", "ner", *options, "--out", tmp_path)
    results = check(tmp_path)
    assert statuses(results.models) == {"stock": "dry-run", "fastbert": "dry-run", "flash_attention_2": "absent"}
    assert {record.real_tokens for record in results.models} == {3.0 + 9 + 16 + 16}
    assert all(len(record.losses) == 1 for record in results.models if record.status == "dry-run")
    assert "nothing was timed" in (tmp_path / "report.html").read_text()


@pytest.mark.long
def test_inference_through_torch_compile(tmp_path):
    invoke("models", "--dry-run", "--head", "nsp", "--mode", "infer", "--lane", "stock + compile", "--out", tmp_path)
    assert {record.status for record in check(tmp_path).models} == {"dry-run"}


def test_latency(tmp_path):
    text = invoke(
        "latency", "--dry-run", "--batch", 1, "--batch", 64, "--lane", "stock", "--lane", "fastbert", "--out", tmp_path
    )
    results = check(tmp_path)
    assert {(r.batch, r.lengths, r.lane) for r in results.latency} == set(
        itertools.product((1, 4), ("full", "mixed"), ("stock", "fastbert"))
    )
    assert {record.status for record in results.latency} == {"dry-run"} and "3 of 3 jobs done" in text


def test_encode(tmp_path):
    pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    lanes = ("stock", "fastbert")
    options = [word for lane in lanes for word in ("--lane", lane)]
    text = invoke("encode", "--dry-run", "--batch", 2, "--batch", 64, *options, "--no-queries", "--out", tmp_path)
    results = check(tmp_path)
    assert {(r.batch, r.lane, r.status) for r in results.encode} == {(n, lane, "dry-run") for n in (2, 4) for lane in lanes}
    assert "3 of 3 jobs done" in text
    assert "tiny, mean pooling, fp32, 6 texts" in (tmp_path / "report.md").read_text()


def test_ops(tmp_path):
    chosen = ("gelu_layernorm", "attention", "adamw")
    invoke("ops", "--dry-run", *(word for op in chosen for word in ("--op", op)), "--out", tmp_path)
    results = check(tmp_path)
    assert {record.op for record in results.ops} == set(chosen)
    adamw = [record for record in results.ops if record.op == "adamw"]
    assert statuses(adamw) == dict.fromkeys(("eager", "foreach", "fused", "fastbert"), "dry-run")
    assert {record.direction for record in results.ops} == {"forward", "backward", "both", "step"}
    ours = [record for record in results.ops if record.lane == "fastbert" and record.op != "adamw"]
    assert len(ours) == 3 * 5 and {record.status for record in ours} == {"dry-run"}
    assert all(record.reason for record in results.ops if record.status == "absent")


def test_host(tmp_path):
    out = tmp_path / "host.json"
    text = invoke("host", "--dry-run", "--only", "MLM B=64 S=512 training, autocast", "--names", "--json", out)
    records = {record.lane: record for record in check(tmp_path, out.name).host}
    assert statuses(records.values()) == dict.fromkeys(("stock", "fastbert", "fastbert, packed, no logits"), "dry-run")
    stock, ours = records["stock"].launches, records["fastbert"].launches
    assert stock["ATen"]["aten::_fused_adamw_"] == 1 and not stock["Triton"]
    assert ours["Triton"]["attention_fwd_kernel"] == ours["Triton"]["adamw_kernel"] == 1
    assert "aten::set_" not in ours["ATen"], "what the interpreter does is not counted"
    assert "aten::_fused_adamw_" in text and "not measured (dry run)" in text


def test_tune(tmp_path, monkeypatch):
    out = tmp_path / "tune.json"
    entry = replace(candidates.ENTRIES["bias_gelu_forward"], widths=(3072,))  # a width takes twenty seconds
    monkeypatch.setitem(candidates.ENTRIES, "bias_gelu_forward", entry)
    text = invoke("tune", "--dry-run", "--kernel", "bias_gelu_forward", "--most", 1, "--out", out)
    records = check(tmp_path, "tune.json").tuning
    assert {(record.lane, record.status) for record in records} == {("present", "dry-run")}
    assert all(record.audit["registers"] > 0 and record.audit["spills"] == 0 for record in records)
    assert "Candidates, compiled and not timed" in text
    console = Console(width=200)
    with console.capture() as printed:
        console.print(tune_tables.candidates_table(records))
    assert "ships now" in printed.get()


def test_gpu(tmp_path, monkeypatch):
    """The plan of the dry run, cut after its models' first; the tests of `-m gpu` are not run inside this one."""
    tests = Job("tests", lambda timeout: Outcome("ok", 0.0, None, [SuiteRecord(0, 0, 0, 7, 0.0, True)]), 9.0)
    jobs = [tests, *islice(plan.dry_plan(), 2, 3)]
    monkeypatch.setattr(plan, "dry_plan", lambda: iter(jobs))
    text = invoke("gpu", "--dry-run", "--budget", 600, "--out", tmp_path)
    results = check(tmp_path)
    assert results.tests.skipped == 7 and len(results.models) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "results.json"]
    assert "3 of 3 jobs done" in text and "data:image/png" in (tmp_path / "report.html").read_text()


def test_a_failed_check_is_the_exit_status(tmp_path, monkeypatch):
    from bench.models import gate

    monkeypatch.setattr(gate, "problem", lambda *arguments: "loss: error 1")
    options = ["models", "--dry-run", "--mode", "infer", "--lane", "stock", "--fill", "0.5", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 1 and "failed its check" in done.output
    assert check(tmp_path).models[0].status == "failed"


def test_a_wrong_kernel_fails_its_check():
    """The check that stands before every time sees an error of one part in a thousand."""
    from bench.ops import grid
    from bench.ops.check import Checker
    from bench.ops.run import judge, make_inputs
    from bench.ops.table import OPS

    case = next(grid.tiny_cases(("bias_gelu",)))
    op, inputs = OPS["bias_gelu"], make_inputs(case, 1)
    wrong = grid.Lane(lambda case: lambda inputs, p: 1.001 * op.reference(inputs, p))
    status, reason, function = judge(case, wrong, Checker(op, case, inputs[0]))
    assert status == "failed" and "y: error" in reason and function is None


@pytest.mark.parametrize(("head", "mode"), [("mlm", "train"), ("classification", "train"), ("classification", "infer")])
def test_the_flattened_lane_computes_what_eager_does(head, mode, monkeypatch):
    from bench.models import flattened, workloads
    from bench.models.run import run

    workload = workloads.tiny(workloads.Workload("tiny", head, mode, 4, 16, 0.5))
    records = list(run(workload, "flattened", details=False))
    assert [record.status for record in records] == ["dry-run"], records[0].reason
    attend = flattened.attend
    whole = lambda *tensors, cu_seq_lens_q, **others: attend(*tensors, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **others)  # noqa: E731
    monkeypatch.setitem(flattened.AttentionInterface._global_mapping, flattened.NAME, whole)
    (record,) = run(workload, "flattened", details=False)
    assert record.status == "failed", "sequences that see each other"


def test_the_flattened_lane_says_which_heads_it_lacks():
    from bench.models import workloads
    from bench.models.run import run

    workload = workloads.tiny(workloads.Workload("tiny", "qa", "infer", 4, 16, 0.5))
    (record,) = run(workload, "flattened", details=False)
    assert (record.status, record.reason) == ("absent", "no flattened form of the head qa")


def test_a_time_is_there_before_its_details(monkeypatch):
    """What is cut off while it is looked at more closely has its time all the same."""
    from bench.models import workloads
    from bench.models.run import run

    workload = workloads.tiny(workloads.Workload("tiny", "ner", "train", 4, 16, 0.5))
    first, second = run(workload, "stock")
    assert not first.losses and second.losses and second == replace(first, losses=second.losses)
    monkeypatch.setattr("bench.models.run.losses", lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert list(run(workload, "stock")) == [first]


def test_a_failed_check_says_which_tensors_and_by_how_much(monkeypatch):
    from bench.models import gate, workloads

    workload = workloads.tiny(workloads.Workload("tiny", "ner", "train", 4, 16, 0.5))
    model = gate.without_dropout(workloads.make(workload, workloads.LANES["stock"], "cpu"), True)
    with torch.no_grad():
        model.classifier.weight.mul_(1.01)
    first, *others = gate.problem(workload, model, workloads.LANES["stock"], "cpu").splitlines()
    assert "tensors differ from eager" in first and len(others) == gate.SHOWN - 1
    assert all("error" in line for line in (first, *others))


def test_a_wrong_model_fails_its_gate(monkeypatch):
    from bench.models import gate, workloads

    workload = workloads.tiny(workloads.Workload("tiny", "qa", "infer", 4, 16, 0.5))
    model = workloads.make(workload, workloads.LANES["stock"], "cpu").eval()
    assert gate.problem(workload, model, workloads.LANES["stock"], "cpu") is None
    assert gate.problem(workload, model, workloads.LANES["fastbert"], "cpu") == "no kernel was launched"
    with torch.no_grad():
        model.qa_outputs.bias.add_(1e-3)
    assert "differ from eager" in gate.problem(workload, model, workloads.LANES["stock"], "cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models", "--lane", "fast"], "known are eager, stock"),
        (["models", "--fill", "0"], "expected a share"),
        (["models", "--lengths", "none.txt"], "cannot read none.txt"),
        (["models", "--head", "multiple-choice", "--batch", "3"], "has to be even"),
        (["latency", "--lane", "flattened"], "known are stock, fastbert"),
        (["latency", "--batch", "0"], "from 1 on, got 0"),
        (["latency", "--head", "multiple-choice"], "has to be even"),
        (["latency", "--seconds", "0"], "above 0, got 0"),
        (["encode", "--lane", "eager"], "known are stock, flattened"),
        (["encode", "--model", "tiny"], "known are BERT-base, MiniLM, XLM-R base"),
        (["encode", "--pooling", "max"], "known are mean, cls"),
        (["encode", "--precision", "int8"], "known are bf16"),
        (["encode", "--sentences", "1"], "from 2 on, got 1"),
        (["encode", "--longest", "1024"], "from 3 to 512 tokens, got 1024"),
        (["encode", "--seconds", "0"], "above 0, got 0"),
        (["ops", "--op", "x"], "known are attention"),
        (["tune", "--kernel", "x"], "known are attention_forward"),
        (["host", "--only", "no such case"], "there are SeqCls B=32 S=128 training"),
        (["host", "--rounds", "0"], "from 1 on"),
        (["host", "--check"], "leave out --dry-run"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, said):
    done = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["gpu", "models", "latency", "encode", "ops", "host", "tune"])
def test_without_a_gpu_the_floors_are_printed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [command])
    assert done.exit_code == 3 and "Floors" in done.output and "nothing was timed" in done.output
    assert not list(tmp_path.iterdir())


def test_pytest_bench_walks_every_lane():
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", "bias_gelu"]
    done = subprocess.run(command, cwd=isolate.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "checked, not timed" in done.stdout and " 9 skipped" in f" {done.stdout.split(chr(10))[-2]}"
