"""The ops that ops.py does not list, with rows or columns 2**30 elements apart: `python -m tests.kernels.places_large_offsets`.

As in large_offsets.py, an offset that wraps crashes the process, unless the interpreter's checks find it first. Prints a line
per place.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch

from tests import conftest  # noqa: F401  (chooses the interpreter before triton is imported)

# isort: split
from fastbert.kernels import reference
from fastbert.kernels.adamw import _launch
from fastbert.kernels.adamw.tables import Parameter, Tables
from fastbert.kernels.core.launch import INTERPRETED
from fastbert.kernels.key_bounds import key_bounds
from fastbert.kernels.linear_cross_entropy import rows as linear_cross_entropy_rows
from fastbert.kernels.packed_rows import packed_rows
from fastbert.kernels.pool_rows import MODES
from fastbert.kernels.row_counts import row_counts
from fastbert.testing.numerics import assert_close
from fastbert.testing.rows import DEVICE

from . import test_gather_rows, test_pool_rows
from .adamw import test_adamw
from .embedding_layernorm import test_embedding_layernorm
from .large_offsets import STRIDE, far_apart, leave_storages_where_they_are

LAYOUTS = {"rows": (3, 40), "columns": (40, 3)}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, torch.float16)


def gather_rows(layout: str, name: str) -> None:
    n_rows, width = LAYOUTS[layout]
    x, dy = normal(n_rows, width), normal(n_rows, width)
    if name == "x":
        x = far_apart(x, layout)
    else:
        dy = far_apart(dy, layout)
    test_gather_rows.check(x, *test_gather_rows.indices(n_rows, n_rows), dy)


def pool_rows(layout: str, name: str) -> None:
    """Rows or columns of x or dy; of the mask sequences or positions."""
    n_rows, width = LAYOUTS[layout]
    options, x, dy = test_pool_rows.all_rows(1, n_rows), normal(n_rows, width), normal(1, width)
    if name == "x":
        x = far_apart(x, layout)
    else:  # a row a sequence, or a position of one sequence a column
        options = test_pool_rows.all_rows(*LAYOUTS[layout])
        x = normal(n_rows * width, 3)
        dy, mask = normal(n_rows, 3), torch.rand(n_rows, width) < 0.7
        if name == "mask":
            options["mask"] = far_apart(mask, layout, dtype=torch.bool)
        else:
            dy = far_apart(dy, layout)
    for mode in MODES:
        test_pool_rows.check(x, mode, options, dy)


def embedding_layernorm(layout: str, name: str) -> None:
    """words: the table, or without ids the words' rows themselves."""
    n_rows, width = LAYOUTS[layout]
    inputs, options = test_embedding_layernorm.make((n_rows,), width, torch.float16, embeds=name == "embeds", vocabulary=n_rows)
    dy = normal(n_rows, width)
    if name == "dy":
        dy = far_apart(dy, layout)
    else:
        inputs["words"] = far_apart(inputs["words"], layout)
    test_embedding_layernorm.check(inputs, options, dy)


def masks(op: str, layout: str) -> None:
    """Rows or columns of masks, which are bytes: three, the last of which begins past 2**31."""
    seen, read = (torch.rand(LAYOUTS[layout]) < rate for rate in (0.7, 0.3))
    far, far_read = (far_apart(mask, layout, dtype=torch.bool) for mask in (seen, read))
    if op == "key_bounds":
        found, expected = [key_bounds(far)], [reference.key_bounds(seen)]
    elif op == "row_counts":
        found, expected = [row_counts(far, far_read)], [reference.row_counts(seen, read)]
    else:
        counts, length = row_counts(seen, read), seen.shape[1]
        capacities = int(seen.sum()), length, True, False, int(read.sum()), length
        found = packed_rows(counts, far, far_read, length, *capacities)
        expected = reference.packed_rows(counts, seen, read, length, *capacities)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def scaled(layout: str) -> None:
    """The multiplication of linear_cross_entropy's gradients by that of the loss."""
    x, ones = normal(*LAYOUTS[layout]), torch.ones((), device=DEVICE)
    y = linear_cross_entropy_rows.scaled(far_apart(x, layout), 2 * ones, ones, x.dtype)
    assert torch.equal(y, 2 * x)


def logits(name: str) -> None:
    """linear_cross_entropy's rows of logits, or the gradients of its losses. Only some of a row's elements exist."""
    x, labels = normal(3, 40), torch.tensor([3, 39, 0], device=DEVICE)
    losses, dlosses = torch.empty(3, device=DEVICE), normal(3, 1)
    given, stride = x, 64
    if name == "logits":
        given, stride = far_apart(x, "rows", last=4096), STRIDE
    else:
        given = normal(3, 64).copy_(torch.nn.functional.pad(x, (0, 24)))[:, :40]
        dlosses = far_apart(dlosses, "rows")
    with patch.object(linear_cross_entropy_rows, "padded", lambda n: stride):
        targets = linear_cross_entropy_rows.Targets(labels, None, None, -100, 0.0)
        linear_cross_entropy_rows.launch_rows(given, None, targets, losses, dlosses[:, 0], True)
    found = []
    for dtype in (torch.float16, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
        found.append({"dx": torch.autograd.grad(y, leaf, dlosses[:, 0].to(dtype))[0], "y": y.detach()})
    results = {"dx": given, "y": losses.half()}
    assert_close(results, *found, relative_fp32=None)


def adamw() -> None:
    """The last program of a tensor with slightly more than 2**31 elements. The others would take the interpreter hours."""
    tail = 5000
    tensors = [torch.empty(2**31 + tail, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    (small,) = test_adamw.make([(tail,)], torch.float16)
    for tensor, values in zip(tensors, small[:4], strict=True):
        tensor[-tail:] = values
    tables, parameter = Tables(), Parameter(*tensors, small.step)
    tables.refresh([parameter], test_adamw.GROUPS)
    (table,) = tables.launches
    chunk = table.chunks = table.chunks[-1:].clone()
    assert chunk[0, 1] >= 2**31
    (expected,) = test_adamw.copies([small])
    reference.adamw([expected], test_adamw.GROUPS)
    _launch(table, None, None)
    found = Parameter(*(tensor[-tail:] for tensor in tensors), parameter.step)
    n = int(2**31 + tail - chunk[0, 1])  # the elements of that program
    assert 1000 < n <= tail
    shares = [Parameter(*(t[-n:] for t in p[:4]), p.step) for p in (found, expected)]
    test_adamw.assert_same([shares[0]], [shares[1]])


PLACES: dict[str, Callable[[], None]] = {
    **{f"{op} {k}": partial(masks, op, k) for op in ("key_bounds", "row_counts", "packed_rows") for k in LAYOUTS},
    **{f"gather_rows {n} {k}": partial(gather_rows, k, n) for n in ("x", "dy") for k in LAYOUTS},
    **{f"pool_rows {n} {k}": partial(pool_rows, k, n) for n in ("x", "mask", "dy") for k in LAYOUTS},
    **{f"embedding_layernorm {n} {k}": partial(embedding_layernorm, k, n) for n in ("words", "embeds", "dy") for k in LAYOUTS},
    **{f"linear_cross_entropy scaled {k}": partial(scaled, k) for k in LAYOUTS},
    **{f"linear_cross_entropy {n}": partial(logits, n) for n in ("logits", "dlosses")},
    "adamw": adamw,
}


def main() -> None:
    if INTERPRETED:
        leave_storages_where_they_are()
    for name, place in PLACES.items():
        torch.manual_seed(0)
        place()
        print(name, flush=True)


if __name__ == "__main__":
    main()
