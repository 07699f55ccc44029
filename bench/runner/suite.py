"""The correctness tests of the same run: `pytest -m gpu` in a process of its own, summed up test by test.

Of the test files only those that hold a test for a GPU are collected, most telling first: collecting all of them would take
each of pytest's processes longer than many tests.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from bench.core.records import SuiteRecord
from bench.runner.isolate import ROOT, Outcome, caches, run_command, shared_caches

SHOWN = 40  # failures that are named
TEXT = 600  # characters of a failure's message that are kept
MOST_WORKERS = 8  # most of a test's time is one kernel's compilation on one core
FIRST = (
    "tests/kernels/test_gpu_configurations.py",
    "tests/kernels/test_gpu.py",
    "tests/models/test_gpu.py",
    "tests/kernels/attention/test_gpu.py",
    "tests/kernels/linear_cross_entropy/test_gpu.py",
    "tests/optim/test_gpu.py",
    "tests/kernels/test_gpu_calls.py",
)
LAST = ("tests/kernels/test_gpu_sizes.py",)  # gigabytes, beside other tests


def files() -> list[str]:
    """The files with tests for a GPU, in the order in which they run."""
    marked = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in marked if ROOT / "tests" / "bench" not in path.parents]
    return [*FIRST, *(name for name in names if name not in FIRST + LAST), *LAST]


def run(timeout: float, chosen: Iterable[str] | None = None) -> Outcome:
    """The tests for a GPU in the `chosen` files, all by default; where time runs out, those that were reached."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "tests.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "bench.runner.pytest_log"]
        command += ["--test-log", str(log), "--continue-on-collection-errors"]
        if find_spec("xdist"):
            command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
        command += files() if chosen is None else chosen
        outcome = run_command(command, timeout, caches(shared_caches()))
        if not log.exists() and not outcome.timed_out:
            return outcome  # pytest itself failed
        record = read(log, outcome.seconds, not outcome.timed_out)
    # pytest exits with 1 where tests failed: the record says which, and the run as such was fine.
    status, reason = ("error", outcome.reason) if outcome.timed_out else ("ok", None)
    return Outcome(status, outcome.seconds, reason, [record])


def read(log: Path, seconds: float | None = None, finished: bool = True) -> SuiteRecord:
    """What bench.runner.pytest_log wrote, summed up. Without `seconds`, those of the tests themselves."""
    return summary(log.read_text().splitlines() if log.exists() else [], seconds, finished)


def summary(lines: Iterable[str], seconds: float | None, finished: bool) -> SuiteRecord:
    """Counts, and of each failure its name and the end of its message."""
    tests = [json.loads(line) for line in lines if line.endswith("}")]
    counts = Counter(test["outcome"] for test in tests)
    failures = [f"{test['test']}: {message(test['text'])}" for test in tests if test["outcome"] in ("failed", "error")]
    numbers = (counts[name] for name in ("passed", "failed", "error", "skipped"))
    if seconds is None:
        seconds = sum(test["seconds"] for test in tests)
    return SuiteRecord(*numbers, seconds, finished, failures[:SHOWN])


def message(text: str) -> str:
    """What a failed test said, without its source: pytest marks those lines with an E. Else the last line."""
    lines = text.strip().splitlines() or ["no message"]
    said = [line[1:].strip() for line in lines if line.startswith("E ")]
    return " / ".join(said or lines[-1:])[:TEXT]
