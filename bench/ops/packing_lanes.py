"""The lanes of gather_rows: the tokens of a padded batch, packed; its backward puts gradients back between zeros."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.grid import Case, Function, Inputs, Lane, Op
from fastbert.kernels import reference
from fastbert.kernels.gather_rows import gather_rows


def _make(case: Case, generator: torch.Generator, device: str) -> Inputs:
    real = (torch.arange(case.seqlen) < torch.tensor(case.lengths)[:, None]).flatten()
    index = real.nonzero().squeeze(1).to(device, torch.int32)
    inverse = torch.where(real, real.cumsum(0) - 1, -1).to(device, torch.int32)
    x = torch.randn(len(real), case.hidden, generator=generator, device=device)
    dy = torch.randn(len(index), case.hidden, generator=generator, device=device)
    return Inputs({"x": x}, {"index": index, "inverse": inverse}, dy)


def _indexed(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """As transformers' own unpadding does it; the backward of indexing scatters."""
    return x[index]


def _compiled(case: Case) -> Function:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return _lane(torch.compile(_indexed, dynamic=False, backend=backend))


def _lane(call: Any) -> Function:
    return lambda inputs, p: call(**inputs.leaves, **inputs.context)


OP = Op(
    _make,
    lambda inputs, p: reference.gather_rows(**inputs.leaves, **inputs.context),
    {
        "eager": Lane(lambda case: _lane(_indexed)),
        "compile": Lane(_compiled),
        "fastbert": Lane(lambda case: _lane(gather_rows)),
    },
)
