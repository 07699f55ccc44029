"""torch.library.opcheck on a custom op, and which ops there are."""

from typing import Any

import torch


def opcheck(op: Any, *arguments: Any) -> None:
    """All four checks pass: schema, fake tensors, autograd registration and AOT dispatch."""
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4, results


def registered() -> set[str]:
    """The names of all custom ops of fastbert, without the namespace."""
    import fastbert.kernels.feed_forward  # an op that no layer calls by itself
    import fastbert.ops  # noqa: F401  (importing the kernels registers them)

    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fastbert::") for name in names if name.startswith("fastbert::")}
