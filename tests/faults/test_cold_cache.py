"""Sixteen processes start at once on an empty cache: each gets its kernel, and no partly written file remains."""

import time
from pathlib import Path

import pytest

from .processes import COMPILE, start

PROCESSES = 16
# Imports take different times per process; they wait for each other in order to compile at the same time.
READY = """
Path(sys.argv[1], f"ready-{sys.argv[2]}").touch()
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.01)
"""
LAUNCH = """
import hashlib, sys, time
from pathlib import Path

import torch
from fastbert.kernels import failures
from fastbert.kernels.bias_gelu import bias_gelu

x = torch.linspace(-3, 3, 4096, device="cuda").view(16, 256)
"""


def together(program, n, folder):
    """The output of each of `n` processes, which all pass READY at the same time."""
    cache, gate = folder / "cache", folder / "gate"
    gate.mkdir()
    processes = [start(program, str(gate), str(i), cache=cache) for i in range(n)]
    while len(list(gate.glob("ready-*"))) < n and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    (gate / "go").touch()
    outcomes = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), [err[-1000:] for _, err in outcomes]
    assert len(list(gate.glob("ready-*"))) == n
    leftovers = [path for path in Path(cache).rglob("tmp.*")]
    assert any(Path(cache).iterdir()) and not leftovers, leftovers
    return [out.strip() for out, _ in outcomes]


@pytest.mark.long
def test_compiling(tmp_path):
    printed = together(COMPILE + READY + "print(compile_once(), failures.reasons)", PROCESSES, tmp_path)
    assert len(set(printed)) == 1 and printed[0].endswith(" {}")


@pytest.mark.gpu
@pytest.mark.long
def test_launching(tmp_path):
    program = LAUNCH + READY + "print(hashlib.sha256(bias_gelu(x).cpu().numpy()).hexdigest(), failures.reasons)"
    printed = together(program, PROCESSES, tmp_path)
    assert len(set(printed)) == 1 and printed[0].endswith(" {}")
