"""embedding_layernorm: all ways to name a row, every dtype and layout, memory, and bitwise reproducible gradients."""

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st

from fastbert.kernels import reference
from fastbert.kernels.core.checks import MAX_WIDTH
from fastbert.kernels.core.launch import counts
from fastbert.kernels.embedding_layernorm import embedding_layernorm, plain
from fastbert.kernels.embedding_layernorm import gradients as embedding_gradients
from fastbert.kernels.embedding_layernorm import sums as embedding_sums
from fastbert.testing.numerics import assert_close
from fastbert.testing.rows import DEVICE, assert_same, double, drawn_mask, run, seed_tensor

from ..attention.test_memory import fenced
from ..layouts import LAYOUTS, expanded, guarded, sliced, transposed
from ..opchecking import opcheck
from ..test_memory import guards_of, poisoned_outputs

IDS, FORWARD, ROWS, ORDER, RUNS, JOINS, SUMS, FINISH = (
    f"embedding_layernorm_{part}_kernel"
    for part in ("ids", "fwd", "bwd", "bwd_order", "bwd_runs", "bwd_joins", "bwd_sums", "bwd_finish")
)
PIECE, MAX_TYPES = embedding_gradients.PIECE, embedding_sums.MAX_TYPES
TABLES = ("words", "positions", "types")
NAMES = (*TABLES, "weight", "bias")
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
POSITIONS = ("counted", "of all sequences", "of each sequence")


def make(
    shape=(3, 9),
    width=40,
    dtype=SINGLE,
    *,
    embeds=False,
    positions="counted",
    types=2,
    type_ids="of each sequence",
    vocabulary=13,
    index_dtype=torch.int64,
    scale=1.0,
    dtypes=None,
    offset=0,
):
    """The tensors to differentiate, and the other arguments."""
    n_positions = shape[-1] + 4

    def indices(high, shape=shape):
        return torch.randint(high, shape).to(DEVICE, index_dtype)

    def normal(name, *shape):
        values = torch.randn(*shape, dtype=DOUBLE)
        values = 1.0 + 0.3 * values if name == "weight" else values if name == "bias" else scale * values
        return values.to(DEVICE, (dtypes or {}).get(name, dtype))

    shared = (*(1 for _ in shape[:-1]), shape[-1])
    inputs = {
        "words": normal("words", *(shape if embeds else (vocabulary,)), width),
        "positions": normal("positions", n_positions, width),
        "types": normal("types", types, width),
        "weight": normal("weight", width),
        "bias": normal("bias", width),
    }
    named = {"ids": None if embeds else indices(vocabulary), "offset": offset}
    if type_ids != "none":
        named["token_type_ids"] = indices(types, shared if type_ids == "of all sequences" else shape)
    if positions != "counted":
        named["position_ids"] = indices(n_positions, shared if positions == "of all sequences" else shape)
    return inputs, named


def packed(ids, spare=0):
    """Packed rows: every other and the last two of a batch, and `spare` for some more that are not read."""
    rows = torch.arange(ids.numel(), device=DEVICE, dtype=torch.int32)
    chosen = torch.cat([rows[::2], rows[-2:]]).unique()
    inverse = torch.full_like(rows, -1)
    inverse[chosen.long()] = torch.arange(len(chosen), device=DEVICE, dtype=torch.int32)
    return {"index": torch.cat([chosen, torch.full_like(chosen[:spare], -1)]), "inverse": inverse}


