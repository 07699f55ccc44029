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


def least_milliseconds(*steps: Callable[[], object], rounds: int = 20) -> list[float]:
    """Each step's shortest time as a captured graph, the steps taking turns.

    A graph's time has no share of the host's. The shortest of several is one in which no other process had the GPU.
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    for step in steps:
        stream = torch.cuda.Stream()  # capture wants everything compiled and set up, on a stream of its own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
    return [min(found) for found in times]
