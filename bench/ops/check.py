"""Checks a lane's results by the rule of fastbert/testing/numerics.py, on the same inputs that are timed afterwards.

Dropout is off during the check, because no two implementations draw the same bits. Kernel tests replay dropout.
"""

import torch
from torch import Tensor

from bench.ops.grid import DTYPES, Case, Function, Inputs, Lane, Op, run
from fastbert.testing.numerics import comparisons


class Checker:
    """Holds the reference results of one case, in its dtype and in float64, for all its lanes."""

    def __init__(self, op: Op, case: Case, inputs: Inputs) -> None:
        self.inputs = inputs
        self.half = DTYPES[case.dtype].itemsize == 2
        self.eager = self._real(run(op.reference, inputs, 0.0))
        self.exact = self._real(run(op.reference, inputs.converted(torch.float64), 0.0))

    def problem(self, lane: Lane, function: Function) -> str | None:
        """What is wrong with the lane's output and gradients, one line each; None if nothing is."""
        found = self._real(run(function, self.inputs.packed() if lane.packed else self.inputs, 0.0))
        # float32 sums of a 16-bit lane come from 16-bit numbers, so the limit of 1e-5 is for float32 lanes only.
        judged = comparisons(found, self.eager, self.exact, relative_fp32=None if self.half else 1e-5)
        return "\n".join(f"{c.name}: {c.reason}" for c in judged if not c.ok) or None

    def _real(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Select the real rows: the contents of padded rows are unspecified."""
        return {name: self.inputs.real(x) for name, x in results.items()}
