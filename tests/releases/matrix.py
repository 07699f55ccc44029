"""Runs the model tests on pairs of releases, each in a separate process, and saves the results as JSON."""

import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.version import Version

from bench.audit.run import WHOLE
from tests.releases import overlay

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/releases.json"
# The releases with new forwards, and some between: they cover all forwards of every 5.x so far.
TRANSFORMERS = ("5.0.0", "5.1.0", "5.2.0", "5.10.4", "5.17.0", "5.23.0", "5.24.0")
TRITON = ("3.6.0", "3.7.1", "3.8.0")
# About a minute per pair: the tests that touch transformers (signatures, masks, caches, losses), and every kernel once.
TESTS = (
    "tests/test_forwards.py",
    "tests/models/test_equality.py",
    "tests/models/test_families.py",
    "tests/models/test_families_packing.py",
    "tests/models/test_attention.py",
    "tests/models/test_embeddings.py",
    "tests/models/test_mlm_head.py",
    "tests/models/test_unpad.py",
    "tests/models/test_generate.py",
    "tests/models/test_report.py",
    "tests/models/test_patch.py",
    "tests/hub/test_flash_name.py",
)
Record = dict[str, Any]


class Failed(Exception):
    """A process ended with an error."""


def run(
    transformers: list[str], triton: list[str], out: Path, cache: Path, tests: list[str], jobs: int, say: Callable[[str], None]
) -> bool:
    """Run every pair and write each result to `out` at once; returns whether all passed."""
    fine = True
    for pair in overlay.pairs(transformers, triton):
        found, digests = one(*pair, cache, tests, jobs)
        save(out, found, digests)
        say(describe(found))
        fine &= passed(found)
    return fine


def one(transformers: str, triton: str, cache: Path, tests: list[str], jobs: int) -> tuple[Record, dict[str, str]]:
    """The record of one pair, and the digests of its transformers release."""
    record: Record = {"transformers": transformers, "triton": triton}
    try:
        folders = [*overlay.of_transformers(transformers, cache), *overlay.of_triton(triton, cache)]
        about = json.loads(python(["-m", "tests.releases.probe"], folders).splitlines()[-1])
    except (overlay.Unavailable, Failed) as error:
        return record | {"error": str(error)}, {}
    if not record.items() <= about["releases"].items():
        raise RuntimeError(f"asked for {record}, but imported {about['releases']}")
    record = about["releases"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-n", str(jobs), "--junit-xml", str(report)]
        try:
            python(["-m", "pytest", *options, *tests], folders)
        except Failed as error:
            if not report.exists():
                return record | {"error": str(error)}, about["digests"]
        record |= counts(report.read_text())
    return record | {"seconds": round(time.monotonic() - started)}, about["digests"]


def python(arguments: list[str], folders: list[Path]) -> str:
    """The output of a Python process with these folders first on its path.

    Raises:
        Failed: it ended with an exit code other than 0; the message is its last line.
    """
    command, environment = [sys.executable, *arguments], overlay.environment(folders, ROOT)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed((done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1])
    return done.stdout


def audit(triton: str, update: bool, cache: Path) -> bool:
    """Whether the short compile audit finds nothing worse than accepted under this release; `update` accepts it."""
    whole = update and triton.startswith(f"{WHOLE}.")
    options = [*(["--short"] if not whole else []), "--update" if update else "--check", "--top", "1"]
    environment = overlay.environment(overlay.of_triton(triton, cache), ROOT)
    return not subprocess.run([sys.executable, "-m", "bench", "audit", *options], cwd=ROOT, env=environment).returncode


def counts(report: str) -> Record:
    """The numbers of passed, failed and skipped tests of a JUnit report, and the names of the failed ones."""
    failing, skipped, total = [], 0, 0
    for case in xml.fromstring(report).iter("testcase"):
        total += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failing.append("::".join(filter(None, (case.get("classname"), case.get("name")))))
        elif case.find("skipped") is not None:
            skipped += 1
    passing = total - len(failing) - skipped
    return {"passed": passing, "failed": len(failing), "skipped": skipped, "failing": sorted(failing)}


def passed(record: Record) -> bool:
    return record.get("passed", 0) > 0 and not record["failed"]


def describe(record: Record) -> str:
    what = f"transformers {record['transformers']}, triton {record['triton']}: "
    if "error" in record:
        return what + record["error"]
    line = f"{record['passed']} passed, {record['failed']} failed, {record['skipped']} skipped in {record['seconds']} s"
    return "\n  ".join([what + line, *record["failing"]])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"pairs": [], "digests": {}}


def save(path: Path, record: Record, digests: dict[str, str]) -> None:
    """Save one record, replacing an earlier one of its pair."""
    known = read(path)
    pairs = {(old["transformers"], old["triton"]): old for old in known["pairs"]}
    pairs[record["transformers"], record["triton"]] = record
    known["pairs"] = [pairs[pair] for pair in sorted(pairs, key=lambda pair: tuple(map(Version, pair)))]
    if digests:
        known["digests"][record["transformers"]] = digests
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
