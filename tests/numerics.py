"""The assertion every numerical test uses: fastbert.numerics' rule over named tensors. No test has its own tolerance."""

from collections.abc import Mapping

from torch import Tensor

from fastbert.numerics import compare

Named = Mapping[str, Tensor | None]


def assert_close(results: Named, eager: Named, reference: Named, *, relative_fp32: float | None = 1e-5) -> None:
    """Fail, naming every tensor that does, unless `results` hold what `eager` holds, within the bound.

    The three map names (of outputs and of gradients) to tensors; None stands for a gradient that is not there, and
    has to be None in `results` exactly where it is in `eager`. `relative_fp32` is for single ops; a whole model, whose
    errors add up from layer to layer, passes None.
    """
    assert results and results.keys() == eager.keys() == reference.keys(), (results.keys(), eager.keys())
    failures = []
    for name, result in results.items():
        if result is None or eager[name] is None:
            if result is not eager[name]:
                failures.append(f"{name}: one of kernel and eager has None")
            continue
        comparison = compare(name, result, eager[name], reference[name], relative_fp32=relative_fp32)
        if not comparison.ok:
            failures.append(f"{name}: {comparison.reason}")
    assert not failures, "\n".join(failures)
