"""Compares lanes for reports: the noise rule, the baseline of a case, and the words that stand in for a missing time."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from bench.core.records import OpRecord, Timed

NOT_MEASURED = "not measured"
BASELINES = (
    "stock",
    "fused",
    "sdpa efficient",
    "eager",
)  # lanes are compared with the first one that was timed
WHY_NOT = {"failed": "failed its check", "error": "did not run", "dry-run": "not measured (dry run)"}  # by status
Record = TypeVar("Record", bound=Timed)


def is_ours(lane: str) -> bool:
    return lane.startswith("fastbert")


def by_case(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """Group records by case, in order; each list holds the lanes of one case."""
    cases: dict[tuple, list[Record]] = {}
    for record in records:
        cases.setdefault(record.case, []).append(record)
    return cases


def baseline(records: Sequence[Record]) -> Record | None:
    """The lane that the others of a case are compared with: stock, or for an op torch's best untuned implementation."""
    timed = {record.lane: record for record in records if record.seconds}
    return next((timed[name] for name in BASELINES if name in timed), None)


def best_peer(records: Sequence[Record]) -> Record | None:
    """The fastest timed lane that is not fastbert's."""
    timed = [record for record in records if record.seconds and not is_ours(record.lane)]
    return min(timed, key=lambda record: record.seconds.median, default=None)


def ratio(record: Timed, other: Timed | None) -> str:
    """ "1.50x", "0.80x (slower)", or "no difference" if the quartiles overlap; empty unless both have times."""
    if other is None or other is record or record.seconds is None or other.seconds is None:
        return ""
    times = other.seconds.median / record.seconds.median
    if not record.seconds.differs(other.seconds):
        return f"no difference ({times:.2f}x, quartiles overlap)"
    return f"{times:.2f}x" if times >= 1 else f"{times:.2f}x (slower)"


def why_not(record: Timed) -> str:
    """The text shown in place of a missing time."""
    first = (record.reason or "").splitlines()[:1]
    detail = f": {first[0]}" if first else ""
    return WHY_NOT.get(record.status, NOT_MEASURED) + detail


def share(record: OpRecord, copy: float | None, product: float | None) -> float | None:
    """The achieved share of the floor's rate, by the ceilings measured in the same run."""
    if record.seconds is None or not copy or not product:
        return None
    return max(record.moved / copy, record.operations / product) / record.seconds.median


def rate(record: OpRecord) -> str:
    """Achieved TFLOP/s of an op with matrix products, TB/s of any other."""
    assert record.seconds is not None
    if record.operations:
        return f"{record.operations / record.seconds.median / 1e12:.0f} TFLOP/s"
    return f"{record.moved / record.seconds.median / 1e12:.2f} TB/s"
