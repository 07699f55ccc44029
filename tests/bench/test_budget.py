"""The time budget of `python -m bench gpu`, and that one job's end is not the end of the others."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bench import gpu, isolate, plan, schema, suite
from bench.isolate import Outcome
from bench.plan import Job
from bench.records import Ceiling, Results, Spread
from tests.bench.test_report import nothing


def ceiling(name="copy"):
    return Ceiling(name, 1e12, Spread(1.0, 2.0, 3.0, 9))


def run(jobs, tmp_path, budget, reserve=0.0) -> Results:
    results = nothing()
    gpu.run(jobs, results, budget, tmp_path, lambda line: None, reserve)
    return results


def test_jobs_get_the_time_that_is_left(tmp_path):
    given = []

    def job(timeout):
        given.append(timeout)
        time.sleep(0.3)
        return Outcome("ok", 0.3, None)

    start = time.monotonic()
    jobs = [Job("a", job, cap=0.5, least=0.1), *(Job(name, job, cap=60.0, least=0.4) for name in "bcdef")]
    results = run(jobs, tmp_path, budget=1.2)
    assert time.monotonic() - start < 1.2
    assert [stage.status for stage in results.stages] == ["ok"] * 3 + ["not reached"] * 3
    assert given[0] == 0.5 and given[1] == pytest.approx(0.9, abs=0.1) and given[2] == pytest.approx(0.6, abs=0.1)


def test_time_is_kept_for_the_report(tmp_path):
    results = run([Job("a", lambda timeout: Outcome("ok", 0.0, None), cap=9.0, least=5.0)], tmp_path, 30.0, 26.0)
    assert [stage.status for stage in results.stages] == ["not reached"]


def test_a_failure_is_recorded_and_the_next_job_runs(tmp_path):
    def broken(timeout):
        raise RuntimeError("illegal memory access")

    jobs = [Job("broken", broken, 9.0, 0.0), Job("fine", lambda t: Outcome("ok", 0.0, None, [ceiling()]), 9.0, 0.0)]
    results = run(jobs, tmp_path, 60.0)
    assert [stage.status for stage in results.stages] == ["error", "ok"]
    assert "illegal memory access" in results.stages[0].reason and "Traceback" in results.stages[0].reason
    assert results.ceiling("copy") == 1e12


def test_a_report_that_fails_costs_no_result(tmp_path):
    def broken():
        raise ValueError("no picture")

    results = nothing()
    job = Job("a", lambda timeout: Outcome("ok", 0.0, None, [ceiling()]), 9.0, 0.0)
    gpu.run([job, job], results, 60.0, tmp_path, lambda line: None, 0.0, after=broken)
    gpu.record("report", broken, results)
    assert [stage.status for stage in results.stages] == ["ok", "error"] * 2 + ["error"]
    assert len(schema.read(tmp_path / gpu.RESULTS).ceilings) == 2 and "no picture" in results.stages[-1].reason


def test_what_was_reached_is_on_disk_before_the_next_job_begins(tmp_path):
    seen = []

    def look(timeout):
        seen.append(json.loads((tmp_path / gpu.RESULTS).read_text()))
        return Outcome("ok", 0.0, None, [ceiling(f"after {len(seen)}")])

    run([Job(name, look, 9.0, 0.0) for name in "abc"], tmp_path, 60.0)
    assert [[stage["name"] for stage in data["stages"]] for data in seen] == [[], ["a"], ["a", "b"]]
    assert [len(data["ceilings"]) for data in seen] == [0, 1, 2]


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path):
    marker = tmp_path / "pid"
    child = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    outcome = isolate.run_command([sys.executable, "-c", code], 2.0, {})
    assert time.monotonic() - start < 2.0 + 2 * isolate.GRACE
    assert outcome.status == "error" and outcome.reason.startswith("stopped after 2 s\nbegan")
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(marker.read_text()), 0)
            time.sleep(0.1)


def test_a_killed_process_is_an_error_with_its_last_words():
    outcome = isolate.run_command([sys.executable, "-c", "raise RuntimeError('out of memory')"], 30.0, {})
    assert outcome.status == "error" and "RuntimeError: out of memory" in outcome.reason
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert isolate.run_command([sys.executable, "-c", code], 30.0, {}).reason == "exit status -9"


def test_a_worker_hands_over_its_records_and_its_failure():
    """A real process: the ops that it knows come back, the one that it does not is its error."""
    good = {"op": "bias_gelu", "dtype": "fp32", "hidden": 16, "batch": 1, "seqlen": 2}
    job = {"kind": "ops", "cases": [good, good | {"op": "unknown"}], "directions": ["forward"]}
    outcome = isolate.run_job(job, 120.0)
    assert outcome.status == "error" and "KeyError: 'unknown'" in outcome.reason
    assert {record.lane for record in outcome.records} == {"eager", "compile", "fastbert"}


def test_the_tests_of_a_run_are_summed_up_also_where_time_ran_out(tmp_path):
    (tmp_path / "test_four.py").write_text(
        "import pytest, time\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2, 'over the bound'\n"
        "def test_left_out(): pytest.skip('no')\n"
        "def test_raised(missing): pass\n"
        "def test_slow(): time.sleep(600)\n"
    )
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    where = ("-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:xdist", str(tmp_path))
    record = summed_up(["pytest", "-q", "-p", "bench.pytest_log", *where])
    assert (record.passed, record.failed, record.errors, record.skipped) == (1, 1, 2, 1)
    assert any("test_wrong" in line for line in record.failures) and not record.finished


def summed_up(command):
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        options = ["--test-log", str(log), "--continue-on-collection-errors"]
        outcome = isolate.run_command([sys.executable, "-m", *command, *options], 8.0, {})
        assert outcome.timed_out and log.exists(), outcome.reason
        return suite.summary(log.read_text().splitlines(), outcome.seconds, finished=False)


def test_the_plan_is_most_important_first():
    names = [job.name for job in plan.gpu_plan(540.0)]
    kinds = list(dict.fromkeys(name.split(":")[0] for name in names))
    assert kinds == ["ceilings", "tests", "host", "model", "ops", "tune"]
    assert "BERT-large mlm train" in names[3] and names[3].endswith("fastbert")
    assert len(names) == len(set(names)), "nothing is measured twice"


def test_every_job_of_the_plan_survives_json(tmp_path):
    for job in [*plan.gpu_plan(540.0), *plan.dry_plan()]:
        payload = getattr(job.run, "args", None)
        assert not payload or json.loads(json.dumps(payload)), job.name


def run_and_hang(folder, reached):
    def hang(timeout):
        reached.set()
        time.sleep(600)

    run([Job("a", lambda t: Outcome("ok", 0.0, None, [ceiling()]), 9.0, 0.0), Job("b", hang, 900.0, 0.0)], folder, 900.0)


def test_a_run_that_is_killed_leaves_what_it_reached(tmp_path):
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    process = context.Process(target=run_and_hang, args=(tmp_path, reached))
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    data = json.loads((tmp_path / gpu.RESULTS).read_text())
    assert [stage["name"] for stage in data["stages"]] == ["a"] and len(data["ceilings"]) == 1


def test_the_sample_says_that_it_is_invented():
    from tests.bench.test_report import SAMPLE

    assert schema.read(SAMPLE).invented
