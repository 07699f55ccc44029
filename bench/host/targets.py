"""Defines the targets of the host measurements and checks records against them."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.core import comparison
from bench.core.records import HostRecord
from bench.host import cases
from bench.host.cases import HostCase
from bench.host.counts import kernels
from bench.host.tables import cpu_ratio, peak_ratio

CPU, PEAK, LAUNCHES = "CPU time / stock", "peak memory / stock", "launches"


@dataclass(frozen=True)
class Target:
    """The upper limit `most` for the figure `what` of a lane."""

    case: HostCase
    lane: str
    what: str
    most: float


TARGETS = (
    Target(cases.INFERENCE_1, cases.GRAPHED, CPU, 0.08),
    Target(cases.INFERENCE_8, cases.GRAPHED, CPU, 0.12),
    Target(cases.INFERENCE_32, cases.GRAPHED, CPU, 0.12),
    Target(cases.TRAINING, cases.GRAPHED_STEP, CPU, 0.10),
    Target(cases.TRAINING_AUTOCAST, cases.GRAPHED_STEP, CPU, 0.10),
    Target(cases.MLM, cases.GRAPHED_STEP, CPU, 0.10),
    Target(cases.INFERENCE_1, cases.PADDED, CPU, 0.45),
    Target(cases.INFERENCE_32, cases.PACKED, CPU, 0.70),
    Target(cases.TRAINING, cases.PADDED, CPU, 0.60),
    Target(cases.TRAINING, cases.PADDED, LAUNCHES, 380),
    Target(cases.TRAINING, cases.PACKED, CPU, 0.75),
    Target(cases.TRAINING_AUTOCAST, cases.PADDED, CPU, 0.55),
    Target(cases.MLM, cases.PLAIN, CPU, 0.75),
    Target(cases.MLM, cases.PACKED_NO_LOGITS, CPU, 0.80),
    Target(cases.MLM, cases.PACKED_NO_LOGITS, PEAK, 0.30),
    Target(cases.MLM_FULL_ROWS, cases.PADDED_NO_LOGITS, PEAK, 0.48),
)


def check(records: Iterable[HostRecord]) -> tuple[list[str], int]:
    """One line for each target that is missed or has no figure, and the number of targets for the cases of the records."""
    by_case = comparison.by_case(records)
    missed, count = [], 0
    for target in TARGETS:
        of_case = by_case.get((target.case.name,))
        if of_case is None:
            continue
        count += 1
        record = next((record for record in of_case if record.lane == target.lane), None)
        found = _figure(target.what, record, comparison.baseline(of_case)) if record else None
        if found is None or found > target.most:
            figure = "no figure" if found is None else f"{found:.4g}"
            missed.append(f"{target.case.name}, {target.lane}: {target.what}: {figure}, expected at most {target.most:g}")
    return missed, count


def _figure(what: str, record: HostRecord, stock: HostRecord | None) -> float | None:
    if what == LAUNCHES:
        return kernels(record.launches) or None
    return (cpu_ratio if what == CPU else peak_ratio)(record, stock)
