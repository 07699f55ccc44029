"""Configures `pytest bench`: collects bench_*.py. Without a GPU it runs tiny shapes in Triton's interpreter, untimed."""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    torch.set_num_threads(1)

    from fastbert.testing.interpreter import accelerate

    accelerate()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect bench_*.py, a name that `pytest` without a folder does not match."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):  # pytest collects named files
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_report_header() -> str:
    return "bench: timed on the GPU" if GPU else "bench: dry run, no GPU: tiny shapes, nothing is timed"
