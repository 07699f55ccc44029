"""Runs `python -m bench host`: measures the host time, launches and peak memory of whole steps.

A GPU waits for its host wherever a step's launches take longer than its kernels. Times are therefore the host's: from an
idle device until the whole step is issued. The lanes of a case take turns, so that other load on the machine affects all
of them, and are compared turn by turn. Results are not checked here; `python -m bench models` checks the same models.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.core.peers import Absent
from bench.core.records import HostRecord, Spread
from bench.core.timing import fullest_bytes, release_memory, release_workspaces
from bench.host import counts
from bench.host.cases import CASES, COMPILED, EncodeHostCase, HostCase
from bench.host.encode_step import EncodeStep
from bench.host.step import Step
from bench.models import gate, graphs
from fastbert.kernels.core import failures, launch

WARM_UP = 5  # steps; graphed_step replays from the fourth on


Case = HostCase | EncodeHostCase


class StepTime(NamedTuple):
    """CPU seconds, wall seconds, and CPU seconds by part of the step."""

    cpu: float
    wall: float
    parts: dict[str, float]


Times = list[list[StepTime]]  # by turn


def run(
    names: Sequence[str] = tuple(CASES),
    *,
    seconds: float = 10.0,
    rounds: int = 15,
    compiled: bool = False,
    tiny: bool = False,
    budget: float = float("inf"),
) -> Iterator[HostRecord]:
    """Yield one record per lane of the named cases, case by case.

    seconds: of timed steps per case, in `rounds` turns per lane. compiled: adds a lane of torch.compile. tiny: a dry run on
    the CPU, untimed. budget: no case starts after this many seconds.
    """
    end = time.monotonic() + budget
    with _strict_and_alone():
        for name in names:
            if time.monotonic() >= end:
                return
            case = CASES[name].tiny() if tiny else CASES[name]
            yield from measure(case, seconds, rounds, compiled, "cpu" if tiny else "cuda")


@contextmanager
def _strict_and_alone() -> Iterator[None]:
    """Forbid fallbacks to plain PyTorch, and use one thread: the CPU time of waiting threads would count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(failures, "strict", True):
            yield
    finally:
        torch.set_num_threads(threads)


def measure(case: Case, seconds: float, rounds: int, compiled: bool, device: str) -> list[HostRecord]:
    """The records of one case, with lanes in the order of the case."""
    lanes = list(case.lanes)
    if compiled and isinstance(case, HostCase):
        lanes.insert(1, COMPILED)
    found = {lane: _caught(partial(_alone, case, lane, device)) for lane in lanes}
    if device == "cuda":
        good = [lane for lane in lanes if found[lane]["status"] == "ok"]
        for lane, times in _in_turns(case, good, seconds, rounds).items():
            found[lane] |= times
        release_memory()
    return [_record(case, lane, found[lane]) for lane in lanes]


def _record(case: Case, lane: str, found: dict[str, Any]) -> HostRecord:
    nothing = {"reason": None, "seconds": None, "wall": None, "peak_bytes": None}
    nothing |= {"runs": [], "wall_runs": [], "parts": {}, "launches": {}}
    return HostRecord(**nothing | found, lane=lane, name=case.name)


def _caught(call: Callable[[], dict[str, Any]], tidy: bool = True) -> dict[str, Any]:
    """The result of `call`, or an error record if it raises, so that one lane's failure does not end the others."""
    try:
        return call()
    except Absent as absent:
        return {"status": "absent", "reason": str(absent)}
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        return {"status": "error", "reason": f"{type(error).__name__}: {said}\n{traceback.format_exc()}"}
    finally:
        if tidy:
            release_memory()


def _made(case: Case, lane: str, device: str) -> Step | EncodeStep:
    return EncodeStep(case, lane, device) if isinstance(case, EncodeHostCase) else Step(case, lane, device)


