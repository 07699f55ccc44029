"""Offsets past 2**31 elements: rows so far apart in one tensor that a 32-bit product would wrap."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastbert.kernels.core.launch import INTERPRETED
from fastbert.testing.specs import ROW_OPS, SPECS

pytestmark = pytest.mark.no_launch  # launched and counted in a process of its own

ROOT = Path(__file__).parents[2]
# Attention's are in attention/test_offsets.py, and a layer launches other ops' kernels. Operands of feed_forward's products are
# contiguous, so its offsets are only read off its IR (test_offsets_lint.py).
OTHERS = SPECS.keys() - {op.name for op in ROW_OPS} - {"attention", "encoder_layer", "feed_forward"}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("op, name", [(op, name) for op in ROW_OPS for name in (*op.rows, "dy")], ids=str)
def test_rows_or_columns_far_apart(op, name, layout):
    command = [sys.executable, "-m", "tests.kernels.large_offsets", op.name, layout, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), f"exit {done.returncode}\n{done.stderr[-2000:]}"


def test_other_ops_far_apart():
    """All places of the ops that ops.py does not list, in one process."""
    command = [sys.executable, "-m", "tests.kernels.places_large_offsets"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    places = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} after {places}\n{done.stderr[-2000:]}"
    assert len(places) == 27 and {place.split()[0] for place in places} == OTHERS


@triton.jit
def narrow_kernel(x_ptr, y_ptr, x_row_stride, CUT: tl.constexpr):
    """What the checks must find: an offset that is computed in 32 bits, or truncated to them."""
    rows = tl.arange(0, 4)
    offsets = (rows.to(tl.int64) * x_row_stride).to(tl.int32) if CUT else rows * x_row_stride
    tl.store(y_ptr + rows, tl.load(x_ptr + offsets, rows < 0, other=1.0))


@pytest.mark.skipif(not INTERPRETED, reason="the checks are the interpreter's")
@pytest.mark.parametrize("cut", [False, True])
def test_the_overflow_checks_find_what_wraps(cut):
    x, y = torch.zeros(4), torch.zeros(4)
    narrow_kernel[(1,)](x, y, 2**29, CUT=cut)
    assert y.all()
    with pytest.raises(InterpreterError, match="int32 does not hold"):
        narrow_kernel[(1,)](x, y, 2**30, CUT=cut)
