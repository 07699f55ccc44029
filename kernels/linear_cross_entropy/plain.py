"""The launchers' twins in plain PyTorch, see core/plain.py."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core import plain

if TYPE_CHECKING:
    from .rows import Targets


def launch_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: "Targets",
    losses: Tensor | None,
    dlosses: Tensor | None,
    gradient: bool,
    scale: float = 1.0,
) -> None:
    """Write the losses of rows of logits to `losses` and, with `gradient`, their gradients over the logits."""
    n_cols, smoothing = logits.shape[1], targets.label_smoothing
    x = plain.upcast(logits) if bias is None else plain.upcast(logits) + bias[:n_cols]
    counted = targets.labels != targets.ignore_index
    at = torch.where(counted, targets.labels, 0)[:, None]
    logs = x.log_softmax(1)
    weights = x.new_ones(n_cols) if targets.class_weights is None else targets.class_weights[:n_cols]
    at_label = (1.0 - smoothing) * weights[at]
    if losses is not None:
        loss = -(at_label * logs.gather(1, at))[:, 0]
        if smoothing:
            loss -= smoothing * (logs * weights).mean(1)
        losses.copy_(torch.where(counted, loss, 0.0))
    if gradient:
        whole = at_label + smoothing * weights.mean() if smoothing else at_label
        spread = smoothing / n_cols * weights if smoothing else 0.0
        dx = (logs.exp() * whole - spread).scatter_add_(1, at, -at_label)
        dx *= scale if dlosses is None else (scale * plain.upcast(dlosses))[:, None]
        logits.copy_(torch.where(counted[:, None], dx, 0.0))


def launch_reduce(
    losses: Tensor, targets: "Targets", n_cols: int, reduction: str, loss: Tensor | None, scale: Tensor | None
) -> None:
    """The sum or mean of the losses, and its derivative with respect to a row's loss."""
    labels, weights = targets.labels, targets.class_weights
    counted = labels != targets.ignore_index
    if labels.is_cuda:
        torch._assert_async((~counted | ((labels >= 0) & (labels < n_cols))).all(), "linear_cross_entropy: a label is no class")
    if loss is None:
        return
    unit = torch.ones_like(scale) if targets.unit is None else targets.unit
    if reduction == "mean":
        n = counted.sum() if weights is None else torch.where(counted, weights[torch.where(counted, labels, 0)], 0.0).sum()
        n = torch.where(n == 0, torch.nan, n)
        unit = torch.where(counted.any(), 1.0 / n, 1.0)
        loss.copy_(losses.sum() / n)
    else:
        loss.copy_(losses.sum() * unit)
    scale.copy_(unit)


def scaled(x: Tensor, dloss: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    y = (plain.upcast(x) * (plain.upcast(dloss) * plain.upcast(scale))).to(dtype).contiguous()
    return x.copy_(y) if in_place else y