def check(inputs, options, dy=None, frozen=()):
    """Output and every gradient against eager and float64."""
    options = dict(options)
    ids, index = options["ids"], options.get("index")
    rows = (1, len(index)) if index is not None else inputs["words"].shape[:-1] if ids is None else ids.shape
    shape = (*rows, inputs["words"].shape[-1])
    eager_options = {k: v for k, v in options.items() if k != "seed"}
    if options.get("p"):
        options.setdefault("seed", seed_tensor(1234))
        eager_options["keep"] = drawn_mask(shape, options["p"], options["seed"])
    if dy is None:
        dtype = options.get("out_dtype")
        for name in TABLES:
            dtype = options.get("out_dtype") or torch.promote_types(dtype or HALF, inputs[name].dtype)
        dy = torch.randn(shape, dtype=DOUBLE).to(DEVICE, dtype)
        if index is not None:
            dy[:, index < 0] = 0.0
    results = run(embedding_layernorm, inputs, dy, frozen, **options)
    assert results["y"].shape == shape and results["y"].is_contiguous()
    eager = run(reference.embedding_layernorm, inputs, dy, frozen, **eager_options)
    eager_options.pop("out_dtype", None)
    exact = run(reference.embedding_layernorm, double(inputs), dy.double(), frozen, **eager_options)
    rounded = any(t.element_size() == 2 for t in (dy, *inputs.values()))
    assert_close(results, eager, exact, relative_fp32=None if rounded else 1e-5)
    return results


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF], ids=str)
@pytest.mark.parametrize("type_ids", ["none", "of all sequences", "of each sequence"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.one_in(2)
def test_every_way_to_name_rows(embeds, positions, type_ids, dtype, launches):
    inputs, options = make(dtype=dtype, embeds=embeds, positions=positions, type_ids=type_ids)
    check(inputs, options, frozen=())
    sorted_ = (not embeds) + (positions != "counted")
    expected = {FORWARD: 1, ROWS: 1, SUMS: 1, FINISH: 1, ORDER: sorted_, RUNS: sorted_}
    assert launches() == {name: n for name, n in expected.items() if n}


@pytest.mark.parametrize("width", [1, 37, 312, 768, 1023, 1500])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF], ids=str)
@pytest.mark.one_in(2)
def test_widths(width, dtype):
    inputs, options = make((1, 3), width, dtype)
    if width == 1:  # no variance: y is the bias, and only the bias has a gradient
        results = run(embedding_layernorm, inputs, torch.randn(1, 3, 1).to(DEVICE, dtype), **options)
        assert torch.equal(results["y"], inputs["bias"].expand(1, 3, 1)) and not results["dwords"].any()
    else:
        check(inputs, options)


@pytest.mark.parametrize("shape", [(7,), (1, 1), (2, 1), (1, 40), (3, 33), (2, 2, 5)], ids=str)
def test_shapes(shape):
    check(*make(shape))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
@pytest.mark.no_launch
def test_empty(shape, embeds, positions):
    check(*make(shape, embeds=embeds, positions=positions))


@pytest.mark.parametrize("types", [1, 3, MAX_TYPES, MAX_TYPES + 1, 9])
def test_numbers_of_types(types):
    """Few types are summed separately in registers; many are sorted."""
    check(*make(types=types))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_index_dtypes(positions, index_dtype):
    check(*make(positions=positions, index_dtype=index_dtype))


@pytest.mark.parametrize("offset", [1, 4])
def test_offset(offset):
    check(*make(offset=offset))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF], ids=str)
@pytest.mark.one_in(2)
def test_dropout(p, dtype):
    inputs, options = make(dtype=dtype)
    results = check(inputs, options | {"p": p})
    assert p < 1.0 or not any(tensor.any() for tensor in results.values())


