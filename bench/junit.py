"""The correctness tests of the same run: `pytest -m gpu` in a process of its own, summed up from JUnit's XML."""

import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from bench.isolate import Outcome, run_command
from bench.records import SuiteRecord

SHOWN = 40  # failures that are named
MOST_WORKERS = 8  # most of a test's time is one kernel's compilation on one core


def run(timeout: float, selection: tuple[str, ...] = ("-m", "gpu")) -> Outcome:
    """The tests of `selection`; where time runs out pytest is interrupted and still writes what it has."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", *selection]
        command += ["--continue-on-collection-errors"]
        if find_spec("xdist"):
            command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
        outcome = run_command(command, timeout, {})
        if not xml.exists():
            return outcome
        finished = not (outcome.reason or "").startswith("stopped")
        record = summary(xml.read_text(), finished)
    # pytest exits with 1 where tests failed: the record says which, and the run as such was fine.
    return Outcome("ok" if finished else "error", outcome.seconds, None if finished else outcome.reason, [record])


def summary(xml: str, finished: bool) -> SuiteRecord:
    """Counts, and a line for each failure, of one JUnit document."""
    cases = ElementTree.fromstring(xml).iter("testcase")
    counts = {"failure": 0, "error": 0, "skipped": 0, "passed": 0}
    failures, seconds = [], 0.0
    for case in cases:
        seconds += float(case.get("time", 0.0))
        ending = next((child for child in case if child.tag in counts), None)
        counts["passed" if ending is None else ending.tag] += 1
        if ending is not None and ending.tag != "skipped":
            lines = (ending.get("message") or ending.text or "").strip().splitlines() or ["no message"]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {lines[0][:300]}")
    return SuiteRecord(
        counts["passed"], counts["failure"], counts["error"], counts["skipped"], seconds, finished, failures[:SHOWN]
    )
