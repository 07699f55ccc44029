"""Checks a model's lane before it is timed: loss, outputs and every gradient against eager, without dropout.

The rule is that of fastbert.verify, as in tests/models, on a batch with the workload's length and head.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bench.core.pretended import true_reads_of
from bench.models import batches, workloads
from bench.models.flattened import Flattened, padded
from bench.models.workloads import LANES, Workload
from fastbert.kernels.core.launch import counts
from fastbert.testing.models import Tensors, assert_equal, run

SHOWN = 8  # number of tensors that a failure names
ROWS = batches.CHOICES  # the reference is float64, so the check takes a few rows of full length, not the whole batch


def autocast(workload: Workload, device: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if workload.precision == "autocast" else nullcontext()


def problem(workload: Workload, called: nn.Module, fast: bool, device: str) -> str | None:
    """What is wrong with the lane's model; None if nothing is. `called` has no dropout, see `without_dropout`."""
    lengths = workload.lengths.of_batch(ROWS, workload.seqlen, workload.fill)
    labels = workload.mode == "train"
    batch = batches.make(workload.head, called.config, lengths, workload.seqlen, 99, device, labels=labels)
    before = counts.total()
    found = _run(workload, called, batch, device)
    if isinstance(called, Flattened):
        found = padded(found, batch)
    if fast and counts.total() == before:
        return "no kernel was launched"
    stock = workloads.make(workload, LANES["eager"], device).eval()
    eager = _run(workload, stock, batch, device)
    with torch.autocast(device, enabled=False):
        exact = run(copy.deepcopy(stock).double(), batch, workload.mode == "train")
    if called.training:  # a lane may train without returning logits
        for name in [name for name in eager if name.endswith("logits") and name not in found]:
            del eager[name], exact[name]
    try:
        assert_equal(*(_readable(results, batch) for results in (found, eager, exact)))
    except AssertionError as failure:
        lines = str(failure).splitlines()
        return "\n".join([f"{len(lines)} tensors differ from eager: {lines[0]}", *lines[1:SHOWN]])
    return None


def without_dropout(model: nn.Module, training: bool) -> nn.Module:
    """Switch off dropout but keep the timed mode: in eval mode a model may return other outputs and take other code paths."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train(training)


def _run(workload: Workload, model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> Tensors:
    """Outputs for inference; outputs and gradients for training."""
    training = workload.mode == "train"
    with true_reads_of(batch), nullcontext() if training else torch.inference_mode():
        results = run(model, batch, training, autocast(workload, device))
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in results.items()}


def _readable(results: Tensors, batch: dict[str, torch.Tensor]) -> Tensors:
    """Zero the padded positions: their contents are unspecified, and a lane that skips padding leaves zeros there."""
    padded = batches.padding(batch)
    if padded is None:
        return results
    return {
        name: x.masked_fill(padded.view(*padded.shape, *[1] * (x.dim() - padded.dim())), 0.0)
        if x.is_floating_point() and x.shape[: padded.dim()] == padded.shape
        else x
        for name, x in results.items()
    }
