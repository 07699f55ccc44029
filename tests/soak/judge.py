"""Reads the journal of a disturbed run beside the undisturbed one: what was lost, done twice, leaked or not said."""

import math
from collections import Counter
from statistics import fmean
from typing import Any, NamedTuple

from tests.soak.faults import KILLS, Fault

Event = dict[str, Any]
WINDOWS = 20  # of a curve of losses
WARM_UP = 1000  # steps of a process after which its memory may not grow
# What a process may gain per step: less than one object in ten steps, and less than the rows that one layer keeps of a batch.
MOST = {"objects": 0.1, "blocks": 0.1, "bytes": 1024, "files": 0, "threads": 0}


class Run(NamedTuple):
    """The loss and the digest after each step."""

    losses: list[float]
    digests: list[str]


def lost(events: list[Event], undisturbed: Run) -> list[str]:
    """What the steps of a journal lack. Each is the one after the last, or after the checkpoint that a process started from,
    and ends with the very bits of the undisturbed run."""
    found: list[str] = []
    done = reached = 0
    for event in events:
        if event["what"] == "started":
            if event["step"] > reached:
                found.append(f"a process starts after step {event['step']}, but only {reached} were taken")
            done = event["step"]
        elif event["what"] == "step":
            if event["step"] != done + 1:
                found.append(f"step {event['step']} follows step {done}")
            done = event["step"]
            reached = max(reached, done)
            if event["digest"] != undisturbed.digests[done - 1]:
                found.append(f"step {done} ends with other weights, moments or random numbers than without faults")
            if event["loss"] != undisturbed.losses[done - 1]:
                found.append(f"step {done} has loss {event['loss']}, without faults {undisturbed.losses[done - 1]}")
    if done != len(undisturbed.losses) or events[-1]["what"] != "finished":
        found.append(f"the run ended after step {done} of {len(undisturbed.losses)}")
    return found


def missed(events: list[Event], faults: list[Fault], killed: int) -> list[str]:
    """Faults that were not injected or not met; `killed` is how many processes ended by a signal to kill."""
    injected = Counter((event["step"], event["kind"]) for event in events if event["what"] == "fault")
    met = Counter((event["step"], event["kind"]) for event in events if event["what"] == "met")
    planned = Counter((fault.step, fault.kind) for fault in faults)
    kills = sum(fault.kind in KILLS for fault in faults)
    found = [f"{kind} in step {step} was injected {injected[step, kind]} times" for step, kind in planned - injected]
    found += [f"{kind} in step {step} was not met" for step, kind in planned - met if kind not in KILLS]
    if kills != killed:
        found.append(f"{killed} processes were killed instead of {kills}")
    return found


def growth(events: list[Event]) -> tuple[int, dict[str, int]]:
    """What the last process gained after its warm-up: in how many steps, and how much of each."""
    last = max(i for i, event in enumerate(events) if "process" in event)  # it also "started" from checkpoints later
    first = next((event["step"] for event in events[last:] if event["what"] == "step"), 0)
    measured = [event for event in events[last:] if event["what"] == "measured" and event["step"] >= first + WARM_UP]
    if len(measured) < 2:
        return 0, {}
    return measured[-1]["step"] - measured[0]["step"], {name: measured[-1][name] - measured[0][name] for name in MOST}


def leaked(steps: int, gained: dict[str, int]) -> list[str]:
    return [f"{steps} steps gained {n} {name}" for name, n in gained.items() if n > MOST[name] * steps]


def curve(losses: list[float]) -> list[float]:
    """Means of the losses over equal parts of the run."""
    size = math.ceil(len(losses) / WINDOWS)
    return [fmean(losses[i : i + size]) for i in range(0, len(losses), size)]


def distance(one: list[float], other: list[float]) -> float:
    """The root of the mean square of what two curves differ by."""
    return math.sqrt(fmean((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def strays(ours: list[float], stock: list[float], other_stock: list[float]) -> list[str]:
    """Whether our curve is farther from stock's than twice what another dropout moves stock's."""
    far, own = distance(ours, stock), distance(stock, other_stock)
    return [] if far <= 2 * own else [f"the losses are {far:.3g} from stock's, which another dropout moves by {own:.3g}"]
