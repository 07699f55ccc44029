"""The correctness tests of the same run: `pytest -m gpu` in a process of its own, summed up test by test."""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from bench.isolate import Outcome, run_command
from bench.records import SuiteRecord

SHOWN = 40  # failures that are named
MOST_WORKERS = 8  # most of a test's time is one kernel's compilation on one core


def run(timeout: float, selection: tuple[str, ...] = ("-m", "gpu")) -> Outcome:
    """The tests of `selection`; where time runs out, those that were reached."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "tests.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.pytest_log"]
        command += ["--test-log", str(log), "--continue-on-collection-errors", *selection]
        if find_spec("xdist"):
            command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
        outcome = run_command(command, timeout, {})
        if not log.exists():
            return outcome
        finished = not outcome.timed_out
        record = summary(log.read_text().splitlines(), outcome.seconds, finished)
    # pytest exits with 1 where tests failed: the record says which, and the run as such was fine.
    return Outcome("ok" if finished else "error", outcome.seconds, None if finished else outcome.reason, [record])


def summary(lines: Iterable[str], seconds: float, finished: bool) -> SuiteRecord:
    """Counts, and a line for each failure, of what bench.pytest_log wrote."""
    tests = [json.loads(line) for line in lines if line.endswith("}")]
    counts = Counter(test["outcome"] for test in tests)
    failures = [
        f"{test['test']}: {(test['text'].strip().splitlines() or ['no message'])[-1][:300]}"
        for test in tests
        if test["outcome"] in ("failed", "error")
    ]
    numbers = (counts[name] for name in ("passed", "failed", "error", "skipped"))
    return SuiteRecord(*numbers, seconds, finished, failures[:SHOWN])
