"""The disturbed run: takes steps, meets its faults, and writes all that happens to a journal.

The journal has a line of JSON for each event and survives a killed process: where the process started, each step's loss and
digest, each fault before it is injected and after it was met, going back to a checkpoint, and measurements of the process.
"""

import gc
import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from fastbert.kernels.core import failures
from tests import ranks
from tests.soak.faults import Fault
from tests.soak.inject import injectable
from tests.soak.meet import meet
from tests.soak.training import Training

SAVE_EVERY = 50
MEASURE_EVERY = 250


class Worker:
    """A process of the disturbed run, which goes on from the last checkpoint in `folder` to step `steps`."""

    def __init__(self, folder: Path, steps: int, faults: list[Fault]) -> None:
        self.steps, self.checkpoint = steps, folder / "checkpoint"
        met = {event["step"] for event in read_journal(folder) if event["what"] == "fault"}
        self.faults = {fault.step: fault for fault in faults if fault.step not in met}
        self.training = Training()
        if self.checkpoint.exists():
            self.training.load(self.checkpoint)
        else:
            self.training.save(self.checkpoint)
        self.journal = _place(folder).open("a")
        self.write("started", step=self.training.done, process=os.getpid())

    def write(self, what: str, **details: Any) -> None:
        self.journal.write(json.dumps({"what": what, **details}) + "\n")
        self.journal.flush()

    def run(self) -> None:
        """Take all steps that are left; what goes wrong is written to the journal and raised."""
        try:
            with injectable():
                while self.training.done < self.steps:
                    fault = self.faults.pop(self.training.done, None)
                    if fault is None:
                        self.taken(self.training.step())
                    else:
                        self.disturbed(fault)
            self.write("finished", step=self.training.done)
        except BaseException as error:
            self.write("failed", step=self.training.done, why="".join(traceback.format_exception(error))[-4000:])
            raise
        finally:
            self.journal.close()

    def disturbed(self, fault: Fault) -> None:
        before = self.training.digest()
        self.write("fault", step=fault.step, kind=fault.kind)
        found = meet(fault.kind, self.training, fault.place, self.checkpoint)
        done = self.training.done
        if done == fault.step and self.training.digest() != before:
            raise AssertionError(f"{fault.kind}: weights, optimizer or random numbers are not as they were before it")
        self.write("met", **(fault._asdict() | found))
        if done < fault.step:
            self.write("started", step=done)
        elif "loss" in found:
            self.taken(found["loss"])

    def taken(self, loss: float) -> None:
        """Write down the step that was just taken, and do what a loop does every so often."""
        done = self.training.done
        self.write("step", step=done, loss=loss, digest=self.training.digest())
        if done % SAVE_EVERY == 0:
            self.training.save(self.checkpoint)
        if done % MEASURE_EVERY == 0:
            self.write("measured", step=done, **measured())


def measured() -> dict[str, int]:
    """What a process holds: Python's objects and blocks of memory, resident bytes, open files, threads."""
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def _place(folder: Path) -> Path:
    return folder / "journal"


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The events so far, in their order."""
    path = _place(folder)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(folder: Path, steps: int, faults: list[Fault]) -> None:
    """The work of a process from the fork server of tests/ranks.py."""
    ranks.prepare()
    failures.strict = False
    logging.getLogger("fastbert").setLevel(logging.ERROR)  # it tells of each failure, which the journal does as well
    Worker(folder, steps, faults).run()
    ranks.leave()
