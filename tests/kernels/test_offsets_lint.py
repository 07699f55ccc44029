"""No kernel computes an offset in 32 bits, according to Triton's IR for tensors past 2**31 elements. Nothing runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.audit.run import compiling_environment
from fastbert.testing.specs import SPECS

from .ranges import wrapped_offsets

pytestmark = pytest.mark.no_launch

ROOT = Path(__file__).parents[2]


def lint(*options):
    """{kernel: {variant: findings}}, from a process in which Triton compiles."""
    with compiling_environment():
        command = [sys.executable, "-m", "tests.kernels.lint_offsets", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, list[str]]] = {}
    for kernel, variant, findings in map(json.loads, done.stdout.splitlines()):
        found.setdefault(kernel, {})[variant] = findings
    return found


def kernels():
    """The kernels defined in kernels/, by their names' ending."""
    sources = "\n".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    return set(re.findall(r"^@triton.jit[^\n]*\ndef (\w+_kernel)\(", sources, re.MULTILINE))


# Kernels whose offsets count rows, of which their launcher allows no more than MAX_RANKED; the search knows no such bound.
OF_FEW_ROWS = ["embedding_layernorm_bwd_order_kernel"]


@pytest.mark.parametrize("options", [[], pytest.param(["--all"], marks=pytest.mark.long)], ids=["one-of-each", "all"])
def test_no_kernel_has_an_offset_that_wraps(options):
    """The search also finds the offsets that do wrap, which are planted in a kernel of its own."""
    found = lint(*options)
    planted = found.pop("narrow_kernel")
    assert not planted.pop("none")
    assert len(planted) == 6 and all(planted.values()), planted
    assert found.keys() == kernels()
    few = {kernel: found.pop(kernel) for kernel in OF_FEW_ROWS}
    assert all(any(variants.values()) for variants in few.values()), "not needed in OF_FEW_ROWS any more"
    wrapped = {f"{kernel}, {variant}": f for kernel, variants in found.items() for variant, f in variants.items() if f}
    assert not wrapped
    assert {variant.split()[0] for variants in found.values() for variant in variants} == SPECS.keys()


IR = """
  tt.func public @kernel(%x_ptr: !tt.ptr<f32>, %stride: i32, %n: i64) {{
    %pid = tt.get_program_id x : i32
    {lines}
    %p = tt.addptr %x_ptr, %off : !tt.ptr<f32>, i32
"""


@pytest.mark.parametrize(
    "lines, wraps",
    [
        ("%off = arith.muli %pid, %stride : i32", True),
        ("%a = arith.extsi %pid : i32 to i64\n %off = arith.muli %a, %n : i64", False),
        ("%a = arith.extsi %pid : i32 to i64\n %b = arith.muli %a, %n : i64\n %off = arith.trunci %b : i64 to i32", True),
        ("%c = arith.constant 8 : i32\n %a = arith.remsi %pid, %c : i32\n %off = arith.muli %a, %stride : i32", False),
        ("%c = arith.constant 8 : i32\n %a = arith.muli %pid, %stride : i32\n %off = arith.remsi %a, %c : i32", True),
        ("%a = tt.load %i_ptr : !tt.ptr<i32>\n %off = arith.addi %a, %pid : i32", False),
        ("%a = tt.load %i_ptr : !tt.ptr<i32>\n %off = arith.muli %a, %stride : i32", True),
        ("scf.for %i = %pid to %n step %c {\n %off = arith.muli %i, %stride : i32\n", True),
    ],
)
def test_the_search_itself(lines, wraps):
    """A million programs and a stride of 4096: their product is 2**32."""
    assert bool(wrapped_offsets(IR.format(lines=lines), {"stride": 4096, "n": 4096}, 2**20)) == wraps
