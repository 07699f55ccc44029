"""Supports a pretended GPU: a stub driver whose launches do nothing, so a step's time is the host's alone.

The stub's memory reads as zeros, or as what was copied there before. Values that the host reads back would be wrong and
would change what a step does, so this module supplies the values that fastbert reads, and the one that the stock model
reads: whether a mask keeps all positions, so that SDPA needs none. (Inductor's own launcher may not work on a stub:
TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER=0 selects Triton's for torch.compile.)
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import torch

STUB = "fakecuda"  # the module that comes with the stub driver: reset(), counts(), readable(name)


@cache
def pretended() -> Any | None:
    """The stub's module; None on a real GPU and without any GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module(STUB)
    except (ImportError, OSError):  # OSError: the module is installed, but its library is not loaded
        return None


@contextmanager
def true_reads(tokens: list[int], read: list[int]) -> Iterator[None]:
    """Let fastbert and transformers read from the device as usual, then replace what they read by the true values: each row's
    number of tokens and of positions that are read, that position ids count from 0, and whether a mask keeps everything.

    Raises:
        RuntimeError: a function to be patched does not exist.
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

    def skipping(ignore: Callable[..., bool]) -> Callable[..., bool]:
        def skipped(padding_mask: Any, kv_length: int, *others: Any, **more: Any) -> bool:
            found = ignore(padding_mask, kv_length, *others, **more)
            return found if padding_mask is None else all(n == kv_length for n in tokens)

        return skipped

    with ExitStack() as stack:
        for module, name, instead in (
            ("fastbert.layers.packing_plan", "count", counting),
            ("fastbert.layers.mlm_heads", "count", counting),
            ("fastbert.layers.embeddings", "_position_reason", looking),
            ("transformers.masking_utils", "_ignore_bidirectional_mask_sdpa", skipping),
        ):
            stack.enter_context(_replaced(module, name, instead))
        yield


@contextmanager
def true_reads_of(batch: dict[str, Any]) -> Iterator[None]:
    """`true_reads` with the values of a padded batch on a pretended GPU; does nothing elsewhere."""
    if pretended() is None:
        yield
        return
    ids, mask, labels = (batch.get(name) for name in ("input_ids", "attention_mask", "labels"))
    tokens = [ids.shape[-1]] * (ids.numel() // ids.shape[-1]) if mask is None else mask.cpu().flatten(0, -2).sum(-1).tolist()
    by_token = labels is not None and labels.shape == ids.shape
    with true_reads(tokens, (labels.cpu() != -100).sum(-1).tolist() if by_token else [1] * len(tokens)):
        yield


@contextmanager
def true_reads_of_features(*makers: tuple[Any, str]) -> Iterator[None]:
    """`true_reads` with the values of the batch that was last made on the host, by one of the functions that are given by
    owner and name; does nothing elsewhere."""
    if pretended() is None:
        yield
        return
    tokens: list[int] = []
    read: list[int] = []

    def making(make: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        features = make(*arguments, **keywords)
        if "attention_mask" in features:  # a flattened batch brings its lengths with it
            tokens[:] = features["attention_mask"].sum(1).tolist()
            read[:] = [1] * len(tokens)
        return features

    with ExitStack() as stack:
        for owner, name in makers:
            stack.enter_context(mock.patch.object(owner, name, partial(making, getattr(owner, name))))
        stack.enter_context(true_reads(tokens, read))
        yield


def _replaced(module: str, name: str, instead: Callable[..., Any]) -> Any:
    owner = importlib.import_module(module)
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(
            f"{module}.{name}: no such function. A pretended GPU would give it zeros; bench/core/pretended.py has to "
            "replace the function that reads them instead"
        )
    return mock.patch.object(owner, name, instead(original))
