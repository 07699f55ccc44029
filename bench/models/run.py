"""Measures one lane of one workload: first step with cold caches, check against eager, step time, losses without dropout."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from bench.core import timing
from bench.core.flops import step_flops
from bench.core.peers import Absent
from bench.core.pretended import pretended, true_reads_of
from bench.core.records import ModelRecord
from bench.models import batches, breakdown, gate, graphs, workloads
from bench.models.workloads import Lane, Workload

SETS = 4  # rotating batches
CAPTURING = 5  # calls until graphs are replayed: torch.compile captures in the second, graphed_step in the fourth
STEPS = {"cuda": 12, "cpu": 1}  # steps whose losses are compared
SECONDS = 1.0  # duration of the timed steps


def run(workload: Workload, name: str, *, details: bool = True, cold: bool = True) -> Iterator[ModelRecord]:
    """Yield the record of a lane. With `details` a second record replaces it, with losses and breakdown: these take some
    seconds, and a run that is cut off during them keeps its time. `cold`: the compilers' caches are empty, so the time of
    the first step is recorded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timing.release_memory()
    torch._dynamo.reset()  # otherwise a second workload would recompile the graph with dynamic shapes
    lane = workloads.LANES[name]
    lengths = workload.lengths.of_batch(workload.batch, workload.seqlen, workload.fill)
    record: dict[str, Any] = {
        "lane": name,
        "reason": None,
        "seconds": None,
        "runs": [],
        "peak_bytes": None,
        "model": workload.model,
        "head": workload.head,
        "mode": workload.mode,
        "precision": workload.precision,
        "batch": workload.batch,
        "seqlen": workload.seqlen,
        "fill": round(sum(lengths) / (workload.batch * workload.seqlen), 3),
        "lengths": workload.lengths.name,
        "real_tokens": float(sum(lengths)),
        "flops": float(step_flops(workload.config(), workload.head, workload.mode, lengths)),
        "first_step_seconds": None,
    }
    try:
        with graphs.counting_replays() if lane.graphed else nullcontext(graphs.Replays()) as replays:
            for found in _measure(workload, lane, lengths, device, details, cold, replays):
                record |= found
                yield ModelRecord(**record)
    except Absent as absent:
        yield ModelRecord(**record | {"status": "absent", "reason": str(absent)})
    except (torch.OutOfMemoryError, timing.NoTime) as error:
        if "status" not in record:  # otherwise only the details ran out of memory
            reason = str(error) if isinstance(error, timing.NoTime) else "out of memory"
            yield ModelRecord(**record | {"status": "error", "reason": reason})


def prepare(workload: Workload, name: str) -> None:
    """Fill the compilers' caches with what `run` needs: a step, and the step of the check."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.reset()
    lane = workloads.LANES[name]
    step = Trainer(workload, lane, workload.lengths.of_batch(workload.batch, workload.seqlen, workload.fill), device)
    step(0).cpu()
    _gated(workload, lane, device, graphs.Replays())


class Trainer:
    """The step of a lane: zero_grad, forward in the workload's precision, backward, optimizer. i selects the batch."""

    def __init__(self, workload: Workload, lane: Lane, lengths: list[int], device: str) -> None:
        self.workload, self.lane, self.device = workload, lane, device
        self.model = workloads.make(workload, lane, device)
        self.called = workloads.compiled(self.model, lane)
        self.training = workload.mode == "train"
        self.model.train(self.training)
        self.optimizer = workloads.make_optimizer(self.model, lane) if self.training else None
        config, head, seqlen = self.model.config, workload.head, workload.seqlen
        self.batches = [batches.make(head, config, lengths, seqlen, seed, device, labels=self.training) for seed in range(SETS)]
        self.whole = graphs.step(self.model, self.optimizer, self.batches) if self.optimizer and lane.graphed else None
        if self.whole:
            self.batches = [graphs.counted(batch, causal=head == "clm") for batch in self.batches]
        self.calls = 0

    def __call__(self, i: int, mark: Callable[[str], None] = lambda name: None) -> torch.Tensor:
        self.calls += 1
        batch = self.batches[i % SETS]
        if pretended() is None:
            return self._step(batch, mark)
        with true_reads_of(batch):
            return self._step(batch, mark)

    def _step(self, batch: batches.Batch, mark: Callable[[str], None]) -> torch.Tensor:
        if self.lane.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        if self.optimizer is None:
            with torch.inference_mode(), gate.autocast(self.workload, self.device):
                return self.called(**batch)[0]
        if self.whole:
            with gate.autocast(self.workload, self.device):
                return self.whole(**batch)
        self.optimizer.zero_grad(set_to_none=True)
        with gate.autocast(self.workload, self.device):
            loss = self.called(**batch).loss
        mark("forward")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimizer")
        return loss.detach()


