"""Every kernel compiles whatever its int arguments are: 1, a multiple of 16, or neither. Nothing runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.audit.run import compiling_environment
from fastbert.testing.specs import SPECS

from .test_offsets_lint import kernels

pytestmark = pytest.mark.no_launch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], pytest.param(["--all"], marks=pytest.mark.long)], ids=["one-of-each", "all"])
def test_every_kernel_compiles_at_every_kind_of_int(options):
    """A model with one head, or with one head per rank, exists; so do one row and one key. The planted kernel does not compile.

    Only strides are specialised, which 16-byte loads need; a specialised size would recompile kernels in the middle of
    training.
    """
    with compiling_environment():
        command = [sys.executable, "-m", "tests.kernels.sweep_specialisations", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    planted, swept = lines[0], lines[1:]
    assert planted[2] == ["n_heads", "n_rows"]
    assert [failure.split(":")[0] for failure in planted[4]] == ["every int 1", "n_heads 1"]
    assert {kernel for kernel, *_ in swept} == kernels()
    assert {variant.split()[0] for _, variant, *_ in swept} == SPECS.keys()
    assert not {f"{kernel}, {variant}": failed for kernel, variant, _, _, failed in swept if failed}
    assert all(lowered for *_, lowered, _ in swept)
    assert not {
        f"{kernel} {name}" for kernel, _, names, *_ in swept for name in names if not name.endswith(("_stride", "_strides"))
    }
