"""Reads the environment of a measurement: GPU, driver, clocks and versions."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastbert
from bench.core.pretended import pretended
from bench.core.records import Environment

# Names of nvidia-smi's queries. They are only read.
CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
    "clocks_event_reasons.active",
)


def read(commit: str | None = None) -> Environment:
    """The environment of this process. GPU fields are None without a GPU. `commit` is for files outside a git checkout."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    driver = _query("driver_version")
    return Environment(
        gpu=gpu and gpu.name,
        driver=driver,
        cuda=torch.version.cuda,
        capability=gpu and f"{gpu.major}.{gpu.minor}",
        multiprocessors=gpu and gpu.multi_processor_count,
        memory_bytes=gpu and gpu.total_memory,
        l2_bytes=gpu and gpu.L2_cache_size,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers") or "unknown",
        fastbert=fastbert.__version__,
        commit=commit or _commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        clocks=clocks() if driver else {},
        pretended=pretended() is not None,
    )


def clocks() -> dict[str, str]:
    """Current clocks, power and temperature; empty without nvidia-smi."""
    together = (_query(",".join(CLOCKS)) or "").split(", ")
    if len(together) == len(CLOCKS):
        answers: dict[str, str | None] = dict(zip(CLOCKS, together, strict=True))
    else:  # an older nvidia-smi rejects the whole list if it does not know one name
        answers = {name: _query(name) for name in CLOCKS}
    return {name: answer for name, answer in answers.items() if answer and "[N/A]" not in answer}


def _query(name: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader", "--id=0"]
    answer = _output(command)
    return None if answer == "[N/A]" else answer


def _commit() -> str | None:
    """The commit of the checkout, with a "+" if files differ from it."""
    root = Path(__file__).resolve().parents[2]
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = commit and _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit and commit + ("+" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
