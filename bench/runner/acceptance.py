"""Implements `python -m bench accept`: writes results of a GPU run into the repository, named after their origin."""

import re
from pathlib import Path

from bench.core import comparison, schema
from bench.core.records import Results
from bench.report import documents
from bench.tune.run import PRESENT, best

DOCUMENTS = ("README.md", "docs/benchmarks.md", "bench/FINDINGS.md")
FOLDER = "bench/results"
SHOWN = 800  # characters of a reason that are shown


def accept(paths: list[Path], root: Path) -> tuple[list[Path], list[str]]:
    """Write results, pictures and documents under `root`. Returns the written paths, and lines that say what needs to be done.

    Raises:
        ResultsError: the results were not measured on a GPU, the files do not belong together, or a document is broken.
    """
    from bench.report import figures  # matplotlib takes a second to import

    results = schema.read_all(paths)
    if results.environment.pretended:
        raise schema.ResultsError("only results of a real GPU are accepted: these come from a pretended one")
    changed = [root / name for name in DOCUMENTS if documents.write(root / name, results)]
    stem = name_of(results)
    path = root / FOLDER / f"{stem}.json"
    schema.write(results, path)
    pictures = figures.draw(results, root / FOLDER, only=figures.with_data(results), prefix=f"{stem}-")
    return [path, *pictures, *changed], [*failures(results), *configurations(results)]


def name_of(results: Results) -> str:
    """A file name from GPU, date and commit, in letters, digits and hyphens."""
    here = results.environment
    parts = (here.gpu or "no-gpu", here.date[:10], here.commit or "unknown")
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def failures(results: Results) -> list[str]:
    """One line for everything that failed its check or did not run, most important first."""
    lines = [f"failed test: {line}" for line in (results.tests.failures if results.tests else [])]
    shipped = (record for record in results.tuning if record.lane == PRESENT)
    for record in (*results.models, *results.latency, *results.encode, *results.ops, *results.host, *shipped):
        if record.status in ("failed", "error"):
            case = " ".join(map(str, record.case))
            said = " / ".join((record.reason or "").splitlines())[:SHOWN]
            lines.append(f"{comparison.WHY_NOT[record.status]}: {case}, {record.lane}: {said}")
    return lines + [f"did not run: {s.name}: {(s.reason or '').strip()[-300:]}" for s in results.stages if s.status == "error"]


def configurations(results: Results) -> list[str]:
    """The line to write for each entry of kernels/core/configs.py that a candidate beat by more than the noise."""
    lines = []
    for fastest, now in best(results.tuning):
        if fastest.seconds and now.seconds and fastest.seconds.differs(now.seconds):
            entry = f"{fastest.kernel}, {fastest.architecture}, {fastest.dtype}, {fastest.width}"
            lead = comparison.ratio(fastest, now)
            lines.append(f"kernels/core/configs.py, {entry}: {now.call} -> {fastest.call}  # {lead} of the one before")
    return lines
