"""What linear_cross_entropy reads, writes and holds: any layout, nothing outside of its tensors, never all logits at once."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.kernels import linear_cross_entropy as module
from fastbert.kernels import reference
from fastbert.kernels.core import launch
from fastbert.kernels.linear_cross_entropy import chunked as linear_cross_entropy_chunks
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.kernels.linear_cross_entropy.chunked import MIN_ROWS, max_kept_rows, rows_per_chunk
from fastbert.kernels.linear_cross_entropy.rows import padded
from fastbert.testing.linear_cross_entropy import (
    NAMES,
    WAYS,
    check,
    chunk_rows,
    chunks_of,
    make_inputs,
    make_weights,
    run,
)
from fastbert.testing.rows import DEVICE, assert_same

from ..attention.test_memory import fenced
from ..cases import dtype_name
from ..layouts import LAYOUTS, expanded, guarded, offset, sliced, transposed
from ..test_memory import guards_of, poisoned_outputs

REDUCTIONS = [("mean", "kept"), ("sum", "formed"), ("none", "formed")]


def one_column(weight):
    """Column stride 0. An expanded weight would make all classes equal, and the gradient of hidden rounding only."""
    return weight[:, :1].expand_as(weight)


WEIGHT_LAYOUTS = [one_column if layout is expanded else layout for layout in LAYOUTS]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("weight", WEIGHT_LAYOUTS, ids=lambda f: "weight_" + f.__name__)
@pytest.mark.parametrize("hidden", LAYOUTS, ids=lambda f: "hidden_" + f.__name__)
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_layouts(reduction, way, hidden, weight):
    inputs, labels = make_inputs(9, 37)
    inputs |= {"hidden": hidden(inputs["hidden"]), "weight": weight(inputs["weight"])}
    check(inputs, labels, rows=chunk_rows(way, 4), reduction=reduction)


@pytest.mark.parametrize("way", WAYS)
def test_labels_and_bias_of_any_stride(way):
    inputs, labels = make_inputs(9, 37)
    inputs["bias"] = torch.stack([inputs["bias"], inputs["bias"] * torch.nan], dim=1)[:, 0]
    labels = torch.stack([labels, labels * 0 + 99], dim=1)[:, 0]
    check(inputs, labels, rows=chunk_rows(way, 4))
    check(inputs, labels[:1].expand(9), rows=chunk_rows(way, 4), reduction="none")


@pytest.mark.parametrize("layout", [transposed, expanded, offset], ids=lambda f: f.__name__)
def test_three_dimensions(layout):
    inputs, labels = make_inputs((3, 4), 13)
    inputs["hidden"] = layout(inputs["hidden"].reshape(12, -1)).reshape(3, 4, -1).transpose(0, 1).contiguous().transpose(0, 1)
    check(inputs, labels.t().contiguous().t(), rows=5)


@pytest.mark.parametrize("n_rows, n_cols", [(1, 1), (5, 13), (33, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction, way", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reads_and_writes_stay_inside(smoothing, reduction, way, dtype, n_rows, n_cols, monkeypatch):
    """Inputs lie between bands of NaN, labels between numbers that are no class; allocations start as NaN, including the buffer
    and its padding."""
    inputs, labels = make_inputs(n_rows, n_cols, dtype=dtype)
    labels[-1] = n_cols - 1
    weights, options = make_weights(n_cols, zeros=0.0), {"reduction": reduction, "label_smoothing": smoothing}
    with chunks_of(chunk_rows(way, 20)):
        plain = run(linear_cross_entropy, inputs, labels, class_weights=weights, **options)
        with poisoned_outputs(monkeypatch) as given:
            guarded_inputs = {k: guarded(t) for k, t in inputs.items()}
            options["class_weights"] = guarded(weights)
            results = run(linear_cross_entropy, guarded_inputs, fenced(labels, n_cols), **options)
    assert_same(results, plain)
    assert given and all(t.isfinite().all() for t in results.values())
    for tensor in given:
        assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"


@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_inputs_are_not_overwritten_and_not_returned(reduction, way):
    inputs, labels = make_inputs(9, 37)
    dy = torch.full((9,) if reduction == "none" else (), 0.5, device=DEVICE)
    weights = make_weights(37)
    read = inputs | {"labels": labels, "dy": dy, "class_weights": weights}
    before = {name: tensor.clone() for name, tensor in read.items()}
    with chunks_of(chunk_rows(way, 4)):
        results = run(linear_cross_entropy, inputs, labels, dy, reduction=reduction, class_weights=weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.items())
    storages = [t.untyped_storage().data_ptr() for t in (*read.values(), *results.values())]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("reduction, way", REDUCTIONS)
def test_the_same_bits_every_time(reduction, way):
    inputs, labels = make_inputs(33, 101, dtype=torch.float16)
    options = {"reduction": reduction, "class_weights": make_weights(101)}
    with chunks_of(chunk_rows(way, 8)):
        first, second = (run(linear_cross_entropy, inputs, labels, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Allocated(TorchDispatchMode):
    """The largest size in bytes of a tensor that an operation returned, and that operation."""

    def __init__(self):
        super().__init__()
        self.largest = (0, "nothing")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, (tensor.untyped_storage().nbytes(), str(function)))
        return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_never_all_logits_at_once(reduction, grad, monkeypatch):
    """Nor a quarter of them: for 1024 rows with the chunks of 16384, the largest tensor is a chunk's logits."""
    monkeypatch.setattr(linear_cross_entropy_chunks, "MIN_ROWS", 64)
    inputs, labels = make_inputs(1024, 101, 4, ignored=0.9)
    with Allocated() as allocated, nullcontext() if grad else torch.no_grad():
        run(linear_cross_entropy, inputs, labels, frozen=() if grad else NAMES, reduction=reduction)
    assert 0 < allocated.largest[0] <= 128 * padded(101) * 4 < 1024 * 101, allocated.largest


