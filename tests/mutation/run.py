"""Runs pytest in copies of the tree, several at a time, each in a fork of this process.

It forks because this process has already imported torch and transformers, which takes longer than most of the tests.
It must not import anything of the tree except this package, which a fork unloads.
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutation.fault import ROOT
from tests.mutation.witness import Statement, Witness, statement

# An endless loop hits the first limit, an endless wait the second. The first is processor time, which does not depend on
# the load of the machine: a slow run must not count as a hang.
CPU_SECONDS, WALL_SECONDS = 240, 1800
# Deterministic examples, so that results are reproducible; and only the plugins that tests need, because each fork
# loads them again.
PLUGINS = ("-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider")
OPTIONS = ("-x", "-q", *PLUGINS, "--hypothesis-seed=0", "--timeout=0", "-o", "addopts=--import-mode=importlib")
ANOTHER_TREE = 70  # exit code of a fork that imported fastbert from another tree


@dataclass(frozen=True)
class Outcome:
    """The outcome of a pytest run. code: pytest's exit code, or minus the signal that ended the process."""

    code: int
    seen: Statement
    seconds: float
    cpu_seconds: float
    hung: bool
    output: str

    def not_passed(self, arguments: tuple[str, ...]) -> list[str]:
        """The pytest arguments of which no test passed, or all arguments if the run failed."""
        named = [argument for argument in arguments if ".py" in argument]
        if self.code != 0:
            return named
        return [name for name in named if not any(test.startswith(name) for test in self.seen.passed)]

    @property
    def killer(self) -> str | None:
        """The test that noticed, with a remark unless it simply failed; None if no test did.

        Collection errors and pytest's own errors (exit codes 2 to 5) do not count.
        """
        if self.seen.uncollected:
            return None
        if self.code == 1 and self.seen.failed:
            return self.seen.failed[0]
        if self.seen.started and self.hung:
            return f"{self.seen.started[-1]} (hung)"
        if self.seen.started and self.code < 0:
            return f"{self.seen.started[-1]} ({signal.Signals(-self.code).name})"
        return None


@dataclass
class Job:
    """A pytest run with `arguments` in the tree that `prepare` makes, limited to so many seconds of processor time."""

    prepare: Callable[[], Path]
    arguments: tuple[str, ...]
    done: Callable[[Outcome, Path], None]
    limit: int = CPU_SECONDS


@dataclass
class _Running:
    job: Job
    tree: Path
    started: float
    hung: bool = False


def by_file(selections: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The same tests in fewer runs: node ids are grouped by file, arguments with options are kept as they are."""
    files: dict[str, dict[str, None]] = {}
    others: dict[tuple[str, ...], None] = {}
    for selection in selections:
        if any(argument.startswith("-") for argument in selection):
            others[selection] = None
            continue
        for argument in selection:
            files.setdefault(argument.partition("::")[0], {})[argument] = None
    return [*map(tuple, files.values()), *others]


def run(jobs: Iterator[Job], at_once: int) -> None:
    """Run all jobs, `at_once` at a time; each job's callback gets its outcome in this process."""
    running: dict[int, _Running] = {}
    try:
        while True:
            while len(running) < at_once and (job := next(jobs, None)) is not None:
                tree = job.prepare()
                running[_fork(tree, job)] = _Running(job, tree, time.monotonic())
            if not running:
                return
            ended = [pid for pid in running if _end(pid, running[pid])]
            for pid in ended:
                del running[pid]
            if not ended:
                time.sleep(0.05)
    finally:
        for pid in running:
            _kill(pid)
            os.waitpid(pid, 0)  # before the trees that it writes to are removed


def _end(pid: int, run: _Running) -> bool:
    found, status, usage = os.wait4(pid, os.WNOHANG)
    seconds = time.monotonic() - run.started
    if not found:
        if seconds > WALL_SECONDS:
            run.hung = True
            _kill(pid)
        return False
    _kill(pid)  # processes that it may have left in its group
    code = os.waitstatus_to_exitcode(status)
    run.hung |= code == -signal.SIGXCPU
    seen, output = statement(run.tree / "seen.txt"), (run.tree / "output.txt").read_text(errors="replace")
    run.job.done(Outcome(code, seen, seconds, usage.ru_utime + usage.ru_stime, run.hung, output), run.tree)
    return True


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork(tree: Path, job: Job) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 71
    try:
        os.setpgid(0, 0)
        os.chdir(tree)
        output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (job.limit, job.limit + 10))
        code = _pytest(tree, job.arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pytest(tree: Path, arguments: tuple[str, ...]) -> int:
    # The command has imported nothing of fastbert, but in a test of the command conftest.py has.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "fastbert")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ |= {
        "PYTHONPATH": str(tree),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # for processes that tests start
    code = pytest.main([*OPTIONS, *arguments], plugins=[Witness(tree / "seen.txt")])
    package = sys.modules.get("fastbert")
    if package is not None and not Path(package.__file__).is_relative_to(tree):
        return ANOTHER_TREE
    return int(code)
