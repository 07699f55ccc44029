"""A layer as one op: output and every gradient equal the reference's for all masks, packings, dropouts and mixed dtypes."""

import itertools

import pytest
import torch

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.kernels.encoder_layer import Settings, encoder_layer
from fastbert.testing.encoder_layer import NAMES, PROJECTIONS, check, flat, make_inputs, seeds
from fastbert.testing.rows import DEVICE, assert_same, run

from ..layouts import LAYOUTS, expanded, offset, sliced, transposed

DTYPES = (torch.float64, torch.float32, torch.float16)
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool, device=DEVICE)
DROPPED = Settings(3, attention_p=0.2, attention_output_p=0.3, output_p=0.4)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bounds(*starts):
    return torch.tensor(starts, dtype=torch.int32, device=DEVICE)


PACKED = {"cu_seqlens": bounds(0, 3, 3, 9, 10), "max_seqlen": 6}
CAUSAL_READ = PACKED | {"index": bounds(4, 1, 8, -1), "inverse": bounds(-1, 1, -1, -1, 0, -1, -1, -1, 2, -1)}
READ = PACKED | {"cu_seqlens_q": bounds(0, 1, 1, 1, 3), "max_seqlen_q": 2}  # nothing of the second and fourth sequences is read


@each_dtype
@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_padded(settings, dtype):
    """A mask with holes, left padding, and a row that sees no key."""
    check(make_inputs((3, 5, 24), 40, dtype), settings, key_mask=MASK)


@each_dtype
@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_packed(settings, dtype):
    check(make_inputs((10, 24), 40, dtype), settings, **PACKED)


@each_dtype
@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_rows_that_are_read(settings, dtype):
    check(make_inputs((10, 24), 40, dtype, queries=3), settings, **READ)


@each_dtype
@pytest.mark.parametrize("settings", [Settings(3, causal=True), DROPPED._replace(causal=True), DROPPED], ids=str)
def test_rows_that_are_read_anywhere(settings, dtype):
    """Rows of causal sequences that are not only the last; one index entry names no row."""
    check(make_inputs((10, 24), 40, dtype), settings, **CAUSAL_READ)


@pytest.mark.parametrize("frozen", [("x",), ("x", *PROJECTIONS, *(f"{n}_bias" for n in PROJECTIONS)), NAMES, ("x", *NAMES)])
def test_rows_that_are_read_anywhere_of_what_is_frozen(frozen):
    check(make_inputs((10, 24)), DROPPED._replace(causal=True), frozen=frozen, **CAUSAL_READ)


@pytest.mark.parametrize("probabilities", list(itertools.product((0.0, 0.3, 1.0), repeat=3)), ids=str)
@pytest.mark.one_in(3)
def test_dropout(probabilities):
    attention_p, attention_output_p, output_p = probabilities
    settings = Settings(3, attention_p=attention_p, attention_output_p=attention_output_p, output_p=output_p)
    check(make_inputs((3, 5, 24)), settings, key_mask=MASK)


@pytest.mark.parametrize(
    ("heads", "head_size", "inner"),
    [(1, 8, 16), (3, 11, 45), (2, 16, 33), (2, 32, 64), (1, 40, 1), (2, 64, 96), (5, 1, 7), (1, 59, 24)],
)
@each_dtype
@pytest.mark.one_in(2)
def test_sizes(heads, head_size, inner, dtype):
    check(make_inputs((2, 6, heads * head_size), inner, dtype), Settings(heads))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activations(activation, dtype):
    check(make_inputs((2, 5, 24), 40, dtype), Settings(3, activation))


def test_each_norm_has_its_own_eps():
    check(make_inputs((2, 5, 24)), Settings(3, attention_eps=0.5, output_eps=2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_causal_and_scaled(dtype):
    check(make_inputs((2, 6, 24), 40, dtype), Settings(3, causal=True, scale=0.7))


@pytest.mark.parametrize("shape", [(3, 1, 24), (1, 1, 24)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_one_token(shape, causal):
    check(make_inputs(shape), Settings(3, causal=causal), cancels=True)


def test_several_tiles():
    """129 rows are more than a tile of any kernel, in both directions."""
    lengths = torch.tensor([129, 70], device=DEVICE)[:, None]
    check(make_inputs((2, 129, 16), 24), Settings(2, attention_p=0.1), key_mask=torch.arange(129, device=DEVICE) < lengths)


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, 5, 24), {}),
        ((2, 0, 24), {}),
        ((0, 5, 24), {"key_mask": MASK[:0]}),
        ((0, 24), {"cu_seqlens": bounds(0, 0), "max_seqlen": 3}),
        ((5, 24), {"cu_seqlens": bounds(0, 5), "max_seqlen": 5, "cu_seqlens_q": bounds(0, 0), "max_seqlen_q": 0}),
        ((5, 24), {"cu_seqlens": bounds(0, 5), "max_seqlen": 5, "index": bounds(), "inverse": bounds(*[-1] * 5)}),
    ],
    ids=["no sequences", "no tokens", "masked", "one empty sequence", "nothing is read", "nothing is read anywhere"],
)
def test_nothing(shape, options, dtype):
    """Gradients without rows are zeros, whatever was in memory: deterministic torch fills it with NaN."""
    queries = 0 if "cu_seqlens_q" in options else None
    inputs = make_inputs(shape, 40, dtype, queries=queries)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, dtype=dtype, device=DEVICE).isnan().all()
        check(inputs, Settings(3, output_p=0.1), **options)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("queries", [None, 3], ids=["", "read"])
