"""A pytest plugin that records a run line by line, so that a run that dies shows how far it got."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest


class Witness:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _say(self, what: str, nodeid: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{what} {nodeid}\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say("uncollected", report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say("started", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say("failed", report.nodeid)
        elif report.passed and report.when == "call":
            self._say("passed", report.nodeid)


@dataclass
class Statement:
    """Node ids by outcome."""

    uncollected: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


def statement(path: Path) -> Statement:
    found = Statement()
    for line in path.read_text().splitlines() if path.exists() else ():
        what, _, nodeid = line.partition(" ")
        getattr(found, what).append(nodeid)
    return found