def test_manual_seed_repeats_dropout():
    inputs, options = make()
    torch.manual_seed(3)
    first, other = (embedding_layernorm(**inputs, **options, p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(embedding_layernorm(**inputs, **options, p=0.5), first) and not torch.equal(first, other)


@pytest.mark.parametrize("out", [None, SINGLE, HALF], ids=str)
@pytest.mark.parametrize(
    "words, positions, types, norm",
    [(HALF, SINGLE, SINGLE, SINGLE), (HALF, HALF, SINGLE, HALF), (SINGLE, HALF, HALF, SINGLE), (HALF, HALF, HALF, SINGLE)],
    ids=str,
)
@pytest.mark.one_in(2)
def test_mixed_dtypes(words, positions, types, norm, out):
    dtypes = {"words": words, "positions": positions, "types": types, "weight": norm, "bias": norm}
    inputs, options = make(dtypes=dtypes)
    results = check(inputs, options | {"out_dtype": out})
    assert all(results["d" + name].dtype == tensor.dtype for name, tensor in inputs.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("only", [False, True], ids=["without", "only"])
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_frozen_inputs(embeds, only, name, launches):
    inputs, options = make(embeds=embeds)
    frozen = [n for n in NAMES if n != name] if only else [name]
    check(inputs, options, frozen=frozen)
    assert launches()[RUNS] == (not embeds and "words" not in frozen)
    assert launches()[SUMS] == (not {"positions", "types"} <= set(frozen))


def test_without_gradients(launches):
    inputs, options = make()
    run(embedding_layernorm, inputs, None, **options)
    with torch.no_grad():
        embedding_layernorm(**inputs, **options)
    assert launches() == {FORWARD: 2}


@pytest.mark.parametrize("tokens", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 4 * PIECE + 3])
@pytest.mark.parametrize("pad", [None, 0, 1])
def test_runs_longer_than_a_piece(tokens, pad):
    """A few words many times: runs that start and end inside and at the edges of a piece, and cover several pieces."""
    inputs, options = make((1, tokens), 8, DOUBLE, vocabulary=6)
    options["ids"] = torch.tensor([0, 1, 1, 1, 1, 5], device=DEVICE)[options["ids"] % 6]
    results = check(inputs, options | {"padding_idx": pad})
    assert not results["dwords"][2:5].any(), "nobody read those"
    assert pad is None or not results["dwords"][pad].any()


def test_one_run_longer_than_are_joined_at_once():
    places = PIECE * (embedding_gradients.JOINED + 3) + 5
    dz = torch.randn(places, 4, dtype=DOUBLE, device=DEVICE)
    dtable = embedding_gradients.by_runs(dz, torch.ones(places, dtype=torch.int64, device=DEVICE), 3, None, DOUBLE)
    torch.testing.assert_close(dtable[1], dz.sum(0))
    assert not dtable[::2].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("places", [1, 5, 300, 1500, embedding_gradients.MAX_RANKED, embedding_gradients.MAX_RANKED + 1])
@pytest.mark.no_launch
def test_ids_are_brought_into_order(places, dtype, monkeypatch):
    """By a kernel, and for more ids by torch's sort, with the same result: tokens of one id keep their order."""
    monkeypatch.setattr(embedding_gradients, "MAX_RANKED", min(embedding_gradients.MAX_RANKED, 2000))
    ids = torch.randint(max(2, places // 4), (places,)).to(DEVICE, dtype)
    strided, fit = torch.stack([ids, 1 - ids], 1)[:, 0], 2**17 - 1  # ids of more table rows do not fit 32 bits with their place
    expected, places_ = ids.sort(stable=True)
    for layout, n_table_rows in ((ids, fit), (strided, fit), (strided, fit + 1)):
        found, order = embedding_gradients.in_order(layout, n_table_rows)
        assert found.dtype == torch.int32 and torch.equal(found, expected.int()) and torch.equal(order.long(), places_)


@pytest.mark.parametrize("which", ["all", "weight", "bias", "norm", "positions", "types"])
@pytest.mark.parametrize("dtype", [HALF, DOUBLE], ids=str)
def test_many_partial_sums(dtype, which):
    """More than are read at once, and table rows that were not read: the sums of plain PyTorch."""
    acc = DOUBLE if dtype == DOUBLE else SINGLE
    sums, place_sums = (torch.randn(*shape, 37, dtype=acc, device=DEVICE) for shape in ((70, 2), (3, 45, 2)))
    if which in ("weight", "bias", "norm"):
        place_sums = None
    elif which != "all":
        sums = None
    shapes = {"weight": (37,), "bias": (37,), "positions": (51, 37), "types": (4, 37)}
    wanted = {"all": shapes, "norm": ("weight", "bias")}.get(which, (which,))
    results = []
    for module in (embedding_sums, plain):
        out = [torch.full(shape, torch.nan, device=DEVICE, dtype=dtype) if n in wanted else None for n, shape in shapes.items()]
        module.finish(sums, place_sums, *out, 3)
        results.append([x for x in out if x is not None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert one.isfinite().all()


def test_every_order_of_the_ids_gives_every_token_its_row():
    """The tokens of each table row are added in their own order, so only they decide the bits."""
    inputs, options = make((2, 40), 8, vocabulary=9)
    dy = torch.randn(2, 40, 8, device=DEVICE)
    one = run(embedding_layernorm, inputs, dy, **options)
    swapped = torch.tensor([8, 1, 2, 3, 4, 5, 6, 7, 0], device=DEVICE)
    renamed = inputs | {"words": inputs["words"][swapped]}
    other = run(embedding_layernorm, renamed, dy, **options | {"ids": swapped[options["ids"]]})
    torch.testing.assert_close(other["dwords"], one["dwords"][swapped])
    again = run(embedding_layernorm, inputs, dy, **options)
    assert all(torch.equal(again[name], one[name]) for name in one)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_stays_with_its_own_rows(bad):
    inputs, options = make((2, 20), 8, vocabulary=50)
    dy = torch.randn(2, 20, 8, device=DEVICE)
    clean = run(embedding_layernorm, inputs, dy, **options)
    dy[1, 3, 2] = bad
    spoiled = run(embedding_layernorm, inputs, dy, **options)
    others = torch.arange(50, device=DEVICE) != options["ids"][1, 3]
    assert torch.equal(spoiled["dwords"][others], clean["dwords"][others])
    assert not spoiled["dwords"][~others].isfinite().all()
    places = torch.arange(len(clean["dpositions"]), device=DEVICE) != 3
    assert torch.equal(spoiled["dpositions"][places], clean["dpositions"][places])


@pytest.mark.parametrize("dy_layout", LAYOUTS, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.one_in(2)
def test_layouts(layout, dy_layout):
    """The same bits as from contiguous copies, for tables and for rows that are passed directly."""
    for embeds in (False, True):
        inputs, options = make((19,), 24, embeds=embeds)
        for name in TABLES:
            inputs[name] = layout(inputs[name])
        dy = dy_layout(torch.randn(19, 24, device=DEVICE))
        results = check(inputs, options, dy)
        plain = {name: t.contiguous().clone() for name, t in inputs.items()}
        assert_same(results, run(embedding_layernorm, plain, dy.contiguous(), **options))


def test_ids_that_are_views():
    inputs, options = make((3, 8), positions="of each sequence")
    for name in ("ids", "token_type_ids", "position_ids"):
        options[name] = options[name].t().contiguous().t()
    check(inputs, options)
    options["token_type_ids"] = options["token_type_ids"][:1].expand(3, -1)
    check(inputs, options)


@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape, width", [((2, 9), 37), ((1, 35), 8)], ids=str)
def test_memory(shape, width, positions, embeds, monkeypatch):
    """Reads stay inside the inputs, writes fill the outputs and nothing else, and no input changes."""
    inputs, options = make(shape, width, embeds=embeds, positions=positions, vocabulary=4)
    dy, dropout = torch.randn(*shape, width, device=DEVICE), {"p": 0.3, "seed": seed_tensor(7)}
    plain = run(embedding_layernorm, inputs, dy, **options, **dropout)
    between = {name: guarded(tensor) for name, tensor in inputs.items()}
    ids = {name: fenced(value, 1) for name, value in options.items()}
    before = {name: tensor.clone() for name, tensor in between.items()}
    with poisoned_outputs(monkeypatch) as allocated:
        results = run(embedding_layernorm, between, guarded(dy), **ids, **dropout)
    assert_same(results, plain)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert all(torch.equal(between[name], tensor) for name, tensor in before.items())
    for tensor in allocated:
        assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("types", [2, MAX_TYPES + 1])
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.one_in(2)
def test_gradcheck(p, embeds, types, positions):
    inputs, options = make((2, 3), 5, DOUBLE, embeds=embeds, positions=positions, types=types, vocabulary=4)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.autograd.gradcheck(
        lambda *tensors: embedding_layernorm(*tensors, **options, p=p, seed=seed_tensor(11)),
        leaves,
        fast_mode=True,
        check_undefined_grad=False,
        nondet_tol=0.0,
    )


def test_a_second_derivative_raises():
    inputs, options = make((1, 3), 6, DOUBLE, embeds=True)
    words = inputs["words"].requires_grad_()
    (dwords,) = torch.autograd.grad(embedding_layernorm(**inputs, **options).sin().sum(), words, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dwords.sum().backward()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [None, sliced, expanded, transposed], ids=lambda f: getattr(f, "__name__", "plain"))
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_opcheck(embeds, layout):
    inputs, options = make((5,), 12, embeds=embeds, positions="of each sequence" if layout is sliced else "counted")
    words, *others = ((layout or torch.clone)(t) if n in TABLES else t for n, t in inputs.items())
    read = (options["ids"], options["token_type_ids"], options.get("position_ids"), None)
    dropout = (seed_tensor(3), 0, 1, 2)
    leaves = [tensor.requires_grad_() for tensor in (words, *others)]
    ops = torch.ops.fastbert
    opcheck(ops.embedding_layernorm, *leaves, *read, *dropout, 1e-12, 0.3, SINGLE, True)
    tables = [tensor.detach() for tensor in leaves[:4]]
    dy, mean = torch.randn(5, 12, device=DEVICE), torch.randn(5, device=DEVICE)
    for needs in ("11111", "01001", "00010", "10100"):
        needed = [need == "1" for need in needs]
        opcheck(ops.embedding_layernorm_backward, dy, *tables, mean, mean.exp(), *read, *dropout, 0.3, HALF, *needed)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_compile(positions, embeds):
    """One graph, the same bits; another length or offset needs no other graph."""
    torch._dynamo.reset()
    function = torch.compile(embedding_layernorm, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 7):
            inputs, options = make((2, length), 16, embeds=embeds, positions=positions)
            dy = torch.randn(2, length, 16, device=DEVICE)
            before = counts.copy()
            eager = run(embedding_layernorm, inputs, dy, **options)
            launched = counts - before
            results = run(function, inputs, dy, **options)
            assert counts - before == launched + launched
            assert all(torch.equal(results[name], eager[name]) for name in eager)
    torch._dynamo.reset()


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from([DOUBLE, SINGLE, HALF]))
    exponents = st.floats(-1.0, 1.5) if dtype == HALF else st.floats(-4.0, 4.0)
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 8)))
    return {
        "shape": shape,
        "width": draw(st.integers(16, 130)),
        "dtype": dtype,
        "scale": 10.0 ** draw(exponents),
        "words": draw(st.sampled_from(["ids", "embeds", "packed"])),
        "positions": draw(st.sampled_from(POSITIONS)),
        "types": draw(st.integers(1, 6)),
        "type_ids": draw(st.sampled_from(["none", "of all sequences", "of each sequence"])),
        "vocabulary": draw(st.sampled_from([1, 2, 5, 30])),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "offset": draw(st.integers(0, 4)),
    }


@given(
    call=calls(),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    frozen=st.sets(st.sampled_from(NAMES), max_size=4),
    p=st.one_of(st.just(0.0), st.sampled_from([0.1, 0.5, 1.0])),
    eps=st.sampled_from([1e-12, 1e-5]),
    pad=st.booleans(),
    values=st.integers(0, 2**31),
)
def test_any_legal_call(call, layouts, frozen, p, eps, pad, values):
    note(f"{call}")
    torch.manual_seed(values)
    words = call.pop("words")
    inputs, options = make(**call, embeds=words == "embeds")
    for name, layout in zip(TABLES, layouts, strict=True):
        rows = inputs[name].reshape(-1, call["width"])
        inputs[name] = layout(rows).reshape(inputs[name].shape)
    options |= {"p": p, "eps": eps}
    if pad:
        options |= {"position_padding_idx": 0} | ({} if words == "embeds" else {"padding_idx": 0})
    if words == "packed":
        options |= packed(options["ids"], values % 3)
    check(inputs, options, frozen=frozen)


@pytest.mark.no_launch
@pytest.mark.parametrize("name, table", [("ids", "words"), ("token_type_ids", "types"), ("position_ids", "positions")])
@pytest.mark.parametrize("value", [-1, "the row after the last", 1000])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion on a GPU ends the process")
def test_an_id_outside_of_its_table(value, name, table):
    inputs, options = make(positions="of each sequence")
    options[name][1, 2] = len(inputs[table]) if isinstance(value, str) else value
    with pytest.raises(IndexError, match="index out of range"):
        embedding_layernorm(**inputs, **options)


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "argument, change",
    [
        ("words", {"words": torch.zeros(4)}),
        ("words", {"words": torch.zeros(2, 3, 40)}),
        ("words", {"words": torch.zeros(4, 40, dtype=torch.int64)}),
        ("words", {"words": torch.zeros(4, MAX_WIDTH + 1)}),
        ("positions", {"positions": torch.zeros(13, 41)}),
        ("types", {"types": torch.zeros(2, 1, 40)}),
        ("types", {"types": torch.zeros(0, 40), "token_type_ids": None}),
        ("weight", {"weight": torch.ones(39)}),
        ("bias", {"bias": torch.ones(40, dtype=torch.bool)}),
        ("ids", {"ids": torch.zeros(3, 9)}),
        ("ids", {"ids": torch.zeros((), dtype=torch.int64)}),
        ("token_type_ids", {"token_type_ids": torch.zeros(2, 9, dtype=torch.int64)}),
        ("position_ids", {"position_ids": torch.zeros(3, 1, dtype=torch.int64)}),
        ("offset", {"offset": 5}),
        ("offset", {"offset": -1}),
        ("p", {"p": 1.5}),
    ],
    ids=str,
)
def test_wrong_arguments(argument, change):
    inputs, options = make()
    changed = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        embedding_layernorm(**(inputs | options | changed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("width", [768, 1500])
@pytest.mark.parametrize("positions", POSITIONS)
def test_on_a_gpu(positions, width, dtype):
    """BERT's vocabulary, half of the tokens one word, in the dtypes and at the sizes of training."""
    inputs, options = make((16, 128), width, dtype, positions=positions, vocabulary=30522)
    options["ids"][:, 64:] = 7
    first, again = (check(inputs, options | {"p": 0.1}, dy) for dy in [torch.randn(16, 128, width).to(DEVICE, dtype)] * 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
