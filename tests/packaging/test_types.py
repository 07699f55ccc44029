"""pyright finds no fault in fastbert, and knows every type of the public API."""

import json
import os
import subprocess
import sys

import pytest

import fastbert

from .environments import ROOT
from .public_api import referred


def pyright(*arguments: str) -> dict:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_pyright_finds_no_fault() -> None:
    found = pyright()
    assert found["summary"]["filesAnalyzed"] > 100
    errors = [error for error in found["generalDiagnostics"] if error["severity"] == "error"]
    assert errors == [], json.dumps(errors, indent=1)


@pytest.mark.long  # follows every import
def test_every_type_of_the_public_api_is_known() -> None:
    symbols = pyright("--verifytypes", "fastbert", "--ignoreexternal")["typeCompleteness"]["symbols"]
    values = [getattr(fastbert, name) for name in fastbert.__all__]
    public = [f"{value.__module__}.{value.__qualname__}" for value in [*values, *referred(values)]]
    of_api = [symbol for symbol in symbols if any(f"{symbol['name']}.".startswith(f"{name}.") for name in public)]
    assert {symbol["name"] for symbol in of_api} >= set(public)
    unknown = {symbol["name"]: symbol["diagnostics"] for symbol in of_api if not symbol["isTypeKnown"]}
    assert unknown == {}, json.dumps(unknown, indent=1)
