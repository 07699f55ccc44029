"""`pytest bench`: every op beside its peers in pytest-benchmark's tables, one group per case.

Each lane is checked before it is timed. The timer synchronises with the GPU, so a time includes the host's part of a
call, which `python -m bench ops` leaves out. Each round starts with a flushed L2 cache and the next random inputs.
Compare saved runs with `--benchmark-autosave` and `--benchmark-compare`; select with -k ("attention and 512 and forward").
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from bench.conftest import GPU
from bench.core import floors, peers, timing
from bench.ops import grid
from bench.ops.check import Checker
from bench.ops.run import judge, make_inputs, steps
from bench.ops.table import OPS

ROUNDS, WARM_UP = 50, 5
CASES = list(grid.cases() if GPU else grid.tiny_cases())
LANES = {name: tuple(op.lanes) for name, op in OPS.items()}


@cache
def _flush() -> timing.Flush:
    return timing.Flush()


@lru_cache(maxsize=1)  # the lanes of one case run one after another
def _prepared(case: grid.Case) -> tuple[list[grid.Inputs], Checker]:
    inputs = make_inputs(case)
    return inputs, Checker(OPS[case.op], case, inputs[0])


@dataclass(frozen=True)
class Subject:
    """One lane on one case: the verdict of its check, and its inputs."""

    case: grid.Case
    lane: str
    status: str
    reason: str | None
    function: grid.Function | None
    inputs: list[grid.Inputs]


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    case, name = request.param
    torch._dynamo.reset()  # otherwise a second case would recompile the graph with dynamic shapes
    inputs, checker = _prepared(case)
    lane = OPS[case.op].lanes[name]
    judged = judge(case, lane, checker)
    return Subject(case, name, *judged, [x.packed() for x in inputs] if lane.packed else inputs)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(case, lane) for case in CASES for lane in LANES[case.op]]
    names = [f"{_name(case)}-{lane}" for case, lane in pairs]
    metafunc.parametrize("subject", pairs, ids=names, indirect=True, scope="module")
    metafunc.parametrize("direction", grid.DIRECTIONS)


def _name(c: grid.Case) -> str:
    return f"{c.op}-{c.dtype}-H{c.hidden}-B{c.batch}-S{c.seqlen}-fill{c.fill:g}-p{c.p:g}"


@pytest.mark.benchmark(timer=timing.host_timer)
def test_op(benchmark: Any, subject: Subject, direction: str) -> None:
    if subject.status in ("absent", "error"):
        pytest.skip(f"{subject.lane}: {subject.reason}")
    if direction not in floors.directions_of(subject.case.op):
        pytest.skip("its forward forms the gradients: only both directions together compare")
    assert subject.function is not None, subject.reason
    prepare, call = steps(subject.function, subject.inputs, subject.case.p, direction)
    if not GPU:
        call(prepare(0))
        pytest.skip(f"{peers.NO_GPU}: checked, not timed")
    benchmark.group = f"{_name(subject.case)} {direction}"
    _measure(benchmark, prepare, call)
    _describe(benchmark, subject.case, direction)


def _measure(benchmark: Any, prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> None:
    rounds = iter(range(10**9))

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        argument = prepare(next(rounds))
        _flush()()
        return (argument,), {}

    benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP)


def _describe(benchmark: Any, case: grid.Case, direction: str) -> None:
    """Add the achieved rates, from stated bytes and operations, for --benchmark-json."""
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "quartiles": [benchmark.stats.stats.q1, median, benchmark.stats.stats.q3],
        "TB/s": case.moved(direction) / median / 1e12,
        "TFLOP/s": case.operations(direction) / median / 1e12,
    }
