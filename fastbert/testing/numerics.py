"""Applies the rule of fastbert.numerics to named tensors, for all numerical tests. No test has its own tolerance."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastbert.numerics import Comparison, compare

Named = Mapping[str, Tensor | None]

# Extra roundings (eps of the dtype times the largest element) allowed beside twice eager's own error, where PyTorch computes
# in the same precision as the kernel. In float32 eager may be accurate by luck on a small tensor. In float64 eager's error
# cannot be measured, because the reference is no more accurate; 84 corresponds to 1e-5 in float32.
ROUNDINGS = {torch.float32: 8, torch.float64: 84}


def comparisons(results: Named, eager: Named, reference: Named, *, relative_fp32: float | None = 1e-5) -> list[Comparison]:
    """One Comparison per tensor. None (no gradient) must be None in kernel and eager alike."""
    assert results and results.keys() == eager.keys() == reference.keys(), (results.keys(), eager.keys())
    judged = []
    for name, result in results.items():
        if result is None and eager[name] is None:
            continue
        assert result is not None and eager[name] is not None, f"{name}: only one of kernel and eager gives it"
        atol = ROUNDINGS.get(result.dtype, 0) * torch.finfo(result.dtype).eps * _largest_finite(reference[name])
        judged.append(compare(name, result, eager[name], reference[name], atol=atol, relative_fp32=relative_fp32))
    return judged


def assert_close(results: Named, eager: Named, reference: Named, *, relative_fp32: float | None = 1e-5) -> None:
    """Fail, naming every tensor that is wrong, unless `results` match `eager` within the bound.

    All three map the same names (of outputs and gradients) to tensors. `relative_fp32` is for single ops; for a whole model,
    whose errors add up from layer to layer, pass None.
    """
    judged = comparisons(results, eager, reference, relative_fp32=relative_fp32)
    assert judged, "no tensor was compared"
    failures = [f"{c.name}: {c.reason}" for c in judged if not c.ok]
    assert not failures, "\n".join(failures)


def _largest_finite(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
