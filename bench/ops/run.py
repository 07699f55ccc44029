"""Times the lanes of an op, each behind its check. Without a GPU (a dry run) it checks them and times nothing."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.core import timing
from bench.core.peers import Absent
from bench.core.records import OpRecord
from bench.ops.check import Checker
from bench.ops.grid import DIRECTIONS, Case, Function, Inputs, Lane
from bench.ops.table import OPS
from fastbert.testing.spec import Draw

NO_REFERENCE = "out of memory in the float64 reference"
SETS = 4  # inputs that rotate, so that no round finds the last one's in a cache


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(case: Case, sets: int = SETS) -> list[Inputs]:
    """Random inputs of the case's dtype, another draw each."""
    draw = Draw(device(), torch.Generator(device()).manual_seed(0))
    make = OPS[case.op].make
    return [make(case, draw) for _ in range(sets)]


def run(case: Case, lanes: list[str] | None = None, directions: tuple[str, ...] = DIRECTIONS) -> Iterator[OpRecord]:
    """One record a lane and direction."""
    op = OPS[case.op]
    inputs = make_inputs(case)
    try:
        checker = Checker(op, case, inputs[0])
    except torch.OutOfMemoryError:  # the float64 reference of a long sequence; no lane can be timed unchecked
        checker = None
    for name, lane in op.lanes.items():
        if lanes is None or name in lanes:
            yield from _run_lane(case, name, lane, inputs, checker, directions)


def _run_lane(
    case: Case, name: str, lane: Lane, inputs: list[Inputs], checker: Checker | None, directions: tuple[str, ...]
) -> Iterator[OpRecord]:
    torch._dynamo.reset()  # a case's graphs are its own: nothing is recompiled into a dynamic one
    status, reason, function = judge(case, lane, checker) if checker else ("error", NO_REFERENCE, None)
    mine = [x.packed() for x in inputs] if lane.packed else inputs
    for direction in directions:
        record: dict[str, Any] = asdict(case) | {"direction": direction, "lane": name}
        record |= {"moved": case.moved(direction), "operations": case.operations(direction)}
        timed: dict[str, Any] = {"status": status, "reason": reason, "seconds": None, "runs": [], "peak_bytes": None}
        if function is not None:
            prepare, call = steps(function, mine, case.p, direction)
            try:
                timed |= _time(prepare, call) if status == "ok" else _walk(prepare, call)
            except Exception as error:
                timed |= dict(zip(("status", "reason"), _refusal(error), strict=True))
        yield OpRecord(**record, **timed)


def judge(case: Case, lane: Lane, checker: Checker) -> tuple[str, str | None, Function | None]:
    """The status a lane has before it is timed, the reason where it will not be, and its function."""
    try:
        function = lane.build(case)
        problem = checker.problem(lane, function)
    except Absent as absent:
        return "absent", str(absent), None
    except Exception as error:
        return *_refusal(error), None
    if problem:
        return "failed", problem, None
    return ("ok" if torch.cuda.is_available() else "dry-run"), None, function


def _refusal(error: Exception) -> tuple[str, str]:
    """Status and reason of a lane that raised. After a CUDA error nothing in this process can be trusted: it goes on up."""
    if isinstance(error, torch.OutOfMemoryError):
        return "error", "out of memory"
    if "CUDA error" in str(error):
        raise error
    if "No available kernel" in str(error):  # SDPA's words
        return "absent", "this backend refuses the case"
    return "error", f"{type(error).__name__}: {error}"[:500]


def _walk(prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> dict[str, Any]:
    """Without a GPU: what would be timed, once."""
    call(prepare(0))
    return {}


def _time(prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> dict[str, Any]:
    seconds, runs = timing.measure(prepare, call)
    return {"seconds": seconds, "runs": runs, "peak_bytes": timing.peak_bytes(lambda: call(prepare(0)))}


def steps(
    function: Function, inputs: list[Inputs], p: float, direction: str
) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    """What is prepared for round i, untimed, and what is timed. A backward is prepared by its forward."""
    own = [replace(x, leaves={n: t.detach().requires_grad_() for n, t in x.leaves.items()}) for x in inputs]

    def forward(i: int) -> tuple[Inputs, torch.Tensor]:
        one = own[i % len(own)]
        return one, function(one, p)

    def backward(state: tuple[Inputs, torch.Tensor]) -> Any:
        one, y = state
        return torch.autograd.grad(y, list(one.leaves.values()), one.dy)

    if direction == "forward":
        return lambda i: i, forward
    if direction == "backward":
        return forward, backward
    return lambda i: i, lambda i: backward(forward(i))