def test_sequences_far_shorter_than_the_longest(queries):
    """Most of attention's programs have nothing to do, but their sums count: they are in memory that holds NaN."""
    options = {"cu_seqlens": bounds(0, 2, 2, 7), "max_seqlen": 150}
    if queries is not None:
        options |= {"cu_seqlens_q": bounds(0, 1, 1, queries), "max_seqlen_q": 70}
    torch.use_deterministic_algorithms(True)
    try:
        check(make_inputs((7, 24), 40, queries=queries), Settings(3), **options)
    finally:
        torch.use_deterministic_algorithms(False)


# Autocast's dtypes, and those of a 16-bit model with LayerNorms in float32: (x, weights, products, LayerNorm's result).
MIXTURES = [
    (torch.float32, torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float32, torch.float16, None),
    (torch.float16, torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.float32, torch.float32, None),
    (torch.float32, torch.float16, None, None),
]


VECTORS = [name for norm in ("attention", "output") for name in (f"{norm}_norm", f"{norm}_norm_bias")]
VECTORS += ["attention_output_bias", "intermediate_bias", "output_bias"]


def named(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda dtypes: "-".join(map(named, dtypes)))
@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_mixed_dtypes(settings, dtypes):
    dtype, weights, product, norm = dtypes
    inputs = make_inputs((3, 9, 48), 80, dtype, weight_dtype=weights)
    key_mask = torch.arange(9, device=DEVICE) < torch.tensor([[9], [4], [6]], device=DEVICE)
    results = check(inputs, settings, key_mask=key_mask, product_dtype=product, norm_dtype=norm)
    for name, gradient in results.items():
        assert name == "y" or gradient is None or gradient.dtype == inputs[name.removeprefix("d")].dtype, name
    if weights == torch.float32:  # summed in float32 and never rounded further
        for name in VECTORS:
            gradient = results[f"d{name}"]
            assert not torch.equal(gradient, gradient.half().float()), name


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_bfloat16(settings, weights):
    """Under autocast, and as a bfloat16 model; the interpreter rounds it wrongly."""
    dtype = weights if weights == torch.bfloat16 else torch.float32
    inputs = make_inputs((3, 70, 96), 160, dtype, weight_dtype=weights)
    key_mask = torch.arange(70, device=DEVICE) < torch.tensor([[70], [4], [33]], device=DEVICE)
    norm = torch.float32 if dtype == torch.float32 else None
    check(inputs, settings, key_mask=key_mask, product_dtype=torch.bfloat16, norm_dtype=norm)


@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_rows_that_are_read_under_autocast(settings):
    inputs = make_inputs((10, 24), queries=3)
    check(inputs, settings, product_dtype=torch.float16, norm_dtype=torch.float32, **READ)
    anywhere = CAUSAL_READ | {"product_dtype": torch.float16, "norm_dtype": torch.float32}
    check(make_inputs((10, 24)), settings._replace(causal=True), **anywhere)


