"""Captures the work of a call as a graph that can be replayed.

Everything else in `fastbert.graphs` sees only the two protocols here. `fastbert.testing.graphs` implements them a second time,
without a GPU: it records the operations of a call and runs them again.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Graph(Protocol):
    """The recorded work of one call."""

    def replay(self) -> None:
        """Queue the work on the current stream. It reads and writes the memory that the captured call read and wrote."""


class Recorder(Protocol):
    """Makes graphs. All graphs of one recorder share their working memory, so two must not run at the same time."""

    def warm_up(self, function: Callable[[], Result], calls: int | None = None) -> Result:
        """Call `function` as often as a capture needs beforehand, or `calls` times, and return its last result."""

    def capture(self, function: Callable[[], Result]) -> tuple[Graph, Result]:
        """A graph of one call of `function`, and the call's result, whose tensors each replay fills.

        The call itself computes nothing on a GPU: the tensors hold values from the first replay on.
        """


class CudaRecorder:
    """Makes CUDA graphs on `device`, in one memory pool. Other threads may use the device meanwhile."""

    WARM_UP_CALLS = 2  # the first compiles kernels and creates cuBLAS's handle; the second finds everything in place

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Result], calls: int | None = None) -> Result:
        """Call `function` on the stream of the captures, so that its libraries have their workspaces there."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(calls or self.WARM_UP_CALLS):
                    result = function()
            current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Result]) -> tuple[Graph, Result]:
        graph = torch.cuda.CUDAGraph()
        # Only calls of this thread may break the capture: others go on allocating and copying.
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            current = torch.cuda.current_stream(self.device)  # set again also where torch does not: see _abandon
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(current),
                _without_collection(),
                torch.cuda.graph(graph, **options),
            ):
                result = function()
        except BaseException:
            self._abandon()
            raise
        return graph, result

    def _abandon(self) -> None:
        """Undo what a capture that CUDA has invalidated leaves behind, because torch raises before the end of its own clean-up.

        The allocator would go on filling the pool, and the random generator would refuse to draw outside of a capture.
        """
        pool, self._pool = self._pool, torch.cuda.graph_pool_handle()  # one that has no graph cannot be used again
        with torch.cuda.device(self.device), suppress(RuntimeError):  # raised after a capture that has been ended
            index = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(index, pool)
        generator = torch.cuda.default_generators[index]
        offset = generator.get_offset()
        try:
            torch.rand((), device=self.device)
            generator.set_offset(offset)
        except RuntimeError:
            generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _without_collection() -> Iterator[None]:
    """Collect no garbage: a CUDA graph among it, one of another model's for instance, cannot be destroyed during a capture
    without invalidating that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# How to make a recorder, by type of device. fastbert.testing.graphs adds one for "cpu" within its context manager.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


def recorder_of(device: torch.device) -> Recorder | None:
    """A recorder for `device`, or None where there are no graphs."""
    make = RECORDERS.get(device.type)
    return None if make is None else make(device)
