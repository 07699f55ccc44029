"""Checks in Triton's IR that all kernels compute offsets in 64 bits: `python -m tests.kernels.lint_offsets [--all]`.

Each variant of fastbert/testing/specs is launched as the audit launches it, on tensors of more than 2**31 elements that take no
memory and with every stride as large as 32 bits hold, lowered to Triton's IR for sm_90 and searched by ranges.py. Prints a line
of JSON per kernel: its name, the variant and the findings. Without --all only variants that differ in more than dtype and
width. Runs in a process of its own, because nothing compiles under the interpreter.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir

from bench.audit.compile import Launch, compile_launch, record
from fastbert.kernels.core.configs import Config
from fastbert.testing.specs import SPECS
from fastbert.testing.specs.embedding_layernorm import EMBEDDED
from tests.kernels.ranges import wrapped_offsets

ARCHITECTURE = "sm_90"
TOKENS = EMBEDDED * 2**17  # with 384 columns and more
ROWS = {"adamw": 2**33, "attention": 2**14}  # attention: sequences
STRIDE = 2**31 - 128
# Arguments that the launcher makes contiguous. Token ids: their offsets are token numbers, which fit 32 bits. Operands of
# feed_forward's products: a row is H elements, and a tile has 128 of them.
CONTIGUOUS = ("position_batch_stride", "type_batch_stride", "inner_stride")


def lower(source: Any, target: Any = None, options: Any = None, **_: Any) -> str:
    """triton.compile up to the first stage and without its cache, in a fiftieth of the time."""
    backend = triton.compiler.make_backend(target)
    options, context, stages = backend.parse_options(options), ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(stages["ttir"](source.make_ir(target, options, functions, modules, context), {}))


def findings(launched: Launch) -> list[str]:
    strides = {n: STRIDE for n in launched.arguments if n.endswith("_stride") and n not in CONTIGUOUS}
    all_strides = {n: (STRIDE,) * len(value) for n, value in launched.arguments.items() if n.endswith("_strides")}
    arguments = launched.arguments | strides | all_strides
    text = compile_launch(ARCHITECTURE, replace(launched, arguments=arguments))
    integers = {name: value for name, value in arguments.items() if type(value) is int}
    for name in all_strides:
        integers |= dict.fromkeys(members(text, name), STRIDE)
    return wrapped_offsets(text, integers, launched.programs)


def members(text: str, name: str) -> list[str]:
    """Triton's names for the elements of the argument `name`, a tuple."""
    signature = next(line for line in text.splitlines() if "tt.func" in line)
    return re.findall(rf"%({name}[._]?\d*): i", signature)


def launches(every: bool) -> Iterator[tuple[str, Launch]]:
    seen = set()
    for op, spec in SPECS.items():
        for variant in spec.variants():
            form = replace(variant, dtype="", width=0)
            if form in seen and not every:
                continue
            seen.add(form)
            for launched in record(ARCHITECTURE, variant, ROWS.get(op, TOKENS)):
                yield variant.name, launched


@triton.jit
def narrow_kernel(x_ptr, y_ptr, x_row_stride, x_strides, WHICH: tl.constexpr, N_COLS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets that the search must find: 32-bit numbers that are multiplied, or truncated afterwards."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if WHICH == "a stride":
        offsets = rows * x_row_stride
    elif WHICH == "one of the strides":
        offsets = rows * x_strides[1]
    elif WHICH == "a width":
        offsets = (rows * N_COLS).to(tl.int64)
    elif WHICH == "cut":
        offsets = (rows.to(tl.int64) * x_row_stride).to(tl.int32)
    elif WHICH == "loaded":
        offsets = tl.load(y_ptr + rows) * N_COLS
    elif WHICH == "counted":
        offsets = rows
        for row in range(0, tl.num_programs(0) * BLOCK_M):
            offsets = row * N_COLS + rows % N_COLS
    else:
        offsets = rows.to(tl.int64) * x_row_stride + rows % N_COLS
    tl.store(y_ptr + offsets, tl.load(x_ptr + rows))


def planted() -> Iterator[tuple[str, Launch]]:
    for which in ("a stride", "one of the strides", "a width", "cut", "loaded", "counted", "none"):
        x = torch.empty(1, dtype=torch.int32, device="meta")
        arguments = {"x_ptr": x, "y_ptr": x, "x_row_stride": 768, "x_strides": (768, 768)}
        arguments |= {"WHICH": which, "N_COLS": 768, "BLOCK_M": 4}
        yield which, Launch(narrow_kernel, TOKENS // 4, Config(4, 4), arguments)


if __name__ == "__main__":
    with patch.object(triton.compiler, "compile", lower):
        for name, launched in (*planted(), *launches(every="--all" in sys.argv)):
            print(json.dumps([launched.kernel.__name__, name, findings(launched)]), flush=True)
