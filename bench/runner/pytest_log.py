"""A pytest plugin (`-p bench.runner.pytest_log --test-log FILE`) that writes one line of JSON per finished test at once.

JUnit's XML is written at the end of a session, so there is none if time runs out. These lines exist in either case.
"""

import json
import re

import pytest

BFLOAT16 = re.compile("bfloat16|bf16")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-log", help="file for one line of JSON per finished test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run bfloat16 tests first in each file, because only a GPU can run them."""
    files: dict[object, int] = {}
    items.sort(key=lambda item: (files.setdefault(item.path, len(files)), BFLOAT16.search(item.name) is None))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the line of a finished test. Under pytest-xdist the controlling process calls this for all workers."""
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
