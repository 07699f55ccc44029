"""Starts jobs as forks of a server process that has already imported torch, triton and transformers.

A fork isolates a job as well as a new process does and saves some ten seconds of imports. The server
(`python -m bench.runner.forks`) never touches the GPU, because a fork cannot use its parent's context. Each line of JSON on
its standard input is a job; it answers with the process id of the fork and, after the fork's end, its exit status.
"""

import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from bench.runner import stop

ROOT = Path(__file__).resolve().parents[2]
READY = 120.0  # seconds that the server may take to import everything
LOST = -255  # the exit status of a job whose server has died


class Forked:
    """A job that runs in a fork, with the interface of subprocess.Popen that callers use."""

    def __init__(self, pid: int, server: "Server") -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None and self._server.answers():
            self.returncode = self._server.answer()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Server:
    """Client of the server, which runs one job at a time and starts with the first one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.usable, self.ready = True, False

    def start(self, arguments: list[str], environment: Mapping[str, str], output: str) -> Forked | None:
        """Run bench.runner.worker.main(*arguments) in a fork; returns None if the server cannot run here."""
        self.begin()
        if self.usable and not self.ready:
            self.ready = stop.wait_for(self.answers, READY) and self.answer() == 0
            if not self.ready:
                self.give_up()
        if self.process is None or self.process.stdin is None:
            return None
        order = {"arguments": arguments, "environment": dict(environment), "output": output}
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
        except OSError:
            return self.give_up()
        pid = self.answer()
        return Forked(pid, self) if pid != LOST else self.give_up()

    def begin(self) -> None:
        """Start the server, which begins to import, unless it is running."""
        if self.usable and self.process is None:
            pipe, command = subprocess.PIPE, [sys.executable, "-m", "bench.runner.forks"]
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True
            )

    def give_up(self) -> None:
        """Stop the server; all further jobs run in processes of their own."""
        self.usable = False
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def answers(self) -> bool:
        """Whether an answer or the server's end of output can be read now."""
        return self.process is None or bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer(self) -> int:
        """The next answer; LOST if the server has ended."""
        line = self.process.stdout.readline() if self.process and self.process.stdout else b""
        return int(line) if line.strip() else LOST


SERVER = Server()


def serve() -> None:
    """Import everything, answer 0, then fork for each input line until the input ends."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "r+b") as nothing:
        for descriptor in (0, 1):
            os.dup2(nothing.fileno(), descriptor)
    # Forks inherit these imports.
    import bench.host.run
    import bench.models.latency
    import bench.models.run
    import bench.ops.optimizers
    import bench.ops.run
    import bench.runner.worker
    import bench.tune.run  # noqa: F401

    print(0, file=answers)
    for line in orders:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be_the_job(order)
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


def _be_the_job(order: dict) -> None:
    from bench.runner import worker

    os.setsid()
    output = os.open(order["output"], os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(order["environment"])
    status = 1
    try:
        worker.main(*order["arguments"])
        status = 0
    except BaseException:  # including signals: a fork must never return into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
