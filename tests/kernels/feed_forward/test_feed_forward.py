"""feed_forward with its products' epilogues and without: values, gradients, edges of tiles, and when each is used."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.kernels.core.configs import ARCHITECTURES, FUSED, TABLES
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward import products as feed_forward_products
from fastbert.kernels.feed_forward.products import GRADIENT, KERNELS, PRODUCT, decided, is_on
from fastbert.testing.feed_forward import AFTER, check, make_inputs, small_tiles
from fastbert.testing.rows import DEVICE, INTERPRETED, run

from ..opchecking import opcheck

BOTH = (True, True)
WAYS = [(False, False), (True, False), (False, True), BOTH]


@pytest.fixture(name="small_tiles")
def _small_tiles(monkeypatch):
    small_tiles(monkeypatch)
    return lambda **options: small_tiles(monkeypatch, **options)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="tiles too small for the tensor cores, and types that are not theirs")


@interpreted
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", feed_forward_products.ACTIVATIONS)
def test_every_way(way, dtype, activation, small_tiles):
    check(make_inputs(37, 32, 64, 48, dtype), way, activation=activation)


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_activations_go_without(activation, small_tiles):
    on = activation in feed_forward_products.ACTIVATIONS
    with decided(*BOTH):
        assert is_on(PRODUCT, torch.empty(0, device=DEVICE), 37, 32, 64, activation) == on
        check(make_inputs(20, 32, 64, 16), (on, on), activation=activation, requested=BOTH)


@interpreted
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("persistent", [None, 1], ids=["a program a tile", "persistent"])
def test_any_number_of_rows(rows, persistent, small_tiles):
    """One row less and one more than a tile; more than the eight blocks of rows of a group."""
    small_tiles(persistent=persistent)
    check(make_inputs(rows, 32, 96, 16), BOTH)


@interpreted
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",), ("output_weight",), ("x", "weight", "bias")], ids=str)
@pytest.mark.parametrize("way", [BOTH, (False, False)], ids=["on", "off"])
def test_frozen_inputs(frozen, way, small_tiles):
    results = check(make_inputs(18, 16, 32, 16), way, frozen=frozen)
    assert {name for name in ("x", "weight", "bias", "output_weight") if results["d" + name] is None} == set(frozen)


@interpreted
@pytest.mark.parametrize("way", [BOTH, (False, False)], ids=["on", "off"])
def test_without_a_bias(way, small_tiles):
    check(make_inputs(18, 16, 32, 16) | {"bias": None}, way)


@interpreted
@pytest.mark.parametrize("shape", [(2, 9), (1, 2, 3), ()], ids=str)
def test_leading_dimensions_and_strides(shape, small_tiles):
    inputs = make_inputs(18, 16, 32, 16)
    inputs["x"] = torch.randn(*shape, 32, device=DEVICE)[..., ::2]
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    results = check(inputs, BOTH)
    assert results["y"].shape == (*shape, 16) and results["y"].is_contiguous()


@interpreted
def test_from_an_address_that_16_does_not_divide(small_tiles):
    inputs = make_inputs(18, 16, 32, 16)
    check({name: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape) for name, x in inputs.items()}, BOTH)


@interpreted
@pytest.mark.no_launch
def test_no_rows(small_tiles, launches):
    inputs = make_inputs(0, 16, 32, 16)
    with decided(*BOTH):
        results = run(feed_forward, inputs, torch.empty(0, 16, device=DEVICE))
    assert not launches() and results["y"].shape == (0, 16) and not results["dweight"].any() and not results["dbias"].any()


@interpreted
def test_nothing_is_kept_without_a_gradient(small_tiles, launches):
    inputs = make_inputs(18, 16, 32, 16)
    kept = []
    with decided(*BOTH), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x), torch.no_grad():
        y = feed_forward(**inputs)
    with decided(*BOTH):
        assert torch.equal(y, run(feed_forward, inputs, None)["y"])
    assert not kept and launches() == {KERNELS[0]: 2}


@interpreted
def test_rows_past_the_last_are_not_written(small_tiles):
    """Rows past the end are neither written, in front of other memory, nor summed."""
    work = feed_forward_products.work(PRODUCT, 5, 16, 32, torch.empty(0, device=DEVICE), "gelu")
    buffer = torch.full((2, 20, 32), torch.nan, device=DEVICE)
    x, weight = torch.randn(5, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE)
    work.launch(x, x_ptr=x, weight_ptr=weight, bias_ptr=None, h_ptr=buffer[0], y_ptr=buffer[1])
    assert buffer[:, :5].isfinite().all() and buffer[:, 5:].isnan().all()


@interpreted
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(value, small_tiles):
    inputs = make_inputs(20, 16, 32, 16)
    inputs["x"][19] = value  # in a tile whose remaining rows repeat the last one
    with decided(*BOTH):
        results = run(feed_forward, inputs, torch.randn(20, 16, device=DEVICE))
    assert results["y"][:19].isfinite().all() and not results["y"][19].isfinite().any()
    assert results["dx"][:19].isfinite().all()


@interpreted
def test_16_bit_results_are_those_of_a_product_and_a_kernel(small_tiles):
    """Rounding happens in the same places, so a product with few terms has the same bits."""
    inputs = make_inputs(33, 16, 32, 16, torch.float16)
    inputs = {name: (64 * x).round() / 64 for name, x in inputs.items()}  # float32 holds their sums, float16 rounds them
    dy = torch.randint(-64, 65, (33, 16), device=DEVICE).half() / 64
    found = []
    for way in WAYS:
        with decided(*way):
            found.append(run(feed_forward, inputs, dy))
    for other in found[1:]:
        for name, tensor in other.items():
            if name != "dbias":  # summed in another order
                assert torch.equal(tensor, found[0][name]), name


@pytest.mark.no_launch
def test_off_as_shipped():
    assert FUSED == {PRODUCT: {}, GRADIENT: {}}
    like = torch.empty(0, dtype=torch.float16, device=DEVICE)
    assert not is_on(PRODUCT, like, 2**20, 768, 3072, "gelu") and not is_on(GRADIENT, like, 2**20, 768, 3072, "gelu")


@pytest.mark.no_launch
def test_the_table_decides_by_size_and_rows(monkeypatch):
    like, other = (torch.empty(0, dtype=dtype, device=DEVICE) for dtype in (torch.float16, torch.float32))
    name = feed_forward_products.table_of(like)
    monkeypatch.setitem(FUSED[GRADIENT], name, {2: {(768, 3072): 2048}})
    assert [is_on(GRADIENT, like, rows, 768, 3072, "gelu") for rows in (0, 2047, 2048, 2**20)] == [False, False, True, True]
    assert not is_on(GRADIENT, like, 4096, 1024, 4096, "gelu") and not is_on(PRODUCT, like, 4096, 768, 3072, "gelu")
    assert not is_on(GRADIENT, other, 4096, 768, 3072, "gelu")


@pytest.mark.no_launch
@pytest.mark.parametrize("n_inner, n_cols", [(48, 64), (64, 48), (0, 64)])
def test_sizes_that_tiles_do_not_fill_are_never_on(n_inner, n_cols):
    like = torch.empty(0, dtype=torch.float16, device=DEVICE)
    with decided(*BOTH):
        assert is_on(PRODUCT, like, 100, 128, 256, "gelu") and not is_on(PRODUCT, like, 100, n_inner, n_cols, "gelu")


@pytest.mark.no_launch
@pytest.mark.parametrize("part", [PRODUCT, GRADIENT])
def test_tiles(part):
    """Powers of two that divide BERT's sizes, for 16-bit types only; float32 would be multiplied in TF32."""
    assert TABLES[part].keys() == {*ARCHITECTURES, "interpreter"}
    for architecture in ARCHITECTURES:
        assert TABLES[part][architecture].keys() == {2}
        for config in TABLES[part][architecture][2].values():
            sizes = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.num_warps)
            assert all(size & (size - 1) == 0 for size in sizes) and min(sizes[:3]) >= 16
            assert all(hidden % config.BLOCK_K == 0 and 4 * hidden % config.BLOCK_N == 0 for hidden in (384, 768, 1024))


