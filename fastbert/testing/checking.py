"""Checks any op by its spec: the public function against its reference, on the spec's own inputs."""

from typing import Any

import torch
from torch import Tensor

from .numerics import assert_close
from .rows import DEVICE
from .spec import Draw, OpSpec, Size


def check(spec: OpSpec, size: Size, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Check results and every gradient against eager and float64, without dropout; integers must be equal. Returns results."""
    given = spec.inputs(size, Draw(DEVICE), dtype, **{name: x for name, x in options.items() if name != "p"})
    results, eager = spec.run(given), spec.run(given, spec.reference)
    assert results and results.keys() == eager.keys(), (results.keys(), eager.keys())
    for name, x in results.items():
        assert x.is_floating_point() or torch.equal(x, eager[name]), name
    if given.leaves:
        exact = spec.run(given.converted(torch.float64), spec.reference)
        # A float32 sum of 16-bit numbers has the accuracy of a 16-bit number, in eager too.
        assert_close(results, eager, exact, relative_fp32=None if dtype.itemsize == 2 else 1e-5)
    return results
