"""Runs the correctness tests of the same run, `pytest -m gpu` in a process of its own, and summarises them.

Only files with GPU tests are collected, most important first: collecting all files takes each pytest process longer than
many of the tests.
"""

import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from bench.core.records import SuiteRecord
from bench.runner.isolate import ROOT, Outcome, caches, run_command, shared_caches

SHOWN = 40  # number of failures that are named
TEXT = 600  # characters kept of a failure's message
_FOLDERS = re.compile(rf"/[^\s\"]*?/site-packages/|{re.escape(str(ROOT))}/")
MOST_WORKERS = 13  # a test mostly compiles one kernel on one core
SIDE_WORKERS = 2  # for LAST, beside the others on a machine that has the cores
FIRST = (
    "tests/kernels/test_gpu_configurations.py",
    "tests/kernels/test_gpu.py",
    "tests/models/test_gpu.py",
    "tests/kernels/attention/test_gpu.py",
    "tests/kernels/linear_cross_entropy/test_gpu.py",
    "tests/optim/test_gpu.py",
    "tests/kernels/test_gpu_calls.py",
)
LAST = ("tests/kernels/test_gpu_sizes.py",)  # tests that take gigabytes, next to other tests


def files() -> list[str]:
    """The files with GPU tests, in the order in which they run."""
    marked = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in marked if ROOT / "tests" / "bench" not in path.parents]
    return [*FIRST, *(name for name in names if name not in FIRST + LAST), *LAST]


def parts(cores: int) -> list[tuple[list[str], int]]:
    """The files of each pytest run and its number of workers. The runs go side by side."""
    if cores <= MOST_WORKERS + SIDE_WORKERS:
        return [(files(), min(MOST_WORKERS, cores))]
    return [([name for name in files() if name not in LAST], MOST_WORKERS), (list(LAST), SIDE_WORKERS)]


def run(timeout: float, chosen: Iterable[str] | None = None) -> Outcome:
    """Run the GPU tests in the `chosen` files, all by default. If time runs out, the record covers those that finished."""
    cores = os.cpu_count() or 1
    groups = parts(cores) if chosen is None else [(list(chosen), min(MOST_WORKERS, cores))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        logs = [Path(folder, f"tests-{i}.jsonl") for i in range(len(groups))]
        outcomes = list(pool.map(lambda group, log: _pytest(*group, log, timeout), groups, logs))
        found = list(zip(outcomes, logs, strict=True))
        # pytest exits with 1 if tests failed. The record lists them, and the run itself succeeded unless there is no log.
        wrong = next((outcome for outcome, log in found if outcome.timed_out or not log.exists()), None)
        seconds = max(outcome.seconds for outcome in outcomes)
        lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
        records = [summary(lines, seconds, wrong is None)] if lines or (wrong and wrong.timed_out) else []
    return Outcome("error" if wrong else "ok", seconds, wrong and wrong.reason, records)


def _pytest(names: list[str], workers: int, log: Path, timeout: float) -> Outcome:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "bench.runner.pytest_log"]
    command += ["--test-log", str(log), "--continue-on-collection-errors"]
    if find_spec("xdist"):
        command += ["-n", str(workers)]
    return run_command([*command, *names], timeout, caches(shared_caches()))


def read(log: Path, seconds: float | None = None, finished: bool = True) -> SuiteRecord:
    """Summarise a log of bench.runner.pytest_log. `seconds` defaults to the sum over the tests."""
    return summary(log.read_text().splitlines() if log.exists() else [], seconds, finished)


def summary(lines: Iterable[str], seconds: float | None, finished: bool) -> SuiteRecord:
    """The counts, and the name and end of message of each failure."""
    tests = [json.loads(line) for line in lines if line.endswith("}")]
    counts = Counter(test["outcome"] for test in tests)
    failures = [f"{test['test']}: {message(test['text'])}" for test in tests if test["outcome"] in ("failed", "error")]
    numbers = (counts[name] for name in ("passed", "failed", "error", "skipped"))
    if seconds is None:
        seconds = sum(test["seconds"] for test in tests)
    return SuiteRecord(*numbers, seconds, finished, failures[:SHOWN])


def message(text: str) -> str:
    """A failure's message without source: the lines that pytest marks with E, otherwise the last line. Paths of files start
    below the checkout or the installed packages, because the message is committed."""
    lines = _FOLDERS.sub("", text).strip().splitlines() or ["no message"]
    said = [line[1:].strip() for line in lines if line.startswith("E ")]
    return " / ".join(said or lines[-1:])[:TEXT]
