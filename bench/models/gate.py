"""Checks a model's lane before it is timed: loss, outputs and every gradient against eager, without dropout.

The rule is that of fastbert.verify, as in tests/models, on a batch with the workload's length and head.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bench.core.pretended import true_reads_of
from bench.models import batches, graphs, workloads
from bench.models.flattened import Flattened, padded
from bench.models.workloads import LANES, Lane, Workload
from fastbert.kernels.core.launch import counts
from fastbert.testing.models import Tensors, assert_equal, run

SHOWN = 8  # number of tensors that a failure names
ROWS = batches.CHOICES  # the reference is float64, so the check takes a few rows of full length, not the whole batch
CAPTURES = 5  # calls before the checked ones of a lane that replays graphs
CHANGE = 1.125  # factor of all weights between them
NO_KERNEL, NOT_REPLAYED = "no kernel was launched", "no graph was replayed"


def autocast(workload: Workload, device: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if workload.precision == "autocast" else nullcontext()


def problem(
    workload: Workload, called: nn.Module, lane: Lane, device: str, replays: graphs.Replays | None = None
) -> str | None:
    """What is wrong with the lane's model; None if nothing is. `called` has no dropout, see `without_dropout`.

    A lane of fastbert's graphs first runs other batches, so that the checked ones are replayed, which `replays` counts. Then
    its weights are changed in place, so that a graph which reads former ones is found out.
    """
    before = counts.total()
    stock = workloads.make(workload, LANES["eager"], device).eval()
    if lane.graphed:
        for batch in _captured(workload, device):
            _run(workload, called, batch, device)
        with torch.no_grad():
            for parameter in called.parameters():
                parameter.mul_(CHANGE)
    replayed = replays.count if replays else 0
    for batch in _checked(workload, lane, device):
        if lane.graphed:
            stock.load_state_dict((called.model if isinstance(called, graphs.Stepped) else called).state_dict())
        if wrong := difference(workload, called, batch, references(workload, stock, batch, device), device):
            return wrong
    if lane.fast and counts.total() == before:
        return NO_KERNEL
    if lane.graphed and replays and replays.count == replayed:
        return f"{NOT_REPLAYED}: {graphs.why_not(called)}"
    return None


def batches_of(workload: Workload, lane: Lane, device: str) -> list[batches.Batch]:
    """All batches of the check of a lane of graphs."""
    return [*_captured(workload, device), *_checked(workload, lane, device)]


def _captured(workload: Workload, device: str) -> Iterator[batches.Batch]:
    lengths = workload.lengths.of_batch(ROWS, workload.seqlen, workload.fill)
    config, labels = workload.config(), workload.mode == "train"
    for seed in range(CAPTURES):
        yield batches.make(workload.head, config, lengths, workload.seqlen, seed, device, labels=labels)


def _checked(workload: Workload, lane: Lane, device: str) -> Iterator[batches.Batch]:
    """A batch of the workload's length and fill. For graphs its rows have other lengths than the captured ones with the same
    sum, and forwards get a shorter batch as well."""
    config, seqlen, labels = workload.config(), workload.seqlen, workload.mode == "train"
    lengths = workload.lengths.of_batch(ROWS, seqlen, workload.fill)
    if lane.graphed:
        moved = min(min(lengths) - 1, seqlen - max(lengths))
        lengths = [min(lengths) - moved, *lengths[1:-1], max(lengths) + moved]
    yield batches.make(workload.head, config, lengths, seqlen, 99, device, labels=labels)
    if lane.graphed == workloads.FORWARD:
        shorter = seqlen - seqlen // 8
        yield batches.make(workload.head, config, [shorter] * ROWS, shorter, 98, device, labels=labels)


def references(workload: Workload, stock: nn.Module, batch: batches.Batch, device: str) -> tuple[Tensors, Tensors]:
    """The results of the eager model `stock`, and those of its copy in float64."""
    eager = _run(workload, stock, batch, device)
    with torch.autocast(device, enabled=False):
        return eager, run(copy.deepcopy(stock).double(), batch, workload.mode == "train")


def difference(
    workload: Workload, called: nn.Module, batch: batches.Batch, expected: tuple[Tensors, Tensors], device: str
) -> str | None:
    """How the results of `called` differ from eager's by the rule; None if they do not."""
    found = _run(workload, called, batch, device)
    if isinstance(called, Flattened):
        found = padded(found, batch)
    eager, exact = ({name: x for name, x in results.items() if _compares(name, found, workload)} for results in expected)
    try:
        assert_equal(*(_readable(results, batch) for results in (found, eager, exact)))
    except AssertionError as failure:
        lines = str(failure).splitlines()
        return "\n".join([f"{len(lines)} tensors differ from eager: {lines[0]}", *lines[1:SHOWN]])
    return None


def _compares(name: str, found: Tensors, workload: Workload) -> bool:
    """Whether a lane must have this tensor: in training it may leave out the logits."""
    return name in found or workload.mode == "infer" or not name.endswith("logits")


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
        if isinstance(model, graphs.Stepped):
            return model.results(batch, autocast(workload, device))
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
