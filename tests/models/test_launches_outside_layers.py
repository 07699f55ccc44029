"""Counts the launches of a step outside its layers: embeddings, the bounds of a mask, packing.

If the step is host-bound, a launch costs five microseconds or more, so a number here may only decrease.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import fastbert
from fastbert import ops
from fastbert.kernels import embedding_layernorm
from fastbert.kernels.core.launch import counts
from fastbert.layers.counts import CallerCounts
from fastbert.layers.packing import Packing
from fastbert.layers.packing_plan import plan_packing
from fastbert.layers.reading import Reading
from tests.models.tiny import CLASSIFICATION, DEVICE, LENGTH, ROWS, make, make_batch

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Dispatched(TorchDispatchMode):
    """Counts ATen ops by name that do work on a device: no views and no allocations."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::").partition(".")[0]
        tensors = any(isinstance(x, torch.Tensor) for x in (*args, *(kwargs or {}).values())) or "device" in (kwargs or {})
        if tensors and not op.is_view and name not in (*ALLOCATIONS, "detach", "_unsafe_view"):
            self.found[name] += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def interpreter_unseen(monkeypatch):
    """Hide the tensor copies of the interpreter, which a GPU does not make."""
    run = GridExecutor.__call__

    def unseen(*args, **kwargs):
        with _disable_current_modes():
            return run(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)


@contextmanager
def launching():
    """`with launching() as found`: after the block, `found` holds its ATen ops and kernel launches, by name."""
    before, found = counts.copy(), Counter()
    with Dispatched(found):
        yield found
    found.update({name.removesuffix("_kernel"): n for name, n in (counts - before).items()})


def test_the_count_sees_what_launches():
    x = torch.randn(3, 4, device=DEVICE)
    with launching() as found:
        (x.t() + 1).sum().expand(2).clone()
        torch.zeros(3, device=DEVICE)
        x.new_empty(3)
    assert found == {"add": 1, "sum": 1, "clone": 1, "zeros": 1}


def test_key_bounds():
    mask = torch.rand(4, 9, device=DEVICE) < 0.5
    with launching() as found:
        first = ops.key_bounds(mask)
        assert ops.key_bounds(mask) is first
    assert found == {"key_bounds": 1}


LENGTHS, READ_LENGTHS = (9, 4, 7), (3, 2, 3)
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).to(DEVICE)
READ = MASK & (torch.arange(9, device=DEVICE) % 3 == 0)
TOLD = {
    "told": CallerCounts(lengths=LENGTHS, read=READ_LENGTHS),
    "bucket": CallerCounts(lengths=LENGTHS, read=READ_LENGTHS, bucket=8),
    "budget": CallerCounts(token_budget=24, read_budget=12),
}
# Counts are copied to the host; on the CPU they are already there.
COPIES = {"_to_copy": 1} if DEVICE.type == "cuda" else {}


def pack(reading, given, mask=MASK):
    """The index work of a forward: the packing, the rows that are read, and the bounds for the last layer."""
    packing = plan_packing(mask, reading, given, *MASK.shape, DEVICE)
    assert isinstance(packing, Packing)
    if packing.read is not None:
        packing.read.within(packing.tokens)
        assert len(packing.read.cu_seqlens) == len(packing.tokens.cu_seqlens)
    return packing


@pytest.mark.parametrize("given", TOLD)
@pytest.mark.parametrize("what, asserted", [("first", 2), ("labelled", 3), ("all", 1), ("all, labelled", 2)])
def test_packing_with_lengths_given(what, asserted, given):
    labelled = READ if "labelled" in what else None
    reading = None if what == "all" else Reading(labelled, alone="all" not in what)
    with launching() as found:
        packing = pack(reading, TOLD[given])
    assert found == {"row_counts": 1, "packed_rows": 1, "_assert_async": asserted}
    assert (packing.read is None) == ("all" in what) and (labelled is None or reading.rows is not None)


@pytest.mark.parametrize("what", ["first", "labelled", "all"])
def test_packing_with_lengths_counted(what):
    reading = None if what == "all" else Reading(READ if what == "labelled" else None, alone=True)
    with launching() as found:
        pack(reading, CallerCounts())
    assert found == {"row_counts": 1, "packed_rows": 1} | COPIES


def test_packing_without_a_mask():
    with launching() as found:
        pack(Reading(None, alone=True), CallerCounts(), mask=None)
    assert found == {"packed_rows": 1}


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_embeddings(p, segments, monkeypatch):
    """A seed, two kernels over the tokens, gradients of words, of positions and types, and one finishing kernel."""
    monkeypatch.setattr(embedding_layernorm, "_check_range", lambda *_: None)  # which checks ids on the CPU only
    embeddings = fastbert.patch(make(CLASSIFICATION, hidden_dropout_prob=p)).bert.embeddings.train()
    batch = make_batch(CLASSIFICATION)
    ids = {"input_ids": batch["input_ids"], "token_type_ids": batch["token_type_ids"] if segments else None}
    embeddings(**ids)  # inspects the position ids, once
    dy = torch.randn(ROWS, LENGTH, embeddings.LayerNorm.normalized_shape[0], device=DEVICE)
    forward = Counter({"embedding_layernorm_fwd": 1, "randint": int(p > 0)})
    with launching() as found:
        y = embeddings(**ids)
    assert found == +forward
    with torch.no_grad(), launching() as found:
        embeddings(**ids)
    assert found == +forward
    with launching() as found:
        y.backward(dy)
    parts = ("order", "runs", "sums", "finish")
    assert found == {"embedding_layernorm_bwd": 1, "new_zeros": 1} | {f"embedding_layernorm_bwd_{part}": 1 for part in parts}


def test_every_gradient_of_the_embeddings_is_taken_as_it_is():
    """None is copied on its way to its parameter, as a view of another tensor would be."""
    embeddings = fastbert.patch(make(CLASSIFICATION)).bert.embeddings
    embeddings(make_batch(CLASSIFICATION)["input_ids"]).sum().backward()
    for name, parameter in embeddings.named_parameters():
        assert parameter.grad.is_contiguous() and parameter.grad._base is None, name
