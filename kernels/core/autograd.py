"""Limits that every op's autograd function shares: first derivatives only, and one gradient at a time."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError("the kernels have no second derivative: unpatch the model to differentiate a gradient")


def first_order_only(gradients: Sequence[Tensor | None], sources: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients under create_graph=True, wrapped so that differentiating one of them raises.

    It raises for a derivative with respect to any of `sources`, the tensors that the gradients were computed from. (torch's
    once_differentiable does not know its sources: a second derivative that names its `inputs=` would silently be zero.)
    """
    sources = [source for source in sources if source is not None and source.requires_grad]
    return tuple(None if g is None else _FirstOrderOnly.apply(g.detach().requires_grad_(), *sources) for g in gradients)


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError("no gradient comes this way")


def links(inputs: Iterable[Any], saved: Sequence[Tensor | None]) -> list[Tensor]:
    """Sources for `first_order_only`: an op's `inputs` that are not `saved`. Stand-ins for non-leaves hold no memory."""
    known = set(map(id, saved))
    others = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad and id(x) not in known]
    with torch.enable_grad():
        return [x if x.is_leaf else _Link.apply(x) for x in others]


def check_unbatched(upstream: Iterable[Any]) -> None:
    """Raise RuntimeError for batched gradients: kernels read memory, and a batched tensor has none of its own."""
    if any([isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in upstream]):
        raise RuntimeError(
            "the kernels take one gradient at a time, not a batch of them (is_grads_batched=True, vectorize=True): "
            "unpatch the model for that, or call the backward once per gradient"
        )


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether a backward can follow, and the forward therefore has to save what it reads."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
