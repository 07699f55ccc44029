"""A pytest plugin (`-p bench.runner.pytest_log --test-log FILE`): one line of JSON a finished test, written at once.

JUnit's XML is written when a session ends; where time runs out there is none. These lines are there in any case.
"""

import json
import re

import pytest

BFLOAT16 = re.compile("bfloat16|bf16")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-log", help="a line of JSON for every finished test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """bfloat16 first in each file: what nothing but a GPU can show."""
    files: dict[object, int] = {}
    items.sort(key=lambda item: (files.setdefault(item.path, len(files)), BFLOAT16.search(item.name) is None))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where pytest reports: under pytest-xdist in the controlling process, for the tests of all workers."""
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.when != "call" and report.failed else report.outcome
        _write(report.nodeid, outcome, report.duration, report.longreprtext)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(report.nodeid, "error", 0.0, report.longreprtext)


_path: str | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _path
    _path = None if hasattr(config, "workerinput") else config.getoption("--test-log")


def _write(test: str, outcome: str, seconds: float, text: str) -> None:
    if _path:
        with open(_path, "a") as file:
            print(json.dumps({"test": test, "outcome": outcome, "seconds": seconds, "text": text[-2000:]}), file=file)
