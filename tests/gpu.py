"""Helpers of the tests marked `gpu`: capture a graph, forbid synchronisation, run late on a side stream."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
SLEEP = 100_000_000  # cycles, about 50 ms: longer than a test takes to launch its kernels


def captured(function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """A function that replays one call as a CUDA graph, and the result of the call, whose memory each replay fills.

    Three calls on a side stream come first, as capturing requires.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within it, torch raises if the host would wait for the GPU."""
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def on_a_late_stream(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Call `function` on a side stream with inputs that are zeros until a long wait on that stream ends.

    A launch on the default stream would read the zeros.
    """
    late, stream = {name: torch.zeros_like(x) for name, x in inputs.items()}, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for name, x in inputs.items():
            late[name].copy_(x)
        results = function(late)
    stream.synchronize()
    return results


def peak_bytes(function: Callable[[], object]) -> int:
    """The peak of memory that a second call allocates beyond what was allocated before it, in bytes."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