@pytest.mark.parametrize("of_x", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("of_dy", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.one_in(3)
def test_layouts(of_x, of_dy):
    inputs = make_inputs((10, 24), queries=3)
    inputs |= {name: of_x(inputs[name]) for name in ("x", "queries")}
    dy = of_dy(torch.randn(3, 24, device=DEVICE))
    check(inputs, DROPPED, dy, cancels=of_x is expanded, **READ)  # identical keys have no gradient


@pytest.mark.parametrize("layout", [transposed, sliced, offset], ids=lambda layout: layout.__name__)
def test_layouts_of_weights(layout):
    inputs = make_inputs((2, 5, 24))
    for name in NAMES:
        weight = inputs[name]
        inputs[name] = layout(weight) if weight.dim() == 2 else layout(weight[:, None])[:, 0]
    assert not inputs["query"].is_contiguous() or inputs["query"].data_ptr() % 16
    check(inputs, Settings(3))


def test_layouts_of_masks_and_seeds(launches):
    inputs = make_inputs((3, 5, 24))
    wide = torch.zeros(3, 11, dtype=torch.bool, device=DEVICE)
    wide[:, 1::2] = MASK
    given = run(flat(encoder_layer), inputs, None, settings=DROPPED, key_mask=MASK, seed=seeds())
    apart = torch.zeros(7, 2, dtype=torch.int64, device=DEVICE)
    apart[1:, 1] = seeds()
    options = {"key_mask": wide[:, 1::2], "seed": apart[1:, 1]}
    assert not any(tensor.is_contiguous() for tensor in options.values())
    assert_same(run(flat(encoder_layer), inputs, None, settings=DROPPED, **options), given)
    inputs = make_inputs((10, 24), queries=3)
    moved = dict(READ)
    moved["cu_seqlens"] = torch.cat([bounds(7), READ["cu_seqlens"]])[1:]
    moved["cu_seqlens_q"] = torch.stack([READ["cu_seqlens_q"]] * 2, 1)[:, 1]
    given = run(flat(encoder_layer), inputs, None, settings=Settings(3), **READ)
    assert_same(run(flat(encoder_layer), inputs, None, settings=Settings(3), **moved), given)


SUBSETS = {
    "x": {"x"},
    "queries": {"queries"},
    "x and queries": {"x", "queries"},
    "one vector": {"output_norm_bias"},
    "another vector": {"attention_norm"},
    "the activation's bias": {"intermediate_bias"},
    "a projection's bias": {"key_bias"},
    "a projection": {"value"},
    "two projections": {"query", "value_bias"},
    "the second product": {"attention_output"},
    "the last product": {"output"},
    "the products": {"intermediate", "output", "attention_output", *PROJECTIONS},
    "the weights": set(NAMES),
    "all but one": {"x", *NAMES} - {"intermediate"},
}


@pytest.mark.parametrize(
    ("needed", "read"), [(n, read) for n in SUBSETS for read in (False, True) if read or "queries" not in SUBSETS[n]], ids=str
)
def test_gradients_that_are_needed(needed, read):
    """The same bits, whatever else is asked for, and None for the others."""
    needed = SUBSETS[needed]
    inputs = make_inputs((10, 24), queries=3 if read else None)
    present = {name for name, tensor in inputs.items() if tensor is not None}
    options = {"settings": DROPPED, "seed": seeds(), **(READ if read else PACKED)}
    dy = torch.randn(3 if read else 10, 24, device=DEVICE)
    everything = run(flat(encoder_layer), inputs, dy, **options)
    some = run(flat(encoder_layer), inputs, dy, present - needed, **options)
    wanted = {"y", *(f"d{name}" for name in needed & present)}
    assert {name for name, tensor in some.items() if tensor is not None} == wanted
    assert_same({name: some[name] for name in wanted}, {name: everything[name] for name in wanted})


def test_frozen(launches):
    inputs = make_inputs((3, 5, 24))
    check(inputs, DROPPED, frozen=["x", *PROJECTIONS, *(f"{name}_bias" for name in PROJECTIONS)], key_mask=MASK)
    check(inputs, DROPPED, frozen=[name for name in NAMES if name != "output"], key_mask=MASK)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "queries", "options"),
    [
        ((3, 5, 24), None, {"key_mask": MASK}),
        ((10, 24), None, PACKED),
        ((10, 24), 3, READ),
        ((10, 24), None, CAUSAL_READ),
    ],
    ids=["padded", "packed", "read", "read anywhere"],
)
def test_without_a_gradient(shape, queries, options, dtype):
    """That is another path through the forward: in place, with one product per projection."""
    check(make_inputs(shape, 40, dtype, queries=queries), DROPPED, frozen=("x", "queries", *NAMES), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mixed_dtypes_without_a_gradient(dtype):
    options = {"product_dtype": torch.float16, "norm_dtype": torch.float32}
    check(make_inputs((3, 5, 24), 40, dtype), DROPPED, frozen=("x", *NAMES), **options)


@pytest.mark.parametrize("settings", [Settings(3), DROPPED], ids=["", "dropped"])
def test_without_a_gradient_it_is_the_same_and_keeps_nothing(settings):
    inputs = make_inputs((3, 5, 24))
    options = {"settings": settings, "key_mask": MASK, "seed": seeds()}
    wanted = run(flat(encoder_layer), inputs, None, **options)["y"]
    frozen = flat(encoder_layer)(**inputs, **options)
    assert frozen.grad_fn is None and not frozen.requires_grad
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        quiet = flat(encoder_layer)(**leaves, **options)
    with torch.inference_mode():
        inferred = flat(encoder_layer)(**leaves, **options)
    assert quiet.grad_fn is None and inferred.is_inference()
    assert all(torch.equal(y, wanted) for y in (frozen, quiet, inferred))
