"""Runs a function in several processes over gloo on the CPU, which a fork server starts in a fraction of a second each."""

import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# The CPU, and so Triton's interpreter, also on a machine with a GPU; a process reads this when it imports triton.
_ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# What every rank imports, imported once by the fork server. It computes nothing, so its forks inherit no threads.
_PRELOADED = ["tests.ranks_preloaded"]
STARTED_BY = "forkserver"  # for other launchers, such as torch's elastic one


@cache
def start_server() -> None:
    """Start the fork server of this process, which has imported what ranks need."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        multiprocessing.get_context(STARTED_BY).set_forkserver_preload(_PRELOADED)
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(rank, *arguments)` on `world` ranks of one process group, and raise the first error of any.

    `work` is a function of a module, because the processes import it.
    """
    start_server()
    start = multiprocessing.start_processes
    start(_rank, (world, free_port(), work, arguments), nprocs=world, start_method=STARTED_BY)


def prepare() -> None:
    """Set up a process for the tests' kernels, as conftest.py does."""
    from fastbert.kernels.core import failures
    from fastbert.testing.interpreter import accelerate

    os.environ.update(_ENVIRONMENT)
    accelerate()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    failures.strict = True


def _rank(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    prepare()
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()
    leave()


def leave() -> None:
    """Exit at once: torch's threads that still run sometimes abort an interpreter that shuts down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