class Held(TorchDispatchMode):
    """The peak of live bytes in tensors that operations returned, without `inputs` and their views."""

    def __init__(self, *inputs):
        super().__init__()
        self.known, self.bytes, self.highest = {x.untyped_storage()._cdata for x in inputs}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.highest = max(self.highest, self.bytes)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return found

    def _gone(self, storage, n_bytes):
        self.known.remove(storage)
        self.bytes -= n_bytes


def held(function, n_rows, n_cols, width, dtype):
    """The peak memory of a training step of the loss besides its inputs, including gradients; nothing is computed."""
    with torch.device("meta"):
        shapes = {"hidden": (n_rows, width), "weight": (n_cols, width), "bias": (n_cols,)}
        leaves = {name: torch.empty(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
        labels = torch.empty(n_rows, dtype=torch.int64)
    with Held(*leaves.values(), labels) as found, launch.recording("sm_90", lambda *launched: None):
        function(**leaves, labels=labels).backward()
    return found.highest


@pytest.fixture
def on_no_device(monkeypatch):
    monkeypatch.setattr(module, "check_on_cpu", lambda *arguments: None)
    # On a GPU products of 16-bit matrices may be added to a float32 matrix.
    monkeypatch.setattr(linear_cross_entropy_chunks, "accumulate", lambda *arguments: None)


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("n_cols", [30522, 119547])
@pytest.mark.parametrize("width, first", [(768, 3600), (1024, 4600)])
def test_a_quarter_of_eagers_memory(width, first, n_cols, dtype, on_no_device):
    """From a batch of some thousand labelled rows on; never more than eager's, except for a few KiB."""
    for n_rows in (64, 614, 1024, 1025, 2457, 3072, 3300, first, 6144, 8191, 16384, 40000, 65536):
        ours, eager = (held(f, n_rows, n_cols, width, dtype) for f in (linear_cross_entropy, reference.linear_cross_entropy))
        assert ours <= (eager * 0.25 if n_rows >= first else eager * 1.01), f"{n_rows} rows: {ours / eager:.3f}"


@pytest.mark.no_launch
@pytest.mark.parametrize("n_cols", [2, 101, 768, 1536])
def test_few_classes_are_one_chunk(n_cols, on_no_device):
    """For any number of rows: their logits are as small as the gradient of the rows, which eager has too."""
    for n_rows in (1, 5000, 2**20):
        assert rows_per_chunk(n_rows, n_cols, 768, torch.bfloat16) == n_rows
    ours, eager = (held(f, 65536, n_cols, 768, torch.bfloat16) for f in (linear_cross_entropy, reference.linear_cross_entropy))
    assert ours <= 1.1 * eager, f"{ours / eager:.3f}"


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("n_cols, width", [(30522, 768), (119547, 1024), (2000, 768), (101, 24), (1, 1)])
def test_the_rows_of_a_chunk(n_cols, width, dtype):
    row, of_rows, of_weight = padded(n_cols) * dtype.itemsize, width * dtype.itemsize, n_cols * width * max(4, dtype.itemsize)
    for n_rows in (*range(0, 70000, 211), 8 * MIN_ROWS, 2**20, 2**24 + 1):
        size = rows_per_chunk(n_rows, n_cols, width, dtype)
        if n_rows <= max_kept_rows(n_cols, width, dtype):
            assert size == n_rows
            continue
        chunks = -(-n_rows // size)
        assert chunks > 1 and size % 64 == 0 and size > MIN_ROWS / 2, n_rows  # none is much shorter
        held = size * row + n_rows * of_rows + of_weight
        assert size <= MIN_ROWS + 64 or held <= 0.6 * n_rows * row + 64 * row, n_rows
        assert size <= MIN_ROWS + 64 or size * row <= 2 * (n_rows * of_rows + of_weight) + 64 * row, n_rows


@pytest.mark.long
def test_offsets_past_two_to_the_31():
    """Rows of the buffer whose offsets exceed 32 bits."""
    from fastbert.kernels.linear_cross_entropy.rows import Targets, launch_rows

    n_cols = 2**30 + 64
    if DEVICE.type == "cpu":
        pytest.skip("the interpreter would take hours for rows of 2**30 columns")
    logits = torch.zeros(3, n_cols, dtype=torch.float16, device=DEVICE)
    labels, losses = torch.tensor([0, 5, n_cols - 1], device=DEVICE), torch.empty(3, device=DEVICE)
    launch_rows(logits, None, Targets(labels, None, None, -100, 0.0), losses, None, True, 1.0)
    torch.testing.assert_close(losses, torch.full_like(losses, float(torch.tensor(float(n_cols)).log())))
    assert logits[2, -1] == -1 and logits[2, 0] == 0


@pytest.mark.parametrize("layout", [sliced, expanded], ids=lambda f: f.__name__)
def test_a_gradient_a_row_of_any_stride(layout):
    inputs, labels = make_inputs(9, 37)
    check(inputs, labels, layout(torch.randn(9, 1, device=DEVICE))[:, 0], rows=4, reduction="none")
