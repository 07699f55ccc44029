"""A stand-in for a CUDA graph on the CPU: it records an optimizer step and replays it in the same memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import optim
from fastbert.kernels import adamw as kernels


class Graph(TorchDispatchMode):
    """Records the ATen calls and launches while `capture` runs a function; `replay` repeats them in the same memory.

    As on a GPU, launches do not run while they are captured, and memory of the capture belongs to the graph. It raises if
    the graph would read memory that only the host holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.launched: list[dict[str, Any]] = []
        self._host: set[int] = set()
        self._held: list[Any] = []

    def capture(self, function: Callable[[], Any], monkeypatch: Any) -> "Graph":
        launch = kernels.launch

        def record(kernel: Any, programs: int, config: Any, like: Tensor, **arguments: Any) -> None:
            assert not set(_memories(arguments)) & self._host, "a kernel reads what the host holds"
            self.launched.append(arguments)
            self.calls.append(lambda: launch(kernel, programs, config, like, **arguments))

        with monkeypatch.context() as patched:
            patched.setattr(kernels, "launch", record)
            patched.setattr(optim, "_is_capturing", lambda param: True)
            with self:
                function()
        return self

    def replay(self) -> None:
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, written = set(_memories((args, kwargs))), set(_memories(out))
        made_of_numbers = func is torch.ops.aten.lift_fresh.default  # torch.tensor(...)
        if made_of_numbers or read & self._host:
            copied = not made_of_numbers and (written & read) - self._host
            assert not copied, f"{func} copies from the host, which a graph cannot"
            self._host |= written
            self._held.append(out)  # so that its address is not reused
        else:
            self.calls.append(lambda: _again(func, args, kwargs, out))
        return out


def _memories(tree: Any) -> Iterator[int]:
    return (x.untyped_storage().data_ptr() for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor))


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    found = func(*args, **kwargs)
    for old, new in zip(_pytree.tree_leaves(out), _pytree.tree_leaves(found), strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)
