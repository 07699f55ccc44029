"""One case of test_offsets.py, in a process of its own:
`python -m tests.kernels.attention.large_offsets NAME DIMENSION`.

As in tests/kernels/large_offsets.py, an offset that wraps crashes the process instead of failing an assertion.
"""

import sys

import torch
from torch import Tensor

from fastbert.testing.attention import check, make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE
from tests import conftest  # noqa: F401  (chooses the interpreter before triton is imported)

from ..large_offsets import STRIDE, leave_storages_where_they_are

SHAPE, SMALL = (3, 3, 3, 8), 4096  # the third entry of each dimension begins past 2**31


def far_apart(values: Tensor, dim: int) -> Tensor:
    """float16, with adjacent entries of `dim` 2**30 elements apart. Only pages that are touched take memory."""
    storage = torch.empty((values.shape[dim] - 1) * STRIDE + SMALL, dtype=torch.float16, device=DEVICE)
    assert storage.numel() > 2**31
    strides = list(values.select(dim, 0).contiguous().stride())
    strides.insert(dim % values.dim(), STRIDE)
    return storage.as_strided(values.shape, strides).copy_(values)


def main(name: str, dimension: str) -> None:
    leave_storages_where_they_are()
    dim = int(dimension)
    batch, length, heads, head_size = SHAPE
    head_size = 3 if dim == 3 and name != "mask" else head_size
    inputs = make_inputs(batch, length, heads, head_size, torch.float16)
    dy, options = normal(batch, length, heads, head_size, dtype=torch.float16), {}
    if name == "packed":  # a sequence of one row and one of two: the second starts, and ends, past 2**31
        bounds = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)
        options = {"cu_seqlens": bounds, "max_seqlen": 2}
        inputs, dy = {key: far_apart(x[0], dim) for key, x in inputs.items()}, far_apart(dy[0], dim)
    elif name == "mask":
        options["mask"] = far_apart(normal(batch, heads, length, length, dtype=torch.float16), dim)
    elif name == "dy":
        dy = far_apart(dy, dim)
    else:
        inputs[name] = far_apart(inputs[name], dim)
    with tiles((16, 16)):
        check(inputs, dy, **options)
    check(inputs, dy, **options)  # by the kernel for short sequences, unless there is a general mask
    print("right")


if __name__ == "__main__":
    main(*sys.argv[1:])
