"""Runs the soak: the disturbed run in processes of its own, restarted when they are killed, beside the undisturbed run here."""

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests import ranks
from tests.soak import judge
from tests.soak.faults import drawn
from tests.soak.training import Training
from tests.soak.worker import read_journal, work

Progress = Callable[[str, int], None]


class Disturbed:
    """The disturbed run. `killed` counts its processes that were killed; `failed` says that one ended in any other way."""

    def __init__(self, *arguments: Any) -> None:
        ranks.start_server()
        self._arguments = arguments
        self.processes = self.killed = 0
        self.failed = False
        self._start()

    def _start(self) -> None:
        self.processes += 1
        self._process = multiprocessing.get_context(ranks.STARTED_BY).Process(target=work, args=self._arguments)
        self._process.start()

    def runs(self, wait: float = 0.0) -> bool:
        """Whether it still runs, after `wait` seconds at most; a process that was killed is replaced."""
        self._process.join(wait)
        if self._process.exitcode == -signal.SIGKILL:
            self.killed += 1
            self._start()
        elif self._process.exitcode is not None:
            self.failed = self._process.exitcode != 0
            return False
        return True


def run(steps: int, folder: Path, seed: int = 0, progress: Progress = lambda what, done: None) -> dict[str, Any]:
    """Take `steps` steps with and without faults, with journal and checkpoints in `folder`, which is empty.

    Returns the outcome, as plain data; `problems` is empty if nothing was lost. After an error nothing more is compared.
    """
    began, faults = time.monotonic(), drawn(steps, seed)
    disturbed = Disturbed(folder, steps, faults)
    undisturbed = judge.Run([], [])
    for loss, digest in _undisturbed(steps):
        undisturbed.losses.append(loss)
        undisturbed.digests.append(digest)
        if not disturbed.runs() and disturbed.failed:
            break
        progress("undisturbed", len(undisturbed.losses))
    while disturbed.runs(wait=1.0):
        progress("disturbed", _reached(folder))
    events = read_journal(folder)
    progress("disturbed", _reached(folder))
    grown_in, gained, curves = 0, {}, []
    if disturbed.failed:
        problems = [event["why"] for event in events if event["what"] == "failed"] or ["a process ended without a word"]
    else:
        curves = [judge.curve(losses) for losses in (undisturbed.losses, *(_of_stock(steps, seed) for seed in (1, 2)))]
        grown_in, gained = judge.growth(events)
        problems = judge.lost(events, undisturbed) + judge.missed(events, faults, disturbed.killed)
        problems += judge.leaked(grown_in, gained) + judge.strays(*curves)
    return {
        "result": "nothing lost" if not problems else "failed",
        "problems": problems,
        "steps": steps,
        "seed": seed,
        "faults": dict(sorted(Counter(fault.kind for fault in faults).items())),
        "kernels_that_failed": dict(sorted(Counter(event["kernel"] for event in events if "kernel" in event).items())),
        "processes": disturbed.processes,
        "steps_taken_again": sum(event["what"] == "step" for event in events) - steps,
        "growth": {"steps": grown_in, **gained},
        "losses": dict(zip(("patched", "stock", "stock with another dropout"), curves, strict=False)),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
        "seconds": round(time.monotonic() - began),
    }


def _undisturbed(steps: int) -> Iterator[tuple[float, str]]:
    training = Training()
    for _ in range(steps):
        yield training.step(), training.digest()


def _of_stock(steps: int, seed: int) -> list[float]:
    training = Training(stock=True, seed=seed)
    return [training.step() for _ in range(steps)]


def _reached(folder: Path) -> int:
    return max((event["step"] for event in read_journal(folder) if event["what"] == "step"), default=0)
