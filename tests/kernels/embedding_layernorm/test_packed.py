"""embedding_layernorm on some rows of a batch, packed: their sums, and gradients in the rows that were read."""

from collections import Counter

import pytest
import torch

from fastbert.kernels.core.launch import counts
from fastbert.kernels.embedding_layernorm import embedding_layernorm, plain
from fastbert.kernels.embedding_layernorm import ids as embedding_ids
from fastbert.kernels.embedding_layernorm import sums as embedding_sums
from fastbert.kernels.embedding_layernorm.sums import MAX_TYPES
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from ..attention.test_memory import fenced
from ..layouts import guarded
from ..opchecking import opcheck
from ..test_memory import guards_of, poisoned_outputs
from .test_embedding_layernorm import (
    DOUBLE,
    FINISH,
    FORWARD,
    HALF,
    IDS,
    ORDER,
    POSITIONS,
    ROWS,
    RUNS,
    SINGLE,
    SUMS,
    check,
    make,
    packed,
)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF], ids=str)
@pytest.mark.parametrize("type_ids", ["none", "of all sequences", "of each sequence"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.one_in(2)
def test_every_way_to_name_rows(positions, type_ids, dtype, spare, launches):
    """Positions that are counted need no sorting here either."""
    inputs, options = make(dtype=dtype, positions=positions, type_ids=type_ids, offset=2 if spare else 0)
    check(inputs, options | packed(options["ids"], spare) | {"p": 0.1 if spare else 0.0})
    sorted_ = 1 + (positions != "counted")
    expected = {IDS: 1, FORWARD: 1, ROWS: 1, SUMS: 1, FINISH: 1, ORDER: sorted_, RUNS: sorted_}
    assert expected.items() <= launches().items()


@pytest.mark.parametrize("types", [1, 2, MAX_TYPES + 1])
@pytest.mark.parametrize("frozen", [[], ["positions"], ["types"], ["words"]], ids=str)
def test_many_short_sequences(frozen, types):
    """More sequences than one program sums, and then without any of their rows."""
    inputs, options = make((70, 3), 8, types=types, index_dtype=torch.int32)
    rows = packed(options["ids"])
    check(inputs, options | rows, frozen=frozen)
    rows = {"index": rows["index"][:0], "inverse": torch.full_like(rows["inverse"], -1)}
    results = run(embedding_layernorm, inputs, torch.zeros(1, 0, 8, device=DEVICE), frozen, **options, **rows)
    assert not any(tensor.any() for tensor in results.values() if tensor is not None)


def test_offset():
    inputs, options = make(offset=4)
    check(inputs, options | packed(options["ids"]))


@pytest.mark.parametrize("positions", POSITIONS)
def test_ids_that_are_views(positions):
    inputs, options = make((3, 8), positions=positions)
    for name in options.keys() - {"offset"}:
        options[name] = options[name].t().contiguous().t()
    check(inputs, options | packed(options["ids"]))


@pytest.mark.parametrize("positions", POSITIONS)
def test_memory(positions, monkeypatch):
    """Reads stay inside the inputs, writes fill the outputs and nothing else, and no input changes."""
    inputs, options = make((3, 9), 37, positions=positions, vocabulary=4)
    options |= packed(options["ids"])
    dy, dropout = torch.randn(1, len(options["index"]), 37, device=DEVICE), {"p": 0.3, "seed": seed_tensor(7)}
    expected = run(embedding_layernorm, inputs, dy, **options, **dropout)
    between = {name: guarded(tensor) for name, tensor in inputs.items()}
    ids = {name: fenced(value, 1) for name, value in options.items()}
    before = {name: tensor.clone() for name, tensor in between.items()}
    with poisoned_outputs(monkeypatch) as allocated:
        results = run(embedding_layernorm, between, guarded(dy), **ids, **dropout)
    assert_same(results, expected)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert all(torch.equal(between[name], tensor) for name, tensor in before.items())
    for tensor in allocated:
        if tensor.is_floating_point():
            assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("types", [2, MAX_TYPES + 1])
def test_gradcheck(types, positions):
    inputs, options = make((2, 4), 5, DOUBLE, positions=positions, types=types, vocabulary=4)
    options |= packed(options["ids"])
    torch.autograd.gradcheck(
        lambda *tensors: embedding_layernorm(*tensors, **options, p=0.4, seed=seed_tensor(11)),
        [tensor.requires_grad_() for tensor in inputs.values()],
        fast_mode=True,
        check_undefined_grad=False,
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_padding_row_of_the_positions(positions, pack):
    """RoBERTa's: its gradient is 0, whether positions are counted, shared by all sequences or sorted."""
    inputs, options = make((3, 6), 16, DOUBLE, positions=positions)
    options |= packed(options["ids"], 1) if pack else {}
    free = check(inputs, options)["dpositions"]
    skipped = int(free.abs().sum(1).argmax())
    results = check(inputs, options | {"position_padding_idx": skipped})
    assert free[skipped].any() and not results["dpositions"][skipped].any() and results["dpositions"].any()


def test_opcheck():
    inputs, options = make((5,), 12)
    tables = [tensor for name, tensor in inputs.items() if name != "bias"]
    dy, mean = torch.randn(1, 5, 12, device=DEVICE), torch.randn(1, 5, device=DEVICE)
    places = torch.tensor([[4, 0, -1], [2, 1, 3]], dtype=torch.int32, device=DEVICE)
    read = options["ids"][None], options["token_type_ids"][None], torch.tensor([[1, 1, 0, 2, 0]], device=DEVICE), places
    dropout = seed_tensor(3), 0, 1, 2, 0.3
    given = dy, *tables, mean, mean.exp(), *read, *dropout, SINGLE, *[True] * 5
    opcheck(torch.ops.fastbert.embedding_layernorm_backward, *given)


@pytest.mark.parametrize("positions", POSITIONS)
def test_compile(positions):
    """One graph, the same bits; torch's own ops replace the kernel that packs the ids."""
    torch._dynamo.reset()
    function = torch.compile(embedding_layernorm, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 8):
            inputs, options = make((2, length), 16, positions=positions)
            options |= packed(options["ids"], 1)
            dy = torch.randn(1, len(options["index"]), 16, device=DEVICE)
            before = counts.copy()
            eager = run(embedding_layernorm, inputs, dy, **options)
            launched, before = counts - before, counts.copy()
            results = run(function, inputs, dy, **options)
            assert counts - before == launched - Counter({IDS: 1})
            assert all(torch.equal(results[name], eager[name]) for name in eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("n_types", [1, 2])
def test_the_stand_ins(n_types):
    """The fallbacks give the same results as the kernels."""
    _, options = make((4, 6), types=2, positions="of each sequence")
    rows = packed(options["ids"], 2)
    given = rows["index"], options["ids"], options["token_type_ids"], options["position_ids"], 0
    for one, other in zip(embedding_ids.packed_ids(*given), plain.packed_ids(*given), strict=True):
        assert torch.equal(one, other)
    types = embedding_ids.packed_ids(*given)[1]
    dz = torch.randn(len(rows["index"]), 8, device=DEVICE)
    given = dz, 6, types, n_types, len(dz), 0, rows["inverse"].view(4, 6)
    torch.testing.assert_close(embedding_sums.by_places(*given).sum(0), plain.by_places(*given)[0])


@pytest.mark.no_launch
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion on a GPU ends the process")
def test_an_id_outside_of_its_table_that_is_not_read():
    """As in stock: padding is embedded too."""
    inputs, options = make()
    options["ids"][1, 2] = len(inputs["words"])
    rows = packed(options["ids"])
    assert rows["inverse"].view_as(options["ids"])[1, 2] < 0
    with pytest.raises(IndexError, match="index out of range"):
        embedding_layernorm(**inputs, **options, **rows)


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "argument, change",
    [
        ("index", {"inverse": None}),
        ("index", {"index": None}),
        ("index", {"ids": None}),
        ("index", {"index": torch.zeros(2)}),
        ("index", {"index": torch.zeros(1, 2, dtype=torch.int32)}),
        ("inverse", {"inverse": torch.zeros(26, dtype=torch.int32)}),
    ],
    ids=str,
)
def test_wrong_arguments(argument, change):
    inputs, options = make()
    options |= packed(options["ids"])
    changed = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    if "ids" in change:
        inputs["words"], options["token_type_ids"] = torch.zeros(3, 9, 40, device=DEVICE), None
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        embedding_layernorm(**(inputs | options | changed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, SINGLE], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_on_a_gpu(positions, dtype):
    inputs, options = make((16, 128), 768, dtype, positions=positions, vocabulary=30522)
    options |= packed(options["ids"]) | {"p": 0.1}
    dy = torch.randn(1, len(options["index"]), 768).to(DEVICE, dtype)
    first, again = check(inputs, options, dy), check(inputs, options, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
