"""Compiles every kernel for every kind of its int arguments: `python -m tests.kernels.sweep_specialisations [--all]`.

Triton specialises a kernel for an int that is 1, which it makes a constant, and for one that 16 divides. A kernel that compiles
for every model so far may not compile for a model of one head. Each variant of fastbert/testing/specs is launched as the audit
launches it, with its ints changed, and lowered to Triton's IR for sm_90. Prints a line of JSON per launch: the kernel, the
variant, the ints that are specialised, how often it was lowered, and the changes for which that failed. Without --all only
variants that differ in more than dtype and width, and after a kernel's first variant only 1, for one int in four by itself.
Runs in a process of its own, because nothing compiles under the interpreter.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from bench.audit.compile import Launch, compile_launch
from fastbert.kernels.core.configs import Config
from tests.kernels.lint_offsets import ARCHITECTURE, launches, lower

KINDS = (1, 16, 17)
ONE_IN = 4


def ints(launched: Launch) -> list[str]:
    """The ints that are not constexpr."""
    constants = {parameter.name for parameter in launched.kernel.params if parameter.is_constexpr}
    return [name for name, value in launched.arguments.items() if type(value) in (int, tuple) and name not in constants]


def changed(launched: Launch, name: str, kind: int) -> int | tuple[int, ...]:
    """The argument `name`, one int or several, all of this kind."""
    value = launched.arguments[name]
    return (kind,) * len(value) if isinstance(value, tuple) else kind


def specialised(launched: Launch) -> list[str]:
    return [p.name for p in launched.kernel.params if p.name in ints(launched) and not p.do_not_specialize]


def changes(launched: Launch, before: int, every: bool) -> Iterator[tuple[list[str], int]]:
    """Names and a kind: all at once, then each by itself; `before`: the number of earlier variants of this kernel."""
    names = ints(launched)
    for kind in KINDS if every or not before else KINDS[:1]:
        yield names, kind
    for place, name in enumerate(names):
        if every or not before or (place + before) % ONE_IN == 0:
            for kind in KINDS if every else KINDS[:1]:
                yield [name], kind


def failures(launched: Launch, before: int, every: bool) -> tuple[int, list[str]]:
    lowered, failed = 0, []
    for names, kind in changes(launched, before, every):
        arguments = launched.arguments | {name: changed(launched, name, kind) for name in names}
        try:
            compile_launch(ARCHITECTURE, replace(launched, arguments=arguments))
            lowered += 1
        except triton.compiler.errors.CompilationError as error:
            what = "every int" if len(names) > 1 else names[0]
            failed.append(f"{what} {kind}: {str(error).splitlines()[-1]}")
    return lowered, failed


@triton.jit
def converting_kernel(y_ptr, n_heads, n_rows, BLOCK_M: tl.constexpr):
    """What the sweep must find: an int that is 1 is a constant, which has no `to`."""
    tl.store(y_ptr + n_heads.to(tl.int64) * n_rows, tl.program_id(0))


def planted() -> tuple[str, Launch]:
    y = torch.empty(1, dtype=torch.int32, device="meta")
    return "planted", Launch(converting_kernel, 1, Config(4, 4), {"y_ptr": y, "n_heads": 12, "n_rows": 5, "BLOCK_M": 4})


if __name__ == "__main__":
    every, seen = "--all" in sys.argv, Counter[str]()
    with patch.object(triton.compiler, "compile", lower):
        for variant, one in (planted(), *launches(every)):
            name = one.kernel.__name__
            print(json.dumps([name, variant, specialised(one), *failures(one, seen[name], every)]), flush=True)
            seen[name] += 1
