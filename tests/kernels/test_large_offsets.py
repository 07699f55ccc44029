"""Offsets past 2**31 elements: rows so far apart in one tensor that a 32-bit product would come back round."""

import subprocess
import sys
from pathlib import Path

import pytest

from .ops import OPS

pytestmark = [pytest.mark.long, pytest.mark.no_launch]  # launched in a process of its own, and counted there

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("op, name", [(op, name) for op in OPS for name in (*op.rows, "dy")], ids=str)
def test_rows_or_columns_far_apart(op, name, layout):
    command = [sys.executable, "-m", "tests.kernels.large_offsets", op.name, layout, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), f"exit {done.returncode}\n{done.stderr[-2000:]}"