def _measure(
    workload: Workload,
    lane: Lane,
    lengths: list[int],
    device: str,
    details: bool,
    cold: bool,
    replays: graphs.Replays,
) -> Iterator[dict[str, Any]]:
    step = Trainer(workload, lane, lengths, device)
    start = time.perf_counter()
    step(0).cpu()
    first = {"first_step_seconds": time.perf_counter() - start} if device == "cuda" and cold else {}
    capturing = _capture(step, device) if lane.replays else 0

    wrong = _gated(workload, lane, device, replays)
    before, calls = replays.count, step.calls
    if not wrong and device == "cpu":
        step(1)
        wrong = lane.graphed and replays.missing(before, step.calls - calls)
    if wrong:
        yield {"status": "failed", "reason": wrong}
        return
    if device == "cpu":
        yield {"status": "dry-run"}
    else:
        timer = timing.measure_throughput if step.training else timing.measure_latency
        seconds, runs = timer(step, seconds=SECONDS)
        peak = max(capturing, timing.fullest_bytes(lambda: step(0)))
        if wrong := lane.graphed and replays.missing(before, step.calls - calls):
            yield {"status": "failed", "reason": wrong}
            return
        yield first | {"status": "ok", "seconds": seconds, "runs": runs, "peak_bytes": peak}
    if details:
        found = {"losses": losses(workload, lane, lengths, device)} if step.training else {}
        yield found | (_breakdown(step) if device == "cuda" else {})


def _capture(step: "Trainer", device: str) -> int:
    """Take the steps after which graphs are replayed. Returns the peak memory, which shows only while they are captured."""

    def go_on() -> None:
        for i in range(1, CAPTURING):
            step(i)

    if device == "cuda":
        return timing.fullest_bytes(go_on)
    go_on()
    return 0


def _breakdown(step: "Trainer") -> dict[str, Any]:
    """The breakdown of a step's time. If the profiler does not work here, the measured time remains."""
    found: dict[str, Any] = {}
    if step.training:
        phases = breakdown.Phases()
        step(0, phases.mark)
        found["phases"] = phases.read()
    try:
        found["parts"] = breakdown.by_part(step)
    except Exception as error:
        found["reason"] = f"no breakdown by kernel: {error}"[:300]
    return found


def _gated(workload: Workload, lane: Lane, device: str, replays: graphs.Replays) -> str | None:
    """The check, on fresh weights of the same lane: the timed model has already taken a step."""
    model = gate.without_dropout(workloads.make(workload, lane, device), workload.mode == "train")
    if lane.graphed == workloads.STEP:
        called: nn.Module = graphs.Stepped(model, gate.batches_of(workload, lane, device), workload.head == "clm")
    else:
        called = workloads.compiled(model, lane)
    wrong = gate.problem(workload, called, lane, device, replays)
    del model, called
    gc.collect()
    return wrong


def losses(workload: Workload, lane: Lane, lengths: list[int], device: str) -> list[float]:
    """The first losses without dropout, from the same weights, batches and optimizer in every lane."""
    step = Trainer(workload, lane, lengths, device)
    gate.without_dropout(step.model, training=True)
    # A replay overwrites the loss of the one before.
    return [loss.item() for loss in [step(i).clone() for i in range(STEPS[device])]]
