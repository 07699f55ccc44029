"""Builds an op's inputs, reference and lanes from its spec: eager, compiled eager, peers, and fastbert's own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.ops.grid import DTYPES, Case, Function, Inputs, Lane, Op
from fastbert.testing.spec import Draw, OpSpec


def op_of(spec: OpSpec, peers: Mapping[str, Lane] | None = None, more: Mapping[str, Lane] | None = None) -> Op:
    """The op with its lanes: `peers` before fastbert's lane, `more` after it."""

    def make(case: Case, draw: Draw) -> Inputs:
        return spec.inputs(case.size, draw, DTYPES[case.dtype])

    eager = spec.eager or spec.reference
    lanes = {"eager": calling(spec, eager), "compile": _compiled(spec, eager), **(peers or {})}
    lanes |= {"fastbert": calling(spec, spec.call), **(more or {})}
    return Op(make, lambda inputs, p: spec.reference(**inputs.leaves, **inputs.context), lanes)


def calling(spec: OpSpec, call: Callable[..., Tensor]) -> Lane:
    """A lane that passes all arguments by name, with p if the op has dropout."""

    def run(inputs: Inputs, p: float) -> Tensor:
        options: dict[str, Any] = {"p": p} if spec.dropout else {}
        with inputs.within():
            return call(**inputs.leaves, **inputs.context, **options)

    return Lane(lambda case: run)


def _compiled(spec: OpSpec, call: Callable[..., Tensor]) -> Lane:
    def build(case: Case) -> Function:
        # Without a GPU a dry run tries the tracing only; generating C++ would take most of its time.
        backend = "inductor" if torch.cuda.is_available() else "aot_eager"
        return calling(spec, torch.compile(call, dynamic=False, backend=backend)).build(case)

    return Lane(build)
