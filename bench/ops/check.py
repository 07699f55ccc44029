"""Whether a lane computes the right thing: the rule of fastbert/testing/numerics.py, on the very inputs that are then timed.

Dropout is off for the check, since no two implementations draw the same bits; the tests of the kernels replay it.
"""

import torch
from torch import Tensor

from bench.ops.grid import DTYPES, Case, Function, Inputs, Lane, Op, run
from fastbert.testing.numerics import comparisons


class Checker:
    """The reference of one case in its dtype and in float64, worked out once for all its lanes."""

    def __init__(self, op: Op, case: Case, inputs: Inputs) -> None:
        self.inputs = inputs
        self.half = DTYPES[case.dtype].itemsize == 2
        self.eager = self._real(run(op.reference, inputs, 0.0))
        self.exact = self._real(run(op.reference, inputs.converted(torch.float64), 0.0))

    def problem(self, lane: Lane, function: Function) -> str | None:
        """What is wrong with the lane's output and gradients, a line each, or None."""
        found = self._real(run(function, self.inputs.packed() if lane.packed else self.inputs, 0.0))
        # A 16-bit lane's float32 sums come from 16-bit numbers; only true float32 is held to 1e-5.
        judged = comparisons(found, self.eager, self.exact, relative_fp32=None if self.half else 1e-5)
        return "\n".join(f"{c.name}: {c.reason}" for c in judged if not c.ok) or None

    def _real(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Padded rows hold whatever a lane leaves there, so they are not compared."""
        return {name: self.inputs.real(x) for name, x in results.items()}
