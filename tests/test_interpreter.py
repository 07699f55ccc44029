"""The interpreter of our own programs, made quicker, gives what Triton's gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interpreter_cases import table

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing is interpreted")
def test_every_operation_gives_what_tritons_gives():
    """Bitwise, with types, sizes and errors, in a process in which nothing is replaced."""
    command = [sys.executable, "-m", "tests.interpreter_cases"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    expected = json.loads(done.stdout)
    found = json.loads(json.dumps(table()))
    assert len(expected) > 10_000
    assert {name: found[name] for name in expected if found[name] != expected[name]} == {}
