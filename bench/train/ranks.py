"""The ranks that torchrun or accelerate launch started: joining them, who speaks and writes, errors that end all."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastbert.errors import InputError

Found = TypeVar("Found")
INTERRUPTED = 130  # exit code
OTHER_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


@contextmanager
def joined(gpu: bool) -> Iterator[None]:
    """Join the process group of the ranks, over NCCL with a GPU each or over gloo on the CPU, and leave it together.

    Without a launcher, and in a group already, nothing happens.

    Raises:
        InputError: more ranks than GPUs, or a launcher that was told to use another engine.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield
        return
    for variable, engine in OTHER_ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(f"accelerate launch: expected data-parallel ranks, got {engine}; bench train keeps models whole")
    local, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if gpu and local > count:
        raise InputError(f"--nproc-per-node: expected at most {count}, a GPU for each rank, got {local}")
    from accelerate import PartialState

    PartialState(cpu=not gpu)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes on what the terminal has already sent
        if rank():  # rank 0 has something to say
            os._exit(INTERRUPTED)
        raise
    # A launcher ends all ranks when one has failed: none may leave before rank 0 has said why.
    gathered(None)
    dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started the ranks again, after one has failed (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(own: Any) -> list[Any]:
    """What each rank has, by rank, on every rank."""
    if world() == 1:
        return [own]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, own)
    return found


def agreed(work: Callable[[], Found]) -> Found:
    """What `work` returns on this rank, once it has succeeded on every rank.

    Raises:
        InputError: on every rank, if `work` raised it on any: that of the first such rank.
    """
    found, said = None, None
    try:
        found = work()
    except InputError as error:
        said = str(error)
    said = next((other for other in gathered(said) if other is not None), None)
    if said is not None:
        raise InputError(said)
    return found  # type: ignore[return-value]


def of_first(work: Callable[[], Found]) -> Found:
    """What `work` returns on rank 0, which alone calls it: for files, which the others may find half-written.

    Raises:
        InputError: on every rank, if `work` raised it.
    """
    own = agreed(lambda: work() if rank() == 0 else None)
    return gathered(own)[0]


def summed(own: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start adding up a tensor of every rank on the device; the result is called for when it is needed."""
    total = own.clone()
    if world() == 1:
        return lambda: total
    pending = dist.all_reduce(total, async_op=True)

    def wait() -> torch.Tensor:
        pending.wait()
        return total

    return wait
