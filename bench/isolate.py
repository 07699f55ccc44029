"""Runs a command in a process group of its own with a time limit, and a job in a worker process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.schema import from_lines

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds between asking a process to end and killing its group
TAIL = 4000  # characters of a failed job's output that are kept: enough for its traceback


@dataclass(frozen=True)
class Outcome:
    """status "ok" or "error"; reason: the end of its output, or that time ran out."""

    status: str
    seconds: float
    reason: str | None
    records: list[Any] = field(default_factory=list)
    timed_out: bool = False


def run_command(command: list[str], timeout: float, environment: Mapping[str, str]) -> Outcome:
    """Run `command` from the root. After `timeout` seconds its whole group is interrupted, then killed."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)  # also on an exception here, and for what the process left running
        seconds = time.monotonic() - start
        output.seek(0)
        tail = output.read()[-TAIL:]
    if timed_out:
        return Outcome("error", seconds, f"stopped after {timeout:.0f} s\n{tail}".rstrip(), timed_out=True)
    if process.returncode:
        return Outcome("error", seconds, f"exit status {process.returncode}\n{tail}".rstrip())
    return Outcome("ok", seconds, None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, then kill its group: what it left running too."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_job(job: dict[str, Any], timeout: float) -> Outcome:
    """Run a job of bench.worker; the records that it wrote come back even where it failed or ran out of time.

    Its compilers' caches are its own and empty, so that the time to the first step is that of a first day.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_path, records_path = Path(folder, "job.json"), Path(folder, "records.jsonl")
        job_path.write_text(json.dumps(job))
        environment = {
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "bench.worker", str(job_path), str(records_path)]
        outcome = run_command(command, timeout, environment)
        lines = records_path.read_text().splitlines() if records_path.exists() else []
    return Outcome(outcome.status, outcome.seconds, outcome.reason, from_lines(lines))
