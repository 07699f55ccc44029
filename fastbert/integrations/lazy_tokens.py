"""Stands in for token embeddings that a packing encoder did not unpack: a tensor that is computed when something reads it.

A pooling that takes packed rows leaves nothing to unpack, but stock code leaves the padded token embeddings in its features,
where losses, other modules, hooks and callers may look. `LazyTokens` has their shape, dtype and device. Whatever else is asked
of it is asked of the tensor that its source computes then, by running the forward again.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Source(Protocol):
    """Computes the tensor that a `LazyTokens` stands for."""

    def value(self) -> Tensor:
        """The tensor, the same one each time, with the graph that it would have had."""
        raise NotImplementedError

    def detached_value(self) -> Tensor:
        """Its values, for code that runs below autograd."""
        raise NotImplementedError

    def is_known(self) -> bool:
        """Whether `value` has computed it."""
        raise NotImplementedError


class Converted:
    """The source of a `LazyTokens` made from another one by a function that keeps the shape."""

    def __init__(self, source: Source, function: Callable[[Tensor], Tensor]) -> None:
        self._source, self._function = source, function
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._function(self._source.value())
        return self._value

    def detached_value(self) -> Tensor:
        return self._function(self._source.detached_value())

    def is_known(self) -> bool:
        return self._value is not None


_LOST_GRADIENT = (
    "a gradient reached token embeddings that were not computed, through code that PyTorch does not show (a custom "
    "autograd.Function, or a wrapper that passes a model's outputs through one): patch this model with unpad=False"
)


def _refuse_gradient(gradient: Tensor) -> None:
    raise RuntimeError(_LOST_GRADIENT)


class LazyTokens(Tensor):
    """A tensor that is computed by its `source` when something other than its metadata is read."""

    source: Source

    @staticmethod
    def make(like: Tensor, requires_grad: bool, source: Source, dtype: torch.dtype | None = None) -> "LazyTokens":
        """A stand-in of the shape, device and dtype (unless given) of `like`."""
        lazy = Tensor._make_wrapper_subclass(
            LazyTokens, like.shape, dtype=dtype or like.dtype, device=like.device, requires_grad=requires_grad
        )
        lazy.source = source
        if requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                lazy.register_hook(_refuse_gradient)
        return lazy

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyTokens) and not first.source.is_known():
            if function in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **kwargs)
            if function is Tensor.float and len(args) == 1 and not kwargs:  # accelerate's conversion of outputs
                if first.dtype == torch.float32:
                    return first
                return LazyTokens.make(first, first.requires_grad, Converted(first.source, Tensor.float), torch.float32)
        args, kwargs = tree_map_only(LazyTokens, lambda lazy: lazy.source.value(), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """For code that calls operators past `__torch_function__`; autograd has seen the stand-in by now."""
        args, kwargs = tree_map_only(LazyTokens, lambda lazy: lazy.source.detached_value(), (args, kwargs or {}))
        return function(*args, **kwargs)


# What is answered without computing the tensor. An unknown `grad_fn` is None: DistributedDataParallel, which searches outputs
# for unused parameters, then leaves the stand-in alone.
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.get_device),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.is_inference, Tensor.__len__),
    *(torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested")),
}
