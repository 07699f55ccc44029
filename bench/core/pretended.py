"""A pretended GPU: a stub driver whose launches do nothing, so that a step's time is the host's alone.

Its memory reads as zeros. What the host reads back from the device would then be wrong, and the steps after it other ones
than on a GPU: fastbert's reads are stood in for here. The stock model needs none: it asks whether a mask leaves all
positions in, which zeros answer rightly for a batch with padding. (What torch.compile makes is loaded by inductor's own
launcher, which a stub may not serve: TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER=0 takes Triton's.)
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch

STUB = "fakecuda"  # the module that comes with such a driver: reset(), counts(), readable(name)


@cache
def pretended() -> Any | None:
    """The stub's module, or None on a real GPU and without one."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module(STUB)
    except (ImportError, OSError):  # OSError: the module is there, its library is not loaded
        return None


@contextmanager
def true_reads(tokens: list[int], read: list[int]) -> Iterator[None]:
    """Let fastbert read on the device as it does, and then go on with what it should have read: how many tokens and how
    many positions that count each row has, and that position ids count from 0.

    Raises:
        RuntimeError: a function that reads is no longer where this file looks for it.
    """
    counts = importlib.import_module("fastbert.layers.counts")

    def counting(count: Callable[..., Any]) -> Callable[..., Any]:
        def counted(mask: Any, labelled: Any, *others: Any) -> Any:
            count(mask, labelled, *others)
            capacities = [None if x is None else counts.Capacity(sum(n), max(n)) for x, n in ((mask, tokens), (labelled, read))]
            return *capacities, False

        return counted

    def looking(reason: Callable[..., Any]) -> Callable[..., None]:
        return lambda *arguments: reason(*arguments) and None

    with ExitStack() as stack:
        for module, name, instead in (
            ("fastbert.layers.packing_plan", "count", counting),
            ("fastbert.layers.mlm_heads", "count", counting),
            ("fastbert.layers.embeddings", "_position_reason", looking),
        ):
            stack.enter_context(_replaced(module, name, instead))
        yield


@contextmanager
def true_reads_of(batch: dict[str, Any]) -> Iterator[None]:
    """`true_reads` of what a padded batch holds, on a pretended GPU; nothing anywhere else."""
    if pretended() is None:
        yield
        return
    ids, mask, labels = (batch.get(name) for name in ("input_ids", "attention_mask", "labels"))
    tokens = [ids.shape[-1]] * (ids.numel() // ids.shape[-1]) if mask is None else mask.cpu().flatten(0, -2).sum(-1).tolist()
    by_token = labels is not None and labels.shape == ids.shape
    with true_reads(tokens, (labels.cpu() != -100).sum(-1).tolist() if by_token else [1] * len(tokens)):
        yield


def _replaced(module: str, name: str, instead: Callable[..., Any]) -> Any:
    owner = importlib.import_module(module)
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(
            f"{module}.{name}: no such function. It read what is zero on a pretended GPU; bench/core/pretended.py has to "
            "stand in for what reads it now"
        )
    return mock.patch.object(owner, name, instead(original))
