"""Measures the latency of requests: seconds from the call of a model until the host has read the result, p50 and p99.

A request is a batch that lies on the GPU. A workload of fill 1.0 is a stream of requests of one shape. Any other is a stream
of mixed lengths, as a server sees them: each request has other lengths and is as long as its longest row. torch.compile gets
dynamic shapes for it. Before a lane is timed the whole stream has been served, so that everything is compiled and captured,
and further requests of the same shapes are checked against eager.
"""

import gc
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from bench.core import timing
from bench.core.peers import Absent
from bench.core.pretended import pretended, true_reads_of
from bench.core.records import LatencyRecord
from bench.models import batches, gate, graphs, workloads
from bench.models.workloads import GRAPHED, Lane, Workload
from fastbert.kernels.core.launch import counts

FIRST_LANES = ("stock", "fastbert", GRAPHED)
COMPILED_LANES = ("stock + compile", "stock + reduce-overhead")
TUNED_LANES = (workloads.MAX_AUTOTUNE,)  # their compilation takes minutes
LANES = (*FIRST_LANES, "eager", *COMPILED_LANES, *TUNED_LANES)
STREAM = {"cuda": 64, "cpu": 3}  # requests of a mixed stream
SAME = 4  # requests of a stream of one shape
# Times that a stream is served before it is timed: reduce-overhead records its graphs in the second.
PASSES = {"cuda": 3, "cpu": 2}
SMALL = 8  # rows of a small batch
FEWEST_SMALL, FEWEST = 200, 100  # timed requests, for a p99 that means something
SECONDS = 1.0

Request = batches.Batch


def run(
    streams: Sequence[Workload],
    lanes: Sequence[str] = LANES,
    *,
    seconds: float = SECONDS,
    budget: float = float("inf"),
) -> Iterator[LatencyRecord]:
    """Yield one record per stream and lane. No stream starts after `budget` seconds. A lane that compiles nothing has one
    model for all streams, as a server has."""
    end = time.monotonic() + budget
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept: dict[tuple[Any, ...], nn.Module] = {}
    graphed = any(workloads.LANES[name].graphed for name in lanes)
    with graphs.counting_replays() if graphed else nullcontext(graphs.Replays()) as replays:
        for workload in streams:
            if time.monotonic() >= end:
                return
            stream = Stream(workload, device)
            for name in lanes:
                yield _record(stream, name, kept, replays, seconds)


class Stream:
    """The requests of a workload, and others of the same shapes with what eager and its float64 copy answer."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload, self.device = workload, device
        self.mixed = workload.fill < 1.0
        self.config = workload.config()
        lengths = self._lengths()
        self.requests = [self._request(rows, seed) for seed, rows in enumerate(lengths)]
        by_length = sorted(lengths, key=max)
        checked = [by_length[0], by_length[len(by_length) // 2], by_length[-1]] if self.mixed else lengths[:1]
        self.checked = [self._request(rows, 1000 + seed) for seed, rows in enumerate(checked)]
        stock = workloads.make(workload, workloads.LANES["eager"], device).eval()
        self.expected = [gate.references(workload, stock, request, device) for request in self.checked]

    def _lengths(self) -> list[list[int]]:
        batch, seqlen = self.workload.batch, self.workload.seqlen
        if not self.mixed:
            return [[seqlen] * batch] * SAME
        count = STREAM[self.device]
        mixed = self.workload.lengths.of_batch(count * batch, seqlen, self.workload.fill)
        random.Random(0).shuffle(mixed)
        return [mixed[i : i + batch] for i in range(0, len(mixed), batch)]

    def _request(self, lengths: list[int], seed: int) -> Request:
        return batches.make(self.workload.head, self.config, lengths, max(lengths), seed, self.device, labels=False)

    def problem(self, called: nn.Module) -> str | None:
        """How the answers to the checked requests differ from eager's; None if they do not."""
        for request, expected in zip(self.checked, self.expected, strict=True):
            if wrong := gate.difference(self.workload, called, request, expected, self.device):
                return wrong
        return None


