"""Runs the compile audit: every op x shipped configuration x architecture, compiled ahead of time without a GPU.

It compares the compiler's output with the state accepted for that release of Triton, results/audit-<release>.json.
It says nothing about results or time.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.core.hardware import ARCHITECTURES, BF16_OPERATIONS_PER_SECOND, COPY_BYTES_PER_SECOND

if TYPE_CHECKING:
    from fastbert.testing.spec import OpSpec, Variant

__all__ = ["compare", "differences", "ops", "read", "run", "severity", "short", "write"]

RESULTS = Path(__file__).parents[1] / "results"
WHOLE = "3.7"  # the release whose accepted state covers everything; other releases' states cover the short list
RELEASES = ("3.6", WHOLE, "3.8")
BATCH = 8  # variants per task: few starts of nvdisasm, and the workers still finish at about the same time
HOT_LOOP_GROWTH = 1.10
OFF = "feed_forward"  # compiled, but not launched by the shipped configuration
APART = 1.15  # how much longer a hot loop of the short list may be under one release than under the best one
# The only keys that may spill, up to the baseline's count: rows and tiles that do not fit into the registers of an SM
# (bench/FINDINGS.md).
ACCEPTED_SPILLS = (
    "sm_100 backward gelu_layernorm mixed 8192 gelu",
    "sm_90 backward embedding_layernorm fp32 8192 *",
    "sm_100 backward encoder_layer mixed 8192 norm",
)
Record = dict[str, Any]


def ops() -> "dict[str, OpSpec]":
    """The ops by name. Imported inside the function: specs import triton, and a dry run selects its interpreter first."""
    from fastbert.testing.specs import SPECS

    return SPECS


def short() -> set[str]:
    """The variants of the short list: BERT-base in bf16 training. It takes a minute and a half instead of a quarter of an
    hour and covers what a change is most likely to break."""
    return {f"{op} {form}" for op, spec in ops().items() for form in spec.short}


def run(
    names: list[str],
    architectures: list[str],
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    only_short: bool = False,
) -> list[Record]:
    """Records of all variants of the ops `names`, or of their short list, sorted by key."""
    variants = [v for name in names for v in ops()[name].variants() if not only_short or v.name in short()]
    batches = [
        (architecture, variants[i : i + BATCH]) for architecture in architectures for i in range(0, len(variants), BATCH)
    ]
    records: list[Record] = []
    with compiling_environment(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(_audit_batch, *batch) for batch in batches]
        for done, task in enumerate(as_completed(tasks), 1):
            records += task.result()
            if progress:
                progress(done, len(tasks))
    return sorted(records, key=lambda record: record["key"])


def _audit_batch(architecture: str, variants: "list[Variant]") -> list[Record]:
    from bench.audit.compile import audit_batch  # imports triton, so only in the worker

    return audit_batch(architecture, variants)


@contextmanager
def compiling_environment() -> Iterator[None]:
    """Let workers inherit an environment in which triton compiles and keeps line numbers, which access widths need."""
    names = ("TRITON_INTERPRET", "TRITON_DISABLE_LINE_INFO")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def release() -> str:
    """The release of the installed Triton, for example "3.7"."""
    return ".".join(metadata.version("triton").split(".")[:2])


def baseline(triton: str) -> Path:
    """The file with the accepted state of this release."""
    return RESULTS / f"audit-{triton}.json"


def read(triton: str = WHOLE) -> list[Record]:
    return json.loads(baseline(triton).read_text())["records"]


def write(records: list[Record], path: Path) -> None:
    """Write one record per line, so that changes of the baseline are readable in a diff."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"records": [\n{lines}\n]}}\n')


def merge(baseline: list[Record], records: list[Record], names: list[str], architectures: list[str]) -> list[Record]:
    """The baseline with the selected part replaced by `records`."""
    kept = [r for r in baseline if not (r["op"] in names and r["architecture"] in architectures)]
    return sorted(kept + records, key=lambda record: record["key"])


