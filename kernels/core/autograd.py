"""What all derivatives of kernels share: they are taken once, of one gradient at a time, from tensors that lie as they did."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError("the kernels have no second derivative: unpatch the model to differentiate a gradient")


def not_twice(gradients: Sequence[Tensor | None], sources: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients under create_graph=True: whoever differentiates one in its turn, by whichever of the `sources` that it
    was made of, is told that this does not go. (torch's once_differentiable knows no sources: where the derivative is asked
    for by `inputs=`, it is silently zero.)"""
    sources = [source for source in sources if source is not None and source.requires_grad]
    return tuple(None if g is None else _NotTwice.apply(g.detach().requires_grad_(), *sources) for g in gradients)


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError("no gradient comes this way")


def links(inputs: Iterable[Any], saved: Sequence[Tensor | None]) -> list[Tensor]:
    """Stand-ins for what of an op's `inputs` is not `saved`, as sources of its gradients: without their memory."""
    known = set(map(id, saved))
    others = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad and id(x) not in known]
    with torch.enable_grad():
        return [x if x.is_leaf else _Link.apply(x) for x in others]


def check_unbatched(upstream: Iterable[Any]) -> None:
    """Raise RuntimeError for gradients that stand for many: kernels read memory, which those have not."""
    if any([isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in upstream]):
        raise RuntimeError(
            "the kernels take one gradient at a time, not a batch of them (is_grads_batched=True, vectorize=True): "
            "unpatch the model for that, or call the backward once for each"
        )


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether a backward can follow, and so whether the forward keeps what that reads."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