def _record(
    stream: Stream, name: str, kept: dict[tuple[Any, ...], nn.Module], replays: graphs.Replays, seconds: float
) -> LatencyRecord:
    workload, lane = stream.workload, workloads.LANES[name]
    found: dict[str, Any] = {"lane": name, "reason": None, "seconds": None, "runs": [], "peak_bytes": None}
    found |= {"model": workload.model, "head": workload.head, "precision": workload.precision, "batch": workload.batch}
    found |= {"seqlen": workload.seqlen, "fill": workload.fill, "lengths": "mixed" if stream.mixed else "full"}
    found |= {"p99": None, "first_pass_seconds": None}
    try:
        found |= _measure(stream, lane, _model(stream, lane, kept), replays, seconds)
    except Absent as absent:
        found |= {"status": "absent", "reason": str(absent)}
    except (torch.OutOfMemoryError, timing.NoTime) as error:
        reason = str(error) if isinstance(error, timing.NoTime) else "out of memory"
        found |= {"status": "error", "reason": reason}
    return LatencyRecord(**found)


def _model(stream: Stream, lane: Lane, kept: dict[tuple[Any, ...], nn.Module]) -> nn.Module:
    """The lane's model; a compiled one is made anew, because torch.compile stops compiling after a few shapes."""
    workload, device = stream.workload, stream.device
    if lane.compiled:
        torch._dynamo.reset()
        gc.collect()
        return workloads.compiled(workloads.make(workload, lane, device).eval(), lane, dynamic=stream.mixed)
    key = (lane, workload.model, workload.head, workload.precision, workload.config().max_position_embeddings)
    if key not in kept:
        kept[key] = workloads.make(workload, lane, device).eval()
    return kept[key]


def _measure(stream: Stream, lane: Lane, called: nn.Module, replays: graphs.Replays, seconds: float) -> dict[str, Any]:
    device, launched = stream.device, counts.total()
    serve = Server(stream.requests, called, lane)
    start = time.perf_counter()
    for i in range(len(stream.requests)):
        serve(i)
    first = time.perf_counter() - start
    for i in range(len(stream.requests) * (PASSES[device] - 1)):
        serve(i)
    replayed = replays.count
    if wrong := stream.problem(called):
        return {"status": "failed", "reason": wrong}
    if lane.graphed and replays.count == replayed:
        return {"status": "failed", "reason": f"{gate.NOT_REPLAYED}: {graphs.why_not(called)}"}
    if lane.fast and counts.total() == launched and not lane.graphed:
        return {"status": "failed", "reason": gate.NO_KERNEL}
    if device == "cpu":
        return {"status": "dry-run"}
    fewest = FEWEST_SMALL if stream.workload.batch <= SMALL else FEWEST
    replayed, served = replays.count, serve.count
    spread, runs, p99 = timing.measure_responses(serve, seconds=seconds, fewest=fewest)
    peak = timing.fullest_bytes(lambda: serve(0))
    if wrong := lane.graphed and replays.missing(replayed, serve.count - served):
        return {"status": "failed", "reason": f"{wrong}: {graphs.why_not(called)}"}
    return {"status": "ok", "seconds": spread, "runs": runs, "p99": p99, "first_pass_seconds": first, "peak_bytes": peak}


class Server:
    """serve(i) answers a request and returns the answer on the host."""

    def __init__(self, requests: list[Request], called: nn.Module, lane: Lane) -> None:
        self.requests, self.called, self.lane = requests, called, lane
        self.count = 0
        self.pretended = pretended() is not None

    def __call__(self, i: int) -> torch.Tensor:
        self.count += 1
        request = self.requests[i % len(self.requests)]
        if not self.pretended:
            return self._answer(request)
        with true_reads_of(request):
            return self._answer(request)

    @torch.inference_mode()
    def _answer(self, request: Request) -> torch.Tensor:
        if self.lane.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        return self.called(**request)[0].cpu()
