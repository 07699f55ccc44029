"""Runs the command line in this process, which saves ten seconds of imports."""

import sys
from typing import NamedTuple

import pytest

from fastbert.cli.commands import main


class Answer(NamedTuple):
    """What a command line leaves behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def fastbert_says(monkeypatch, capsys):
    """Run `fastbert ARGUMENTS`; returns the exit code and what it printed."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Answer(stop.value.code, *capsys.readouterr())

    return run
