"""One case of test_large_offsets.py, in a process of its own: `python -m tests.kernels.large_offsets OP LAYOUT NAME`.

A kernel whose offsets wrap reads outside of its tensor, which crashes the process instead of failing an assertion.
"""

import sys

import torch
from torch import Tensor

from tests import conftest  # noqa: F401  (chooses the interpreter before triton is imported)

# isort: split
from fastbert.testing.rows import DEVICE, check, make_inputs
from fastbert.testing.specs import SPECS

SHORT, STRIDE = 40, 2**30 + 24  # the third row, or column, begins past 2**31


def far_apart(values: Tensor, layout: str, last: int = SHORT, dtype: torch.dtype = torch.float16) -> Tensor:
    """Rows (or columns) of float16, or of `dtype`, 2**30 elements apart.

    Only pages that are touched take memory, not the gaps.

    `last`: number of elements of the last row.
    """
    storage = torch.empty(2 * STRIDE + last, dtype=dtype, device=DEVICE)
    assert storage.numel() > 2**31
    return storage.as_strided(values.shape, (STRIDE, 1) if layout == "rows" else (1, STRIDE)).copy_(values)


def leave_storages_where_they_are() -> None:
    """After a launch the interpreter copies each storage back, even onto itself: here 4 GiB that nothing touched."""
    copy = torch.UntypedStorage.copy_

    def copy_elsewhere(self, source, *rest):
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *rest)

    torch.UntypedStorage.copy_ = copy_elsewhere


def main(op_name: str, layout: str, name: str) -> None:
    leave_storages_where_they_are()
    op = SPECS[op_name]
    shape = (3, SHORT) if layout == "rows" else (SHORT, 3)
    inputs, dy = make_inputs(op, shape, torch.float16), torch.randn(shape).to(DEVICE, torch.float16)
    if name == "dy":
        dy = far_apart(dy, layout)
    else:
        inputs[name] = far_apart(inputs[name], layout)
    check(op, inputs, dy)
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
