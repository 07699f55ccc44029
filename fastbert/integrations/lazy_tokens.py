"""Stands in for token embeddings that a packing encoder did not unpack: a tensor that is computed when something reads it.

A pooling that takes packed rows leaves nothing to unpack, but stock code leaves the padded token embeddings in its features,
where losses, other modules, hooks and callers may look. `LazyTokens` has their shape, dtype and device. Whatever else is asked
of it is asked of the tensor that its source computes then, by running the forward again.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Source:
    """Computes the tensor that a `LazyTokens` stands for, at most once."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._converted: WeakSet[Source] = WeakSet()

    def compute(self) -> Tensor:
        """The tensor, with the graph that it would have had."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """The tensor, the same one each time."""
        if self._value is None:
            self._value = self.compute()
            for source in list(self._converted):  # now, because the tensor may be written to from here on
                source.value()
        return self._value

    def detached_value(self) -> Tensor:
        """Its values, for code that runs below autograd."""
        raise NotImplementedError

    def is_known(self) -> bool:
        """Whether `value` has computed it."""
        return self._value is not None

    def converted(self, function: Callable[[Tensor], Tensor]) -> "Source":
        """The source of function(tensor)."""
        source = _Converted(self, function)
        self._converted.add(source)
        return source


class _Converted(Source):
    def __init__(self, source: Source, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._source, self._function, self._grad = source, function, torch.is_grad_enabled()

    def compute(self) -> Tensor:
        with torch.set_grad_enabled(self._grad):
            return self._function(self._source.value())

    def detached_value(self) -> Tensor:
        return self._function(self._source.detached_value())


_LOST_GRADIENT = (
    "a gradient reached token embeddings that were not computed, through code that PyTorch does not show (a custom "
    "autograd.Function, or a wrapper that passes a model's outputs through one): patch this model with unpad=False"
)


def _refuse_gradient(gradient: Tensor | None) -> None:
    if gradient is not None:  # DistributedDataParallel passes all outputs through a function, those without gradient too
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
            if function in _COPIES and len(args) == 1 and not kwargs:
                dtype = torch.float32 if function is Tensor.float else first.dtype
                if function is Tensor.float and first.dtype == dtype:
                    return first
                needs_grad = first.requires_grad and torch.is_grad_enabled()
                return LazyTokens.make(first, needs_grad, first.source.converted(function), dtype)
        args, kwargs = tree_map_only(LazyTokens, lambda lazy: lazy.source.value(), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """For code that calls operators past `__torch_function__`; autograd has seen the stand-in by now."""
        args, kwargs = tree_map_only(LazyTokens, lambda lazy: lazy.source.detached_value(), (args, kwargs or {}))
        return function(*args, **kwargs)


# What gives another stand-in: accelerate converts the outputs of a model, DistributedDataParallel copies them.
_COPIES = (Tensor.float, Tensor.clone)
# What is answered without computing the tensor. An unknown `grad_fn` is None: DistributedDataParallel, which searches outputs
# for unused parameters, then leaves the stand-in alone.
_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.get_device),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.is_inference, Tensor.__len__),
    *(torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested")),
}
