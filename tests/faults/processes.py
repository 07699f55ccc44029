"""Runs Python in a separate process, from the checkout, where kernels are compiled and not interpreted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# compile_once() compiles gather_rows' kernel for sm_90 instead of launching it, so no GPU is needed.
COMPILE = """
import hashlib, sys, time
from pathlib import Path

import triton
from bench.audit import compile
from fastbert.kernels.core import failures, launch
from fastbert.testing.specs import SPECS

variant = next(iter(SPECS["gather_rows"].variants()))
recorded = compile.record("sm_90", variant)[0]
triton.runtime.driver.set_active(compile._AbsentDevice(90))


class Compiled:
    __name__ = recorded.kernel.__name__

    def __getitem__(self, grid):
        def compile_only(**arguments):
            self.cubin = recorded.kernel.warmup(grid=grid, **arguments).asm["cubin"]
        return compile_only


compiled = Compiled()


def compile_once():
    launch.launch(compiled, recorded.programs, recorded.config, recorded.arguments["x_ptr"], **recorded.arguments)
    return hashlib.sha256(compiled.cubin).hexdigest()


"""


def start(program: str, *arguments: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
