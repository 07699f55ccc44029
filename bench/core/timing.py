"""Times calls on the GPU: events around each call, the L2 cache flushed before it, quartiles over many calls.

`measure` takes the GPU's own time: each call is queued behind a wait that covers the host's part of it. The host's part
shows in `measure_latency`, and in pytest-benchmark's times through `host_timer`.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.core.records import Spread

BLOCKS = 3  # repeated runs of one lane; reports show the scatter of their medians
FEWEST, MOST = 10, 200  # rounds per block
LONG, FEWEST_LONG = 0.2, 3  # seconds of a call from which on so many rounds are enough: a call of `encode`
WARM_UP = 3
HERTZ = 2e9  # cycles per second for torch.cuda._sleep on the fastest GPU; a slower one waits longer


class NoTime(Exception):
    """The clock measured no time for a call: nothing ran, or the events do not come from a GPU."""


class Flush:
    """Writes twice the size of the L2 cache, so that the next call reads its inputs from memory."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(max(2 * cache, 128 << 20), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.buffer.zero_()


def measure(prepare: Callable[[int], Any], call: Callable[[Any], Any], *, seconds: float = 0.1) -> tuple[Spread, list[float]]:
    """Time `call(prepare(i))` without the preparation: quartiles over all rounds, and the median of each block.

    Each block takes about `seconds` and has between FEWEST and MOST rounds.
    """
    flush = Flush()
    _block(prepare, call, flush, WARM_UP, 0)
    host = min(_host_seconds(prepare, call, i) for i in range(WARM_UP))
    wait = int(1.5 * host * HERTZ)
    trial = _block(prepare, call, flush, WARM_UP, wait)
    rounds = _rounds_in(seconds, min(trial) + 1.5 * host)
    return summary([_block(prepare, call, flush, rounds, wait) for _ in range(BLOCKS)])


def _host_seconds(prepare: Callable[[int], Any], call: Callable[[Any], Any], i: int) -> float:
    """Seconds until the host has launched the whole call."""
    argument = prepare(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def _block(prepare: Callable[[int], Any], call: Callable[[Any], Any], flush: Flush, rounds: int, wait: int) -> list[float]:
    events = []
    for i in range(rounds):
        argument = prepare(i)
        flush()
        torch.cuda._sleep(wait)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(argument)
        end.record()
        events.append((start, end))
        del argument
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def measure_throughput(step: Callable[[int], Any], *, seconds: float) -> tuple[Spread, list[float]]:
    """Seconds from the end of one step to the end of the next, without synchronisation between them, as in training."""
    rounds = _rounds(step, seconds)
    blocks = []
    for _ in range(BLOCKS):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        step(0)  # so that the first interval also begins on a busy GPU
        events[0].record()
        for i, event in enumerate(events[1:], 1):
            step(i)
            event.record()
        torch.cuda.synchronize()
        pairs = zip(events, events[1:], strict=False)
        blocks.append([before.elapsed_time(after) / 1e3 for before, after in pairs])
    return summary(blocks)


def measure_latency(step: Callable[[int], Any], *, seconds: float) -> tuple[Spread, list[float]]:
    """Seconds from a call until its result is ready, by the host's clock: the latency that a caller sees."""
    rounds = _rounds(step, seconds)
    return summary([[synchronised(step, i) for i in range(rounds)] for _ in range(BLOCKS)])


def measure_responses(step: Callable[[int], Any], *, seconds: float, fewest: int = 0) -> tuple[Spread, list[float], float]:
    """Seconds until `step(i)` returns, which ends when the host has read its result: as measure_latency, and the 99th
    percentile. At least `fewest` rounds in all, whatever time they take."""
    rounds = max(_rounds(step, seconds), -(-fewest // BLOCKS))
    blocks = [[_response(step, block * rounds + i) for i in range(rounds)] for block in range(BLOCKS)]
    samples = [sample for block in blocks for sample in block]
    return *summary(blocks), statistics.quantiles(samples, n=100, method="inclusive")[98]


def _response(step: Callable[[int], Any], i: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(i)
    return time.perf_counter() - start


def synchronised(step: Callable[[int], Any], i: int) -> float:
    """Seconds of one call by the host's clock, from idle GPU to idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step(i)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _rounds(step: Callable[[int], Any], seconds: float) -> int:
    for i in range(WARM_UP):
        synchronised(step, i)
    estimate = min(synchronised(step, i) for i in range(2))
    return _rounds_in(seconds / BLOCKS, estimate, FEWEST if estimate < LONG else FEWEST_LONG)


def _rounds_in(seconds: float, estimate: float, fewest: int = FEWEST) -> int:
    """The number of rounds of about `estimate` seconds that fit; at least `fewest`."""
    return min(max(int(seconds / estimate), fewest), MOST) if estimate > 0 else fewest


def summary(blocks: list[list[float]]) -> tuple[Spread, list[float]]:
    """Quartiles of all samples, and the median of each block.

    Raises:
        NoTime: a sample is zero or less.
    """
    least = min(sample for block in blocks for sample in block)
    if least <= 0:
        raise NoTime(f"a call took {least} s by this clock: nothing ran, or it cannot be timed here")
    return Spread.of([sample for block in blocks for sample in block]), [Spread.of(block).median for block in blocks]


def host_timer() -> float:
    """The host's clock after the GPU is idle, for pytest-benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def release_memory() -> None:
    """Give back the memory of the lane before, which would count in the peak of the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_workspaces() -> None:
    """Give back cuBLAS's workspaces: a stream on which graphs were captured has its own, which would count in later peaks.
    No graph may be alive."""
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak bytes that `call` allocates on the GPU beyond what was allocated before."""
    before = torch.cuda.memory_allocated()
    return fullest_bytes(call) - before


def fullest_bytes(call: Callable[[], Any]) -> int:
    """Peak bytes allocated on the GPU during `call`, including what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
