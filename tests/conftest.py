"""Shared configuration of all tests: where kernels run, which tests are skipped or left for a longer run, launch counts."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

GPU = torch.cuda.is_available()


if not GPU:
    # Triton decides how a kernel runs when it is decorated, so this must come before any import of triton.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

# One thread per process: the tensors are small, and pytest-xdist runs one process per core.
torch.set_num_threads(1)

settings.register_profile(
    "fastbert",
    deadline=None,
    max_examples=200,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastbert")


def pytest_configure(config: pytest.Config) -> None:
    if not GPU and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        # Not in a process that only distributes tests: importing transformers takes ten seconds.
        from fastbert.testing.interpreter import accelerate
        from tests.interpreter import check_overflows

        accelerate()
        check_overflows()
    for marker in (
        "gpu: shows what only a GPU can (bf16, streams, races, timing); skipped where there is none",
        "long: takes minutes or gigabytes; runs only when chosen by `pytest -m long`",
        "one_in(n): of a test's parameters one in n runs at each commit, the others are long",
        "no_launch: a kernel test in which no kernel is meant to be launched",
    ):
        config.addinivalue_line("markers", marker)
    # The interpreter computes with NumPy, which warns where a GPU silently gives the infinity that the test expects.
    for message in ("overflow encountered", "invalid value encountered", "divide by zero encountered", "All-NaN slice"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")


def _mark_all_but_one_in_n(items: list[pytest.Item]) -> None:
    # Selected by a hash: taking every second test of a product over two dtypes would always pick the same dtype.
    tests: set[str] = set()
    for item in items:
        marker, test = item.get_closest_marker("one_in"), item.nodeid.partition("[")[0]
        if marker and test in tests and crc32(item.nodeid.encode()) % marker.args[0]:
            item.add_marker("long")
        tests.add(test)


def _is_in_float64(item: pytest.Item) -> bool:
    """Whether a test of kernels computes in float64, by its parameters or name; gradcheck does, and fuzzing may draw it."""
    file, _, name = item.nodeid.partition("::")
    tested = file.startswith(("tests/kernels", "tests/models")) and not item.get_closest_marker("no_launch")
    return tested and bool(re.search("float64|fp64", name) or re.search("gradcheck|fuzz", file))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _mark_all_but_one_in_n(items)
    if not GPU:
        no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False here")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)
    else:
        no_kernel = pytest.mark.skip(reason="computes in float64, which has a kernel in Triton's interpreter only")
        for item in items:
            if _is_in_float64(item):
                item.add_marker(no_kernel)
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def no_stand_in() -> None:
    """A failing kernel raises instead of falling back to plain PyTorch; tests/faults overrides this."""
    if "fastbert.kernels.core.failures" in sys.modules:
        sys.modules["fastbert.kernels.core.failures"].strict = True


@pytest.fixture
def falling_back(no_stand_in: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A failing kernel falls back to plain PyTorch, and the test starts and ends with working kernels."""
    from fastbert.kernels.core import failures
    from fastbert.kernels.encoder_layer import plan

    monkeypatch.setattr(failures, "strict", False)
    failures.reset()
    plan.clear()
    yield
    failures.reset()
    plan.clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch, so that random inputs do not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture
def launches() -> Callable[[], Counter[str]]:
    """A function that returns the launches since the test began, per kernel name."""
    from fastbert.kernels.core.launch import counts

    before = counts.copy()
    return lambda: counts - before


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
