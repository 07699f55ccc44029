"""The same rows in other memory layouts. What lies between and around them is NaN, so that a wrong read shows."""

import torch
from torch import Tensor


def contiguous(rows: Tensor) -> Tensor:
    return rows.clone()


def transposed(rows: Tensor) -> Tensor:
    return rows.t().contiguous().t()


def sliced(rows: Tensor) -> Tensor:
    """Every second column of every third row of a larger tensor."""
    larger = rows.new_full((3 * rows.shape[0], 2 * rows.shape[1]), torch.nan)
    view = larger[::3, ::2]
    return view.copy_(rows)


def expanded(rows: Tensor) -> Tensor:
    """The first row, repeated: row stride 0, as in the gradient of a sum over rows."""
    return rows[:1].clone().expand_as(rows)


def offset(rows: Tensor) -> Tensor:
    """Contiguous, from an odd offset in its storage, so that it is not aligned to 16 bytes."""
    storage = rows.new_full((rows.numel() + 10,), torch.nan)
    return storage[3 : 3 + rows.numel()].view(rows.shape).copy_(rows)


LAYOUTS = (contiguous, transposed, sliced, expanded, offset)


def guarded(tensor: Tensor) -> Tensor:
    """Contiguous, between two bands of NaN, each as long as the tensor and at least 64 elements."""
    band = max(64, tensor.numel())
    storage = tensor.new_full((tensor.numel() + 2 * band,), torch.nan)
    return storage[band : band + tensor.numel()].view(tensor.shape).copy_(tensor)