@pytest.mark.no_launch
def test_entries_are_of_sizes_that_tiles_fill():
    for part, architectures in FUSED.items():
        for architecture, by_size in architectures.items():
            for itemsize, shapes in by_size.items():
                like = torch.empty(0, dtype={2: torch.bfloat16}[itemsize], device="meta")
                for n_inner, n_cols in shapes:
                    limits = TABLES[part][architecture][like.element_size()]
                    config = limits[next((limit for limit in limits if limit >= n_cols), max(limits))]
                    assert n_inner % config.BLOCK_K == 0 and n_cols % config.BLOCK_N == 0


def test_the_reference_is_stocks(launches):
    inputs = make_inputs(6, 16, 32, 16)
    h = inputs["x"] @ inputs["weight"].t() + inputs["bias"]
    expected = torch.nn.functional.gelu(h) @ inputs["output_weight"].t()
    torch.testing.assert_close(reference.feed_forward(**inputs), expected)
    torch.testing.assert_close(feed_forward(**inputs), expected)
    assert launches() == {AFTER[0]: 1}


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros((), device=DEVICE)}, "x: expected"),
        ({"weight": torch.zeros(32, 8, device=DEVICE)}, r"weight: expected \[F, 16\], got \(32, 8\)"),
        ({"output_weight": torch.zeros(16, 8, device=DEVICE)}, r"output_weight: expected \[O, 32\], got \(16, 8\)"),
        ({"bias": torch.zeros(16, device=DEVICE)}, r"bias: expected shape \(32,\), got \(16,\)"),
        ({"bias": torch.zeros(32, dtype=torch.float16, device=DEVICE)}, "bias: expected the dtype of x"),
        ({"activation": "tanh"}, "activation: expected one of"),
    ],
    ids=str,
)
def test_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        feed_forward(**(make_inputs(6, 16, 32, 16) | change))


@interpreted
@pytest.mark.parametrize("way", [BOTH, (False, False)], ids=["on", "off"])
def test_custom_ops(way, small_tiles):
    """The op as torch.compile sees it."""
    inputs = list(make_inputs(18, 16, 32, 16).values())
    leaves = [x.requires_grad_() for x in inputs]
    opcheck(torch.ops.fastbert.feed_forward, *leaves, "gelu", *way, True)
    x, weight, bias, output_weight = (x.detach() for x in leaves)
    h = x @ weight.t()
    arguments = torch.randn(18, 16, device=DEVICE), x, weight, bias, output_weight, h, "gelu", way[1]
    opcheck(torch.ops.fastbert.feed_forward_backward, *arguments, True, True, True)
