"""Runs commands in process groups of their own with a time limit, and jobs in worker processes."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from bench.core.schema import from_lines
from bench.runner import stop
from bench.runner.forks import ROOT, SERVER

GRACE = 4.0  # seconds between interrupting a process and killing its group
TAIL = 4000  # characters kept of a failed job's output, enough for its traceback


@dataclass(frozen=True)
class Outcome:
    """The end of a process. status: "ok" or "error"; reason: the end of its output, or that time ran out."""

    status: str
    seconds: float
    reason: str | None
    records: list[Any] = field(default_factory=list)
    timed_out: bool = False


class Process(Protocol):
    """A running process that leads a process group."""

    pid: int

    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...


def run_command(command: list[str], timeout: float, environment: Mapping[str, str]) -> Outcome:
    """Run `command` from the root. After `timeout` seconds, or on a request to stop, the process is interrupted and its
    whole group killed."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile("w+", errors="replace") as output:
        process = _begin(command, environment, output.name)
        return _watch(process, start, timeout, output.name)


def _begin(command: list[str], environment: Mapping[str, str], output: str) -> subprocess.Popen[bytes]:
    with open(output, "ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _watch(process: Process, start: float, timeout: float, output: str, grace: float = GRACE) -> Outcome:
    """Wait for the process, then kill the rest of its group. The end of its output comes from the file `output`."""
    try:
        finished = stop.wait_for(lambda: process.poll() is not None, start + timeout - time.monotonic())
    finally:
        _end(process, grace)  # also after an exception here, and for children that the process left running
    seconds = time.monotonic() - start
    tail = Path(output).read_text(errors="replace")[-TAIL:]
    if not finished:
        why = stop.reason() or f"stopped after {timeout:.0f} s"
        return Outcome("error", seconds, f"{why}\n{tail}".rstrip(), timed_out=True)
    status = process.poll()
    if status:
        return Outcome("error", seconds, f"exit status {status}\n{tail}".rstrip())
    return Outcome("ok", seconds, None)


def _end(process: Process, grace: float) -> None:
    """Interrupt the process, then kill its group, including children that it left running."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        stop.wait_for(lambda: process.poll() is not None, grace, whatever=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    stop.wait_for(lambda: process.poll() is not None, GRACE, whatever=True)


@cache
def shared_caches() -> str:
    """A temporary folder for the compilers' caches of this run, so that jobs share what they compile."""
    folder = tempfile.TemporaryDirectory(prefix="bench-caches-")
    atexit.register(folder.cleanup)
    return folder.name


def caches(folder: str) -> dict[str, str]:
    """The environment that puts the caches of Triton and inductor into `folder`."""
    return {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}


QUIET = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_job(job: dict[str, Any], timeout: float) -> Outcome:
    """Run a job of bench.runner.worker. Its records are returned even if it failed or ran out of time.

    Jobs share this run's compiler caches. A "cold" job has empty caches of its own, so that its first step includes all
    compilation.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        where = caches(folder if job.get("cold") else shared_caches())
        arguments, records, output = _files(job, folder)
        process = SERVER.start(arguments, QUIET | where, output) or _fresh(arguments, QUIET | where, output)
        outcome = _watch(process, start, timeout, output)
        if "forked subprocess" in (outcome.reason or "") and not isinstance(process, subprocess.Popen):
            SERVER.give_up()  # one of the server's imports touched the GPU
            outcome = _watch(_fresh(arguments, QUIET | where, output), start, timeout, output)
        lines = records.read_text().splitlines() if records.exists() else []
    return Outcome(outcome.status, outcome.seconds, outcome.reason, from_lines(lines), outcome.timed_out)


def _files(job: dict[str, Any], folder: str) -> tuple[list[str], Path, str]:
    """The arguments of a worker that reads the job from `folder`, and the paths of its records and its output."""
    job_path, records, output = (Path(folder, name) for name in ("job.json", "records", "output"))
    job_path.write_text(json.dumps(job))
    output.touch()
    return [str(job_path), str(records)], records, str(output)


def _fresh(arguments: list[str], environment: Mapping[str, str], output: str) -> Process:
    return _begin([sys.executable, "-m", "bench.runner.worker", *arguments], environment, output)


class Background:
    """Jobs that run in parallel to others to fill the shared caches. Their records are ignored."""

    def __init__(self, jobs: Sequence[dict[str, Any]], environment: Mapping[str, str]) -> None:
        self.jobs, self.environment = jobs, environment
        self.running: list[tuple[subprocess.Popen[bytes], str]] = []

    def begin(self, timeout: float) -> Outcome:
        """Start all jobs. They are ended when this process exits."""
        folder = tempfile.TemporaryDirectory()
        for number, job in enumerate(self.jobs):
            Path(folder.name, str(number)).mkdir()
            arguments, _, output = _files(job, f"{folder.name}/{number}")
            environment = {**QUIET, **caches(shared_caches()), **self.environment}
            self.running.append((_fresh(arguments, environment, output), output))
        atexit.register(folder.cleanup)
        atexit.register(self.finish, 0.0)
        return Outcome("ok", 0.0, None)

    def finish(self, timeout: float) -> Outcome:
        """Wait at most `timeout` seconds for the jobs, then end those still running."""
        start = time.monotonic()
        wrong = []
        for process, output in self.running:
            outcome = _watch(process, start, timeout, output, grace=0.2)
            if outcome.status != "ok":
                wrong.append(outcome.reason or "")
        self.running = []
        return Outcome("error" if wrong else "ok", time.monotonic() - start, "\n".join(wrong) or None)