def selected(baseline: list[Record], names: list[str], architectures: list[str], only_short: bool) -> list[Record]:
    """The part of the baseline that `run` with these arguments compiles."""
    chosen = short() if only_short else set()
    return [
        record
        for record in baseline
        if record["op"] in names
        and record["architecture"] in architectures
        and (not only_short or record["key"].split(maxsplit=2)[2] in chosen)
    ]


def compare(baseline: list[Record], records: list[Record]) -> list[str]:
    """What is worse than the accepted state, one line each; empty if nothing is.

    Both lists must cover the same selection: a case that is new or no longer there requires a deliberate update too.
    """
    accepted = {record["key"]: record for record in baseline}
    found = {record["key"]: record for record in records}
    problems = [f"{key}: not in the baseline" for key in found.keys() - accepted.keys()]
    problems += [f"{key}: in the baseline but no longer compiled" for key in accepted.keys() - found.keys()]
    for key in found.keys() & accepted.keys():
        problems += [f"{key}: {problem}" for problem in _regressions(accepted[key], found[key])]
    return sorted(problems)


def differences(by_release: dict[str, list[Record]]) -> list[str]:
    """Kernels of the short list that spill on sm_80 or sm_90, or whose hot loop is much longer than under the best release."""
    loops: dict[str, dict[str, int]] = {}
    problems = []
    for triton, records in by_release.items():
        for record in selected(records, [op for op in ops() if op != OFF], ["sm_80", "sm_90"], only_short=True):
            loops.setdefault(record["key"], {})[triton] = record["hot_instructions"]
            if record["spills"] or record["local_bytes"]:
                problems.append(f"{record['key']}: spills under triton {triton}")
    for key, found in loops.items():
        if max(found.values()) > APART * min(found.values()) or found.keys() != by_release.keys():
            problems.append(f"{key}: hot loop " + ", ".join(f"{n} under {triton}" for triton, n in found.items()))
    return problems


def may_spill(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in ACCEPTED_SPILLS)


def _regressions(before: Record, now: Record) -> Iterator[str]:
    yield from now.get("unwritten", ())
    for what in ("spills", "local_bytes"):
        if now[what] > (before[what] if may_spill(now["key"]) else 0):
            yield f"spill: {what} {before[what]} -> {now[what]}"
    if now["shared_bytes"] > now["shared_limit"]:
        yield f"shared memory {now['shared_bytes']} over the limit of {now['shared_limit']}"
    for name, width in before["access_bytes"].items():
        if now["access_bytes"].get(name, width) < width:
            yield f"{name} is accessed {now['access_bytes'][name]} bytes at a time, was {width}"
    if now["wide_share"] < before["wide_share"]:
        yield f"16-byte share {before['wide_share']:.0%} -> {now['wide_share']:.0%}"
    for kind, count in before["matrix"].items():
        if kind != "tf32" and count and not now["matrix"].get(kind):
            yield f"no {kind} instructions, was {count}"
    if now["matrix"].get("tf32", 0) > before["matrix"].get("tf32", 0):
        yield "new tf32 instructions"
    if now["hot_instructions"] > HOT_LOOP_GROWTH * before["hot_instructions"]:
        yield f"hot loop {before['hot_instructions']} -> {now['hot_instructions']} instructions"


def severity(record: Record) -> tuple[bool, float, float]:
    """Sort key, worst first: spills and kernels that do not fit, then narrow accesses, then the closest to the issue bound."""
    broken = bool(record["spills"] or record["local_bytes"] or record["shared_bytes"] > record["shared_limit"])
    ceiling = COPY_BYTES_PER_SECOND if "issue_tb_per_second" in record else BF16_OPERATIONS_PER_SECOND
    issue = record["issue_tb_per_second"] if "issue_tb_per_second" in record else record["issue_tflop_per_second"]
    return not broken, record["wide_share"], issue * 1e12 / ceiling


def selection(names: list[str], architectures: list[str]) -> tuple[list[str], list[str]]:
    """Ops and architectures, all if the lists are empty. A KeyError names what is unknown."""
    for name in names:
        ops()[name]
    for name in architectures:
        ARCHITECTURES[name]
    return names or list(ops()), architectures or list(ARCHITECTURES)
