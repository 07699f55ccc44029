"""Lets an operation or the launch of a kernel fail, at any point of a step.

The operations of PyTorch are seen by a dispatch mode, launches by a replacement of what Triton's interpreter calls for each.
What the interpreter does inside a launch is not seen: on a GPU a launch is no operation of PyTorch.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _OfThread(threading.local):
    """What a thread does before each of its launches, and whether it is inside one."""

    before: Callable[[str], None] | None = None
    inside = False


_launches = _OfThread()


@contextmanager
def injectable() -> Iterator[None]:
    """Within it launches can be made to fail. Threads launch in turn: the interpreter holds one program's place per process."""
    from triton.runtime.interpreter import GridExecutor

    call, turn = GridExecutor.__call__, threading.RLock()

    def launch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if _launches.before is not None:
            _launches.before(self.fn.__name__)
        with turn:
            _launches.inside = True
            try:
                return call(self, *arguments, **keywords)
            finally:
                _launches.inside = False

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = call


@contextmanager
def at_launches(before: Callable[[str], None]) -> Iterator[None]:
    """Call `before` with the kernel's name before each launch of this thread."""
    former, _launches.before = _launches.before, before
    try:
        yield
    finally:
        _launches.before = former


class Countdown(TorchDispatchMode):
    """Calls `act` before operation or launch number `n`, counted from 0; `seen` is how many there were."""

    def __init__(self, n: float = float("inf"), act: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.n, self.act, self.seen = n, act, 0
        self._launches = at_launches(lambda _: self._count())

    def __enter__(self) -> "Countdown":
        self._launches.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._launches.__exit__(*error)

    def _count(self) -> None:
        self.seen += 1
        if self.seen > self.n and self.act is not None:
            self.n = float("inf")
            self.act()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _launches.inside and op.namespace == "aten":  # not a profiler's marks
            self._count()
        return op(*args, **(kwargs or {}))


class Failing:
    """For `at_launches`: launch number `n` raises, with `lasting` also every later launch of its kernel.

    With `only`, launches of that kernel are counted and no others. `kernel` is the name of the one that failed.
    """

    def __init__(self, n: int, error: Callable[[], Exception], lasting: bool = False, only: str | None = None) -> None:
        self._left, self._error, self._lasting, self._only = n, error, lasting, only
        self.kernel: str | None = None

    def __call__(self, kernel: str) -> None:
        if self.kernel is None and self._only in (None, kernel):
            self._left -= 1
            if self._left < 0:
                self.kernel = kernel
                raise self._error()
        elif self._lasting and kernel == self.kernel:
            raise self._error()
