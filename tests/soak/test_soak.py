"""The soak itself: short, with one fault of each kind; and that its judge notices what it is there for."""

from pathlib import Path
from typing import Any

import pytest

from tests.soak import judge
from tests.soak.faults import KILLS, SHARES, Fault, drawn
from tests.soak.judge import Run
from tests.soak.run import Disturbed, run
from tests.soak.training import Training
from tests.soak.worker import Worker, read_journal

STEPS = 28


pytestmark = pytest.mark.usefixtures("falling_back")


def undisturbed(steps: int) -> Run:
    training, found = Training(), Run([], [])
    for _ in range(steps):
        found.losses.append(training.step())
        found.digests.append(training.digest())
    return found


def test_every_kind_of_fault_in_one_process(tmp_path: Path) -> None:
    faults = [fault for fault in drawn(STEPS, seed=1) if fault.kind not in KILLS]
    assert {fault.kind for fault in faults} == SHARES.keys() - set(KILLS)
    Worker(tmp_path, STEPS, faults).run()
    events = read_journal(tmp_path)
    assert judge.lost(events, undisturbed(STEPS)) == [] and judge.missed(events, faults, killed=0) == []


def test_processes_that_are_killed(tmp_path: Path) -> None:
    steps, faults = 6, [Fault(2, "killed while saving", 0.5), Fault(4, "killed", 0.7)]
    disturbed, expected = Disturbed(tmp_path, steps, faults), undisturbed(steps)
    while disturbed.runs(wait=1.0):
        pass
    events = read_journal(tmp_path)
    assert not disturbed.failed and disturbed.killed == 2
    assert judge.lost(events, expected) == [] and judge.missed(events, faults, killed=2) == []
    assert sum(event["what"] == "step" for event in events) == 2 + 4 + 6  # each time again from the first checkpoint


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_thousands_of_steps(tmp_path: Path) -> None:
    outcome = run(10_000, tmp_path)
    assert outcome["result"] == "nothing lost", outcome["problems"]


UNDISTURBED = Run([3.0, 2.0, 1.0], ["a", "b", "c"])
FAULT = Fault(1, "killed", 0.5)


def journal() -> list[dict[str, Any]]:
    """Three steps, of which the second is taken again after a process was killed."""
    taken = zip((1, 2, 3), *UNDISTURBED, strict=True)
    steps = [{"what": "step", "step": step, "loss": loss, "digest": digest} for step, loss, digest in taken]
    started = {"what": "started", "step": 0}
    fault = {"what": "fault", "step": FAULT.step, "kind": FAULT.kind}
    return [started, steps[0], fault, started, *steps, {"what": "finished", "step": 3}]


def test_a_journal_without_a_loss() -> None:
    assert judge.lost(journal(), UNDISTURBED) == [] and judge.missed(journal(), [FAULT], killed=1) == []


@pytest.mark.parametrize(
    ("place", "change", "noticed"),
    [
        (5, None, "step 3 follows step 1"),
        (6, {"step": 2, "loss": 2.0, "digest": "b"}, "step 2 follows step 2"),
        (6, {"digest": "x"}, "step 3 ends with other weights"),
        (5, {"loss": 2.5}, "step 2 has loss 2.5, without faults 2.0"),
        (3, {"step": 2}, "a process starts after step 2, but only 1 were taken"),
        (7, None, "the run ended after step 3 of 3"),
        (6, None, "the run ended after step 2 of 3"),
    ],
)
def test_what_was_lost_is_noticed(place: int, change: dict[str, Any] | None, noticed: str) -> None:
    events = journal()
    events[place : place + 1] = [] if change is None else [events[place] | change]
    assert any(problem.startswith(noticed) for problem in judge.lost(events, UNDISTURBED)), judge.lost(events, UNDISTURBED)


def test_a_fault_that_was_missed_is_noticed() -> None:
    other = Fault(2, "verified", 0.5)
    injected = {"what": "fault", "step": other.step, "kind": other.kind}
    assert judge.missed(journal(), [FAULT, other], killed=1) == [
        "verified in step 2 was injected 0 times",
        "verified in step 2 was not met",
    ]
    assert judge.missed([*journal(), injected], [FAULT, other], killed=1) == ["verified in step 2 was not met"]
    assert judge.missed(journal(), [FAULT], killed=0) == ["0 processes were killed instead of 1"]


def test_a_leak_is_noticed() -> None:
    held = {"objects": 1000, "blocks": 2000, "bytes": 10**8, "files": 9, "threads": 1}
    events = [{"what": "started", "step": 0, "process": 1}, {"what": "step", "step": 1}]
    events += [{"what": "measured", "step": step, **held} for step in (500, 1001)]
    events += [{"what": "started", "step": 1500}, {"what": "measured", "step": 2001, **held}]
    assert judge.growth(events) == (1000, dict.fromkeys(held, 0))
    for name, n in (("objects", 101), ("blocks", 101), ("bytes", 1024_001), ("files", 1), ("threads", 1)):
        events[-1][name] += n
        assert judge.leaked(*judge.growth(events)) == [f"1000 steps gained {n} {name}"]
        events[-1][name] -= n


def test_another_curve_is_noticed() -> None:
    stock, other = judge.curve([3.0, 2.0, 1.0]), judge.curve([3.1, 1.9, 1.0])
    assert judge.strays(other, stock, other) == []
    assert judge.strays([3.2, 2.2, 1.2], stock, other)


def test_faults_are_drawn_once() -> None:
    faults = drawn(1_000, seed=0)
    assert faults == drawn(1_000, seed=0) != drawn(1_000, seed=1)
    assert len({fault.step for fault in faults}) == len(faults) and {fault.kind for fault in faults} == SHARES.keys()
    assert all(fault.step < 1_000 / 3 for fault in faults if fault.kind in KILLS)
