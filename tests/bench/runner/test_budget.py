"""The time budget of `python -m bench gpu`, and that one job's end is not the end of the others."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from bench.core import schema
from bench.core.records import Ceiling, Results, Spread, SuiteRecord
from bench.runner import forks, gpu, isolate, plan, session, suite
from bench.runner.isolate import Outcome
from bench.runner.plan import Job
from bench.tune import candidates
from tests.bench.report.test_report import nothing


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


def test_what_a_stage_has_no_time_for_comes_after_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OVERRUN", 0.05)
    done = []

    def taking(name, seconds):
        def job(timeout):
            done.append(name)
            time.sleep(min(seconds, timeout))
            return Outcome("ok", seconds, None)

        return job

    jobs = [
        Job("first", taking("first", 0.5), 9.0, 0.1, until=0.2),
        Job("second of the stage", taking("second of the stage", 0.1), 9.0, 0.1, until=0.2),
        Job("next stage", taking("next stage", 0.1), 9.0, 0.1, until=0.5),
        Job("no stage", taking("no stage", 0.1), 9.0, 0.1),
    ]
    results = run(jobs, tmp_path, budget=2.0)
    assert done == ["first", "next stage", "second of the stage", "no stage"]
    assert [stage.status for stage in results.stages] == ["ok"] * 4
    assert 0.4 <= results.stages[0].seconds < 0.5, "cut to the end of its stage, and a little more"


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
    """Real forks of one process: the ops that a job knows come back, the one that it does not is its error, and that of no
    other job."""
    good = {"op": "bias_gelu", "dtype": "fp32", "hidden": 16, "batch": 1, "seqlen": 2}
    job = {"kind": "ops", "cases": [good, good | {"op": "unknown"}], "directions": ["forward"]}
    outcome = isolate.run_job(job, 120.0)
    assert outcome.status == "error" and "KeyError: 'unknown'" in outcome.reason
    assert {record.lane for record in outcome.records} == {"eager", "compile", "fastbert"}
    again = isolate.run_job(job | {"cases": [good], "lanes": ["eager"]}, 60.0)
    assert again.status == "ok" and [record.lane for record in again.records] == ["eager"]
    assert isolate.SERVER.usable, "the second one was a fork too"
    start = time.monotonic()
    cut = isolate.run_job(job | {"cases": [good] * 1000}, 1.0)
    assert cut.timed_out and cut.records and time.monotonic() - start < 1.0 + 2 * isolate.GRACE
    assert isolate.run_job(job | {"cases": [good], "lanes": ["eager"]}, 60.0).status == "ok"


def test_a_job_runs_where_the_server_does_not(monkeypatch):
    """Whatever keeps the server from its work, a job has a process of its own."""
    server = forks.Server()
    monkeypatch.setattr(forks.sys, "executable", "/bin/false")
    assert server.start(["job", "records"], {}, os.devnull) is None and not server.usable
    assert server.start(["job", "records"], {}, os.devnull) is None
    monkeypatch.undo()
    monkeypatch.setattr(isolate, "SERVER", server)
    started = []

    def fresh(arguments, *_):
        started.append(arguments)
        return isolate._begin(["true"], {}, os.devnull)

    monkeypatch.setattr(isolate, "_fresh", fresh)
    assert isolate.run_job({"kind": "ceilings"}, 60.0).status == "ok" and len(started) == 1


def test_a_job_whose_fork_may_not_use_the_gpu_is_run_again(monkeypatch):
    server = forks.Server()
    said = "RuntimeError: Cannot re-initialize CUDA in forked subprocess."

    class Refused:
        pid = 2**22 + 1  # no process

        def poll(self):
            return 1

    def refuse(arguments, environment, output):
        Path(output).write_text(said)
        return Refused()

    monkeypatch.setattr(server, "start", refuse)
    monkeypatch.setattr(isolate, "SERVER", server)
    monkeypatch.setattr(isolate, "_fresh", lambda *_: isolate._begin(["true"], {}, os.devnull))
    assert isolate.run_job({"kind": "ceilings"}, 60.0).status == "ok" and not server.usable


def test_caches_are_shared_but_for_a_cold_job(monkeypatch):
    given = []
    monkeypatch.setattr(isolate.SERVER, "start", lambda arguments, environment, output: given.append(environment))
    monkeypatch.setattr(isolate, "_fresh", lambda *_: isolate._begin(["true"], {}, os.devnull))
    for job in ({}, {}, {"cold": True}):
        isolate.run_job({"kind": "ceilings"} | job, 60.0)
    folders = [environment["TRITON_CACHE_DIR"] for environment in given]
    assert folders[0] == folders[1] == isolate.caches(isolate.shared_caches())["TRITON_CACHE_DIR"] != folders[2]
    assert not Path(folders[2]).parent.exists()


def test_what_runs_in_the_background_ends_when_it_should(monkeypatch):
    monkeypatch.setattr(isolate, "_fresh", lambda *_: isolate._begin(["sleep", "600"], {}, os.devnull))
    background = isolate.Background([{"kind": "prepare"}] * 2, {})
    background.begin(1.0)
    processes = [process for process, _ in background.running]
    outcome = background.finish(0.5)
    assert outcome.status == "error" and outcome.reason.count("stopped after") == 2 and outcome.seconds < 5.0
    assert all(process.poll() is not None for process in processes)
    assert background.finish(0.5).status == "ok", "there is nothing left to wait for"


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
    record = summed_up(["pytest", "-q", "-p", "bench.runner.pytest_log", *where])
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
    jobs = list(plan.gpu_plan(480.0))
    names = [job.name for job in jobs]
    kinds = list(dict.fromkeys(name.split(":")[0] for name in names))
    assert kinds == ["ceilings", "caches", "tests", "model", "latency", "encode", "host", "ops", "tune"]
    encoding = [name for name in names if name.startswith("encode")]
    assert encoding[0].endswith("mean bf16 1024 by 32, stock and flattened and fastbert and fastbert, by tokens")
    assert encoding[1].endswith("mean bf16 queries") and any("XLM-R base" in name for name in encoding[2:])
    headline, *others = [name for name in names if name.startswith("model")]
    assert "fastbert and stock and fastbert, graphed step (warm)" in headline
    assert others[1].endswith("infer B=1 S=128 fill=1.0, fastbert and stock and fastbert, graphed (warm)")
    for lane in ("flattened", "stock + compile", "stock + reduce-overhead"):
        assert sum(name.endswith(f", {lane} (warm)") for name in others[2:15]) == 3, "of each of the three headline models"
    assert sum(name.endswith("flash_attention_2 and packed-encoders and liger") for name in others[2:15]) == 3
    assert others[15].endswith("infer B=1 S=128 fill=1.0, stock + max-autotune (warm)"), "last of what is compiled"
    assert jobs[names.index(others[15])].least >= 60.0, "it compiles for minutes"
    assert next(name for name in names if name.startswith("tune")) == "tune: named attention_forward"
    assert len(names) == len(set(names)), "nothing is measured twice"
    assert sum(share for share, _ in plan.stages(480.0)) == pytest.approx(1.0)
    ends = [job.until for job in jobs if job.until is not None]
    assert ends == sorted(ends) and all(job.until is None for job in jobs[len(ends) :])


def test_caches_are_filled_while_the_tests_run_and_never_while_something_is_timed():
    jobs = {job.name: job for job in plan.gpu_plan(480.0)}
    names = list(jobs)
    assert names[1:4] == ["caches: begun", "tests: pytest -m gpu", "caches: filled"]
    assert jobs["caches: filled"].least == plan.ALWAYS, "it may not be left out: it ends what still compiles"
    short = list(plan.gpu_plan(120.0))
    assert not any(job.name.startswith("caches") or job.until for job in short), "too short a call to gain by it"
    assert [job.name.split(":")[0] for job in short[:3]] == ["ceilings", "tests", "model"]


def test_tests_that_ran_before_are_not_run_again(tmp_path):
    assert not any(job.name.startswith("tests") for job in plan.gpu_plan(480.0, tests=False))
    log = tmp_path / "tests.jsonl"
    line = {"test": "a", "outcome": "passed", "seconds": 2.0, "text": ""}
    log.write_text("\n".join(json.dumps(one) for one in (line, line | {"outcome": "failed", "text": "x\nE   over by 3"})))
    record = suite.read(log)
    assert (record.passed, record.failed, record.seconds, record.failures) == (1, 1, 4.0, ["a: over by 3"])


def test_a_failures_message_names_no_folder_of_the_machine():
    ours, theirs = f'"{suite.ROOT}/fastbert/ops.py", line 1', f'"{Path(pytest.__file__).parent}/x.py", line 2'
    assert suite.message(f"x\nE  {ours}\nE  {theirs}") == '"fastbert/ops.py", line 1 / "pytest/x.py", line 2'


def test_the_largest_tests_run_beside_the_others_where_there_are_cores():
    ((everything, workers),) = suite.parts(8)
    assert everything == suite.files() and workers == 8
    (others, many), (largest, few) = suite.parts(16)
    assert [*others, *largest] == suite.files() and largest == list(suite.LAST) and many + few < 16


def test_one_lanes_end_is_not_the_end_of_its_workload(monkeypatch):
    """A process that dies in the second of four lanes: the third and fourth get a process of their own."""
    runs = []

    def run_job(job, timeout):
        runs.append((job["lanes"], timeout))
        fine = list(itertools.takewhile(lambda lane: lane != "b", job["lanes"]))
        records = [SimpleNamespace(lane=lane) for lane in fine]
        return Outcome("ok" if fine == job["lanes"] else "error", 10.0, None if fine == job["lanes"] else "killed", records)

    monkeypatch.setattr(plan, "run_job", run_job)
    outcome = plan.run_lanes({"lanes": ["a", "b", "c", "d"]}, 100.0)
    assert runs == [(["a", "b", "c", "d"], 100.0), (["b", "c", "d"], 90.0), (["c", "d"], 80.0)]
    assert [record.lane for record in outcome.records] == ["a", "c", "d"]
    assert (outcome.status, outcome.reason, outcome.seconds) == ("error", "killed", 30.0)


def test_every_file_with_a_test_for_a_gpu_is_run():
    names = suite.files()
    assert len(names) == len(set(names)) and all((isolate.ROOT / name).is_file() for name in names)
    assert names[: len(suite.FIRST)] == list(suite.FIRST) and names[-1] == suite.LAST[-1]
    marked = {name for name in names if "mark.gpu" in (isolate.ROOT / name).read_text()}
    assert set(names) == marked, "a file that holds none was named first"


def test_named_configurations_are_of_entries_and_new():
    assert set(plan.GENERAL_SEARCH) <= set(candidates.ENTRIES)
    for kernel, entry in candidates.ENTRIES.items():
        now = candidates.present(kernel, "sm_90", "bf16", entry.widths[0])
        configs = [dataclasses.replace(now, **change) for change in entry.promising]
        assert len({now, *configs}) == 1 + len(configs), f"{kernel}: a candidate that is the present one or another one"


def test_every_job_of_the_plan_survives_json(tmp_path):
    for job in [*plan.gpu_plan(480.0), *plan.dry_plan()]:
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


def stop_early(folder, reached):
    def begin(timeout):
        return Outcome("ok", 0.0, None, [SuiteRecord(3, 0, 0, 0, 1.0, True)])

    def sleep(timeout):
        reached.set()
        return isolate.run_command(["sleep", "600"], timeout, {})

    isolate.SERVER.begin = lambda: None
    jobs = [
        Job("a", begin, 9.0, 0.0),
        Job("b", sleep, 900.0, 0.0, until=0.9),
        Job("c", begin, 9.0, 0.0),
    ]
    try:
        session.run(jobs, True, 900.0, folder)
    except typer.Exit as end:
        os._exit(end.exit_code)


def test_a_signal_ends_the_run_with_what_it_reached(tmp_path):
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    process = context.Process(target=stop_early, args=(tmp_path, reached))
    process.start()
    assert reached.wait(60)
    time.sleep(0.5)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    results = schema.read(tmp_path / gpu.RESULTS)
    assert [(stage.name, stage.status) for stage in results.stages] == [
        ("a", "ok"),
        ("b", "error"),
        ("c", "not reached"),
        ("report", "ok"),
    ]
    assert results.stages[1].reason == results.stages[2].reason == "stopped by SIGTERM"
    assert results.tests.passed == 3 and "3 passed" in (tmp_path / "report.md").read_text()


def test_the_sample_says_that_it_is_invented():
    from tests.bench.report.test_report import SAMPLE

    assert schema.read(SAMPLE).invented
