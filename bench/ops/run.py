"""Checks the lanes of an op and times those that pass. Without a GPU (a dry run) it only checks them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.core import floors, timing
from bench.core.peers import Absent
from bench.core.records import OpRecord
from bench.ops.check import Checker
from bench.ops.grid import DIRECTIONS, Case, Function, Inputs, Lane
from bench.ops.table import OPS
from fastbert.testing.spec import Draw

NO_REFERENCE = "out of memory in the float64 reference"
SETS = 4  # rotating inputs, so that no round finds those of the previous one in a cache


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(case: Case, sets: int = SETS) -> list[Inputs]:
    """Random inputs of the case's dtype, each with its own draw."""
    draw = Draw(device(), torch.Generator(device()).manual_seed(0))
    make = OPS[case.op].make
    return [make(case, draw) for _ in range(sets)]


def run(case: Case, lanes: list[str] | None = None, directions: tuple[str, ...] = DIRECTIONS) -> Iterator[OpRecord]:
    """One record per lane and direction in which the op can be compared."""
    op = OPS[case.op]
    inputs = make_inputs(case)
    try:
        checker = Checker(op, case, inputs[0])
    except torch.OutOfMemoryError:  # by the float64 reference of a long sequence; no lane is timed unchecked
        checker = None
    for name, lane in op.lanes.items():
        if lanes is None or name in lanes:
            yield from _run_lane(case, name, lane, inputs, checker, directions)


def _run_lane(
    case: Case, name: str, lane: Lane, inputs: list[Inputs], checker: Checker | None, directions: tuple[str, ...]
) -> Iterator[OpRecord]:
    torch._dynamo.reset()  # otherwise a second case would recompile the graph with dynamic shapes
    status, reason, function = judge(case, lane, checker) if checker else ("error", NO_REFERENCE, None)
    mine = [x.packed() for x in inputs] if lane.packed else inputs
    for direction in floors.directions_of(case.op, directions):
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
    """A lane's status before timing, the reason if it will not be timed, and its function."""
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
    """Status and reason of a lane that raised. A CUDA error is raised again, because the process cannot be trusted after it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "error", "out of memory"
    if "CUDA error" in str(error):
        raise error
    if "No available kernel" in str(error):  # SDPA's message
        return "absent", "this backend refuses the case"
    return "error", f"{type(error).__name__}: {error}"[:500]


def _walk(prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> dict[str, Any]:
    """Run once what would be timed on a GPU."""
    call(prepare(0))
    return {}


def _time(prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> dict[str, Any]:
    seconds, runs = timing.measure(prepare, call)
    return {"seconds": seconds, "runs": runs, "peak_bytes": timing.peak_bytes(lambda: call(prepare(0)))}


def steps(
    function: Function, inputs: list[Inputs], p: float, direction: str
) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    """The untimed preparation of round i, and the timed call. The preparation of a backward is its forward."""
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