def _alone(case: Case, lane: str, device: str) -> dict[str, Any]:
    """Launches and peak memory of a warm step, with no other lane on the device."""
    torch._dynamo.reset()
    release_workspaces()
    model = case.lane(lane)
    with graphs.counting_replays() if model.graphed else nullcontext(graphs.Replays()) as replays:
        step = _made(case, lane, device)
        before = launch.counts.total()
        with step.surroundings():
            peak = fullest_bytes(partial(_warm_up, step)) if device == "cuda" and model.replays else 0
            if not peak:
                _warm_up(step, WARM_UP if device == "cuda" or model.graphed else 1)
            replayed = replays.count
            found = _launches(step, device)  # without a GPU, by a mode under which nothing is replayed
            peak = max(peak, fullest_bytes(step)) if device == "cuda" else None
    if model.fast and launch.counts.total() == before:
        return found | {"status": "failed", "reason": gate.NO_KERNEL}
    if model.graphed and not replayed:
        return found | {"status": "failed", "reason": f"{gate.NOT_REPLAYED}: {graphs.why_not(step.whole or step.model)}"}
    return found | {"status": "ok" if device == "cuda" else "dry-run", "peak_bytes": peak}


def _warm_up(step: Step | EncodeStep, steps: int = WARM_UP) -> None:
    for _ in range(steps):
        step()


def _launches(step: Step | EncodeStep, device: str) -> dict[str, Any]:
    """The launches of a step. If the profiler does not work here, the lane is still timed."""
    try:
        found = counts.of_step(step, device)
    except Exception as error:
        return {"reason": f"launches were not counted: {error}"[:300]}
    return {"launches": found} if counts.kernels(found) else {"reason": "the profiler saw no launches"}


def _in_turns(case: Case, lanes: list[str], seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of each lane from `rounds` turns of all lanes, about `seconds` in total."""
    steps: dict[str, Step | EncodeStep] = {}
    times: dict[str, Times] = {lane: [] for lane in lanes}
    failed: dict[str, dict[str, Any]] = {}

    def start(lane: str) -> dict[str, Any]:
        steps[lane] = _made(case, lane, "cuda")
        with steps[lane].surroundings():
            _warm_up(steps[lane])
        return {}

    def go_on(lane: str) -> dict[str, Any]:
        with steps[lane].surroundings():
            times[lane].append(turn(steps[lane], seconds / rounds / len(lanes)))
        return {}

    for do in (start, *[go_on] * rounds):
        for lane in lanes:
            if lane not in failed and (raised := _caught(partial(do, lane), tidy=do is start)):
                failed[lane] = raised
                steps.pop(lane, None)
    return failed | {lane: summary(turns) for lane, turns in times.items() if lane not in failed}


def turn(step: Step | EncodeStep, seconds: float) -> list[StepTime]:
    """Times of consecutive steps for about `seconds`, each started on an idle device. The first step is not timed."""
    step()
    found = []
    end = time.perf_counter() + seconds
    while True:
        torch.cuda.synchronize()
        found.append(_timed(step))
        if time.perf_counter() > end and len(found) > 1:
            torch.cuda.synchronize()
            return found


def _timed(step: Step | EncodeStep) -> StepTime:
    """The time of a part that is issued in pieces is that of all its pieces."""
    parts: dict[str, float] = {}
    begun, start = time.process_time(), time.perf_counter()
    last = begun

    def issued(part: str) -> None:
        nonlocal last
        now = time.process_time()
        parts[part] = parts.get(part, 0.0) + now - last
        last = now

    step(issued)
    passed, ended = time.perf_counter() - start, time.process_time()
    return StepTime(ended - begun, passed, parts)


def summary(turns: Times) -> dict[str, Any]:
    """Quartiles over all steps, and the median of each turn."""
    cpu, wall = ([[getattr(step, clock) for step in turn] for turn in turns] for clock in ("cpu", "wall"))
    names = turns[0][0].parts
    return {
        "seconds": Spread.of([x for turn in cpu for x in turn]),
        "runs": [statistics.median(turn) for turn in cpu],
        "wall": Spread.of([x for turn in wall for x in turn]),
        "wall_runs": [statistics.median(turn) for turn in wall],
        "parts": {part: [statistics.median(step.parts[part] for step in turn) for turn in turns] for part in names},
    }
