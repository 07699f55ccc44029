"""Runs one job of a plan in its own process: `python -m bench.runner.worker JOB.json RECORDS`.

A job can run out of memory, be killed or break the CUDA context without affecting the next one. Each record is one line,
flushed at once, so a killed job leaves complete records. Kernels run with `failures.strict`: a kernel that fails is an
error, so that no time of the plain PyTorch fallback is recorded under a kernel's name.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.core.schema import to_line


def _ceilings() -> Iterator[Any]:
    from bench.core import ceilings

    yield from ceilings.run()


def _model(workloads: list[dict[str, Any]], lanes: list[str], details: list[str], cold: bool) -> Iterator[Any]:
    from bench.models.run import run
    from bench.models.workloads import Workload

    for workload in workloads:
        for lane in lanes:
            yield from run(Workload.from_json(workload), lane, details=lane in details, cold=cold)


def _latency(streams: list[dict[str, Any]], lanes: list[str], **job: Any) -> Iterator[Any]:
    from bench.models.latency import run
    from bench.models.workloads import Workload

    yield from run([Workload.from_json(workload) for workload in streams], lanes, **job)


def _encode(cases: list[dict[str, Any]], lanes: list[str] | None, **job: Any) -> Iterator[Any]:
    from bench.encode.cases import EncodeCase
    from bench.encode.run import run

    yield from run([EncodeCase(**case) for case in cases], lanes, **job)


def _prepare(workload: dict[str, Any], lanes: list[str]) -> Iterator[Any]:
    from bench.models.run import prepare
    from bench.models.workloads import Workload

    for lane in lanes:
        prepare(Workload.from_json(workload), lane)
    yield from ()


def _ops(cases: list[dict[str, Any]], directions: list[str], lanes: list[str] | None = None) -> Iterator[Any]:
    from bench.ops.grid import Case
    from bench.ops.run import run

    for case in cases:
        yield from run(Case(**case), lanes, tuple(directions))


def _optimizers(models: list[str]) -> Iterator[Any]:
    from bench.ops import optimizers

    for model in models:
        yield from optimizers.run(model)


def _host(**job: Any) -> Iterator[Any]:
    from bench.host.run import run

    yield from run(**job)


def _tune(**job: Any) -> Iterator[Any]:
    from bench.tune.run import run

    yield from run(**job)


# The function that runs each kind of job and yields its records.
KINDS: dict[str, Callable[..., Iterator[Any]]] = {
    "ceilings": _ceilings,
    "model": _model,
    "latency": _latency,
    "encode": _encode,
    "prepare": _prepare,
    "host": _host,
    "ops": _ops,
    "optimizers": _optimizers,
    "tune": _tune,
}


def main(job_path: str, records_path: str) -> None:
    """Run the job at `job_path` and write its records to `records_path`, one line each."""
    import torch

    from fastbert.kernels.core import failures
    from fastbert.testing.interpreter import accelerate

    failures.strict = True  # no fallback is timed under a kernel's name
    job = json.loads(Path(job_path).read_text())
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        accelerate()
    with open(records_path, "w") as file:
        for record in KINDS[job.pop("kind")](**job):
            print(to_line(record), file=file, flush=True)
            os.fsync(file.fileno())


if __name__ == "__main__":
    main(*sys.argv[1:])
