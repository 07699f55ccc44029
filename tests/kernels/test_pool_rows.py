"""pool_rows: sentence-transformers' numbers and the reference's, on packed rows, for every mode."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from fastbert.kernels import reference
from fastbert.kernels.core.launch import recording
from fastbert.kernels.pool_rows import MODES, pool_rows
from fastbert.testing.numerics import assert_close
from fastbert.testing.rows import DEVICE, double, run

from .attention.test_memory import fenced
from .layouts import LAYOUTS, contiguous, expanded, guarded, sliced, transposed
from .opchecking import opcheck
from .test_memory import guards_of, poisoned_outputs

DTYPES = [torch.float64, torch.float32, torch.float16]
KERNELS = {"pool_rows_fwd_kernel": 1, "pool_rows_bwd_kernel": 1}
STOCK = {"mean": "mean", "sqrt": "mean_sqrt_len_tokens", "weighted": "weightedmean", "max": "max"}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def places(tokens, spare=0):
    """Where the true positions of tokens [B, S] stand once packed, with a sequence of spare rows behind them."""
    rows = tokens.cpu().flatten().nonzero().squeeze(1)
    index = torch.cat([rows, torch.full((spare,), -1)])
    bounds = [0, *tokens.cpu().sum(1).cumsum(0).tolist(), *[len(index)] * bool(spare)]
    return {
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
        "n_sequences": tokens.shape[0],
        "seqlen": tokens.shape[1],
        "index": index.to(DEVICE, torch.int32),
    }


def of_lengths(lengths, seqlen):
    return torch.arange(seqlen) < torch.tensor(lengths)[:, None]


def all_rows(batch, seqlen):
    bounds = torch.arange(0, batch * seqlen + 1, seqlen) if seqlen else torch.zeros(batch + 1)
    return {"cu_seqlens": bounds.to(DEVICE, torch.int32), "n_sequences": batch, "seqlen": seqlen, "index": None}


def check(x, mode, options, dy=None):
    """Values and gradient against the reference, which is exact for max."""
    dy = torch.randn(options["n_sequences"], x.shape[1], dtype=torch.float64).to(x) if dy is None else dy
    results = run(pool_rows, {"x": x}, dy, mode=mode, **options)
    eager = run(reference.pool_rows, {"x": x}, dy, mode=mode, **options)
    exact = run(reference.pool_rows, double({"x": x}), dy.double(), mode=mode, **options)
    if mode == "max":
        assert all(torch.equal(results[name], eager[name]) for name in eager)
    else:
        assert_close(results, eager, exact, relative_fp32=None if x.dtype.itemsize == 2 else 1e-5)
    y = results["y"]
    assert y.is_contiguous() and y.shape == dy.shape and y.dtype == x.dtype and results["dx"].dtype == x.dtype
    return results


def rows(n, width, dtype=torch.float32):
    return torch.randn(n, width, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 37, 768, 1500])
@EVERY_MODE
def test_against_the_reference(mode, width, dtype, masked, launches):
    """A sequence of several blocks, one without a row, one of one row; and spare rows."""
    options = places(of_lengths((150, 3, 0, 33, 1), 150), spare=5)
    options["mask"] = torch.rand(5, 150, device=DEVICE) < 0.6 if masked else None
    results = check(rows(192, width, dtype), mode, options)
    assert launches() == KERNELS
    assert not results["dx"][-5:].any()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("seqlen", [1, 31, 129])
@EVERY_MODE
def test_every_position_of_the_batch(mode, seqlen, masked, launches):
    options = all_rows(3, seqlen)
    options["mask"] = torch.rand(3, seqlen, device=DEVICE) < 0.6 if masked else None
    check(rows(3 * seqlen, 40), mode, options)
    assert launches() == KERNELS


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("seqlen", [128, 300])
@EVERY_MODE
def test_few_and_many_sequences_short_and_long(mode, seqlen, batch):
    """Tiles of all three tables."""
    check(rows(batch * seqlen, 300), mode, all_rows(batch, seqlen))


def tokens_of(side):
    real = of_lengths((9, 3, 7, 5), 9)
    return {"right": real, "left": real.flip(1), "between": real & (torch.arange(9) % 3 != 1)}[side]


@pytest.mark.parametrize("side", ["right", "left", "between"])
@EVERY_MODE
def test_padding_anywhere(mode, side):
    check(rows(int(tokens_of(side).sum()), 24), mode, places(tokens_of(side)))


@pytest.mark.parametrize("prompt", [0, 2], ids=["", "without a prompt"])
@pytest.mark.parametrize("side", ["right", "left", "between"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_MODE
def test_against_sentence_transformers(mode, dtype, side, prompt):
    """Its Pooling on the padded batch, forward and backward, with and without an excluded prompt."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tokens = tokens_of(side).to(DEVICE)
    padded = rows(36, 24, dtype).view(4, 9, 24)
    dy = rows(4, 24, dtype)

    def stock(x):
        features = {"token_embeddings": x.view(4, 9, 24), "attention_mask": tokens.long(), "prompt_length": prompt}
        return modules.Pooling(24, STOCK[mode], include_prompt=not prompt)(features)["sentence_embedding"]

    options = places(tokens)
    if prompt:  # the first tokens, wherever they are
        left = modules.Pooling._exclude_prompt_from_mask(tokens.long(), prompt)
        options["mask"] = left.bool()
    index = options["index"].long()
    ours = run(lambda x: pool_rows(x[index], mode=mode, **options), {"x": padded.view(36, 24)}, dy)
    eager, exact = run(stock, {"x": padded.view(36, 24)}, dy), run(stock, double({"x": padded.view(36, 24)}), dy.double())
    assert_close(ours, eager, exact, relative_fp32=None if dtype == torch.float16 else 1e-5)
    assert ours["y"].dtype == eager["y"].dtype


def test_sums_are_float32():
    """Each of the sums that a program holds is over 65504, the largest number of float16."""
    y = pool_rows(torch.full((8192, 3), 16000.0, dtype=torch.float16, device=DEVICE), mode="mean", **all_rows(1, 8192))
    assert y.tolist() == [[16000.0] * 3]


@EVERY_MODE
def test_by_hand(mode):
    x = torch.tensor([[1.0], [5.0], [3.0], [7.0]], device=DEVICE)
    mask = torch.tensor([[False, True, True, True]], device=DEVICE)
    expected = {"mean": 5.0, "sqrt": 15.0 / 3.0**0.5, "weighted": (2 * 5 + 3 * 3 + 4 * 7) / 9, "max": 7.0}
    y = pool_rows(x, mode=mode, **all_rows(1, 4), mask=mask)
    assert y.item() == pytest.approx(expected[mode], rel=1e-6)


@EVERY_MODE
def test_positions_count_from_the_first_token(mode):
    """Padding on the left or on the right changes nothing, also if a prompt is excluded."""
    real = of_lengths((5, 2, 7), 7)
    x, found = rows(14, 8), []
    for tokens in (real, real.flip(1)):
        options = places(tokens)
        first = tokens.int().argmax(1, keepdim=True)
        options["mask"] = (torch.arange(7) > first).to(DEVICE)
        found.append(pool_rows(x, mode=mode, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("dy_layout", LAYOUTS, ids=lambda f: "dy_" + f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@EVERY_MODE
def test_layouts(mode, layout, dy_layout):
    options = places(of_lengths((9, 4, 6), 9))
    options["mask"] = (torch.rand(9, 3, device=DEVICE) < 0.7).t()
    check(layout(rows(19, 24)), mode, options, dy_layout(rows(3, 24)))


@EVERY_MODE
def test_rows_that_do_not_count_are_not_read_and_get_no_gradient(mode):
    tokens = of_lengths((9, 4, 6), 9)
    options = places(tokens, spare=3)
    options["mask"] = (torch.arange(9) % 2 == 1).expand(3, 9).to(DEVICE)
    counts = torch.cat([options["mask"][tokens], torch.zeros(3, dtype=torch.bool, device=DEVICE)])
    x = rows(22, 16)
    x[~counts] = torch.nan
    results = run(pool_rows, {"x": guarded(x)}, rows(3, 16), mode=mode, **options)
    assert results["y"].isfinite().all() and results["dx"].isfinite().all() and not results["dx"][~counts].any()


@EVERY_MODE
def test_no_row_counts(mode):
    """Zeros, where sentence-transformers divides by 1e-9; -inf for max. No gradient."""
    options = all_rows(2, 5)
    options["mask"] = torch.tensor([[True] * 5, [False] * 5], device=DEVICE)
    results = run(pool_rows, {"x": rows(10, 16)}, rows(2, 16), mode=mode, **options)
    assert (results["y"][1] == (-torch.inf if mode == "max" else 0.0)).all() and results["y"][0].isfinite().all()
    assert results["dx"][:5].any() and not results["dx"][5:].any()


@EVERY_MODE
def test_later_sequences_are_ignored(mode):
    """n_sequences ends before a sequence with rows of its own."""
    options = places(of_lengths((4, 6, 9), 9))
    options["n_sequences"] = 2
    x = rows(19, 16)
    x[10:] = torch.nan
    results = check(x, mode, options)
    assert results["y"].isfinite().all() and not results["dx"][10:].any()


def test_the_first_of_equals_gets_the_gradient_of_max():
    x = torch.zeros(140, 3, device=DEVICE)
    x[[7, 100], 0], x[[40, 41], 1], x[:, 2] = 1.0, 2.0, -torch.inf
    dy = torch.tensor([[3.0, 4.0, 5.0]], device=DEVICE)
    results = run(pool_rows, {"x": x}, dy, mode="max", **all_rows(1, 140))
    expected = torch.zeros_like(x)
    expected[7, 0], expected[40, 1], expected[0, 2] = 3.0, 4.0, 5.0
    assert torch.equal(results["dx"], expected)
    assert results["y"].tolist() == [[1.0, 2.0, -torch.inf]]


@pytest.mark.parametrize("row", [0, 5, 77])
def test_nan_is_larger_than_any_number(row):
    """As in torch.max; the first NaN gets the gradient."""
    x = rows(80, 3)
    x[row, 0], x[79, 0], x[2, 0], x[row, 1] = torch.nan, torch.nan, torch.inf, torch.inf
    results = check_equal_nan(x)
    assert results["y"][0].isnan().tolist() == [True, False, False] and results["dx"][row, 0] == 1


def check_equal_nan(x):
    ones = torch.ones(1, x.shape[1], device=DEVICE)
    results = run(pool_rows, {"x": x}, ones, mode="max", **all_rows(1, len(x)))
    torch.testing.assert_close(results["y"], x.max(0, keepdim=True).values, rtol=0, atol=0, equal_nan=True)
    return results


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@EVERY_MODE
def test_a_bad_row_stays_in_its_sequence(mode, bad):
    options, x, dy = places(of_lengths((9, 4, 6), 9)), rows(19, 16), rows(3, 16)
    before = run(pool_rows, {"x": x}, dy, mode=mode, **options)
    x[10, 3], dy[1, 5] = bad, bad
    after = run(pool_rows, {"x": x}, dy, mode=mode, **options)
    assert not after["y"][1, 3].isfinite()
    assert torch.equal(after["y"][[0, 2]], before["y"][[0, 2]])
    others = [*range(9), *range(13, 19)]
    assert torch.equal(after["dx"][others], before["dx"][others])


@pytest.mark.no_launch
@pytest.mark.parametrize("batch, seqlen, width", [(0, 5, 8), (3, 5, 0)])
@EVERY_MODE
def test_empty(mode, batch, seqlen, width):
    results = run(pool_rows, {"x": rows(batch * seqlen, width)}, rows(batch, width), mode=mode, **all_rows(batch, seqlen))
    assert results["y"].shape == (batch, width) and results["dx"].shape == (batch * seqlen, width)


@EVERY_MODE
def test_sequences_without_rows(mode):
    for options in (all_rows(3, 0), places(of_lengths((0, 0, 0), 4)), places(of_lengths((0, 0, 0), 4), spare=2)):
        n = 0 if options["index"] is None else len(options["index"])
        results = run(pool_rows, {"x": rows(n, 8)}, rows(3, 8), mode=mode, **options)
        assert (results["y"] == (-torch.inf if mode == "max" else 0.0)).all() and not results["dx"].any()


@EVERY_MODE
def test_no_sequences_but_spare_rows(mode):
    options = places(of_lengths((), 4).view(0, 4), spare=3)
    results = run(pool_rows, {"x": rows(3, 8)}, rows(0, 8), mode=mode, **options)
    assert results["y"].shape == (0, 8) and not results["dx"].any() and results["dx"].shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@EVERY_MODE
def test_reads_and_writes_stay_inside(mode, dtype, monkeypatch):
    """Inputs between bands of NaN, indices between bands of other legal ones; outputs that start as NaN in such bands."""
    options = places(of_lengths((40, 3, 0, 33), 40), spare=2)
    options["mask"] = torch.rand(4, 40, device=DEVICE) < 0.8
    options["mask"][:2, 0] = True
    options["mask"][3, 0] = True
    x, dy = rows(78, 37, dtype), rows(4, 37, dtype)
    plain = run(pool_rows, {"x": x}, dy, mode=mode, **options)
    options |= {"index": fenced(options["index"], 0), "mask": fenced(options["mask"], 1)}
    with poisoned_outputs(monkeypatch) as given:
        results = run(pool_rows, {"x": guarded(x)}, guarded(dy), mode=mode, **options)
    assert len(given) == (2 if mode == "max" else 3)
    for name, result in results.items():
        assert torch.equal(result, plain[name]), name
    for tensor in given:
        assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"
        assert not tensor.isnan().any()


@pytest.mark.parametrize("layout", [contiguous, sliced, expanded], ids=lambda f: f.__name__)
@EVERY_MODE
def test_no_input_is_overwritten_and_bits_repeat(mode, layout):
    options = places(of_lengths((40, 3, 33), 40), spare=2)
    options["mask"] = torch.rand(3, 40, device=DEVICE) < 0.8
    x, dy = layout(rows(78, 24)), layout(rows(3, 24))
    read = {"x": x, "dy": dy, **{name: value for name, value in options.items() if isinstance(value, torch.Tensor)}}
    before = {name: tensor.clone() for name, tensor in read.items()}
    first, second = (run(pool_rows, {"x": x}, dy, mode=mode, **options) for _ in range(2))
    assert all(torch.equal(read[name], before[name]) for name in read)
    assert all(torch.equal(first[name], second[name]) for name in first)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*read.values(), *first.values())]
    assert len(set(storages)) == len(storages)


@EVERY_MODE
def test_a_sequence_is_pooled_alike_in_any_batch(mode):
    """Padding and neighbours do not change its bits."""
    parts = [rows(n, 40) for n in (40, 3, 33)]
    together = pool_rows(torch.cat(parts), mode=mode, **places(of_lengths((40, 3, 33), 40)))
    padded = pad_sequence(parts, batch_first=True).flatten(0, 1)
    mask = of_lengths((40, 3, 33), 40).to(DEVICE)
    assert torch.equal(pool_rows(padded, mode=mode, **all_rows(3, 40), mask=mask), together)
    for part, y in zip(parts, together, strict=True):
        assert torch.equal(pool_rows(part, mode=mode, **all_rows(1, len(part)))[0], y)


@EVERY_MODE
def test_gradcheck(mode):
    options = places(of_lengths((4, 0, 3), 4), spare=1)
    options["mask"] = torch.tensor([[False, True, True, True]] * 3, device=DEVICE)
    x = rows(8, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool_rows(x, mode=mode, **options)[[0, 2]], x, nondet_tol=0.0)


@EVERY_MODE
def test_a_second_derivative_raises(mode):
    x = rows(6, 4).requires_grad_()
    (dx,) = torch.autograd.grad(pool_rows(x, mode=mode, **all_rows(2, 3)).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("layout", [contiguous, sliced, expanded, transposed], ids=lambda f: f.__name__)
@EVERY_MODE
def test_opcheck(mode, layout):
    options = places(of_lengths((4, 3), 4), spare=1)
    mask = torch.rand(2, 4, device=DEVICE) < 0.7
    arguments = options["cu_seqlens"], options["index"], mask, mode, 2, 4
    opcheck(torch.ops.fastbert.pool_rows, layout(rows(8, 12)).requires_grad_(), *arguments, True)
    opcheck(torch.ops.fastbert.pool_rows, layout(rows(8, 12)), *arguments, False)


@EVERY_MODE
def test_opcheck_of_the_backward(mode):
    options = places(of_lengths((4, 3), 4), spare=1)
    kept = torch.zeros(2, 12, dtype=torch.int32, device=DEVICE) if mode == "max" else torch.rand(2, device=DEVICE)
    arguments = kept, options["cu_seqlens"], options["index"], None, mode, 8, 4
    opcheck(torch.ops.fastbert.pool_rows_backward, transposed(rows(2, 12)), *arguments)


@EVERY_MODE
def test_compiled(mode, launches):
    """One graph, whatever the number of rows, and the same bits."""
    torch._dynamo.reset()
    function = torch.compile(pool_rows, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((4, 3, 2), (7, 2, 5), (1, 9, 4)):
        options, dy = places(of_lengths(lengths, 9), spare=2), rows(3, 12)
        x = rows(sum(lengths) + 2, 12)
        results, eager = (run(f, {"x": x}, dy, mode=mode, **options) for f in (function, pool_rows))
        assert all(torch.equal(results[name], eager[name]) for name in eager)
        with torch.no_grad():
            assert torch.equal(function(x, mode=mode, **options), eager["y"])
    assert launches()["pool_rows_bwd_kernel"] == 6
    torch._dynamo.reset()


def recorded(batch, seqlen, width, mode="mean", save=True):
    """(programs, configuration, arguments) of each launch on an sm_90 with 132 SMs."""
    launched = []
    x = torch.empty(batch * seqlen, width, dtype=torch.bfloat16, device="meta", requires_grad=save)
    bounds = torch.empty(batch + 1, dtype=torch.int32, device="meta")
    with recording("sm_90", lambda kernel, *launch: launched.append(launch)):
        y = pool_rows(x, bounds, mode, n_sequences=batch, seqlen=seqlen)
        if save:
            y.backward(torch.empty_like(y))
    return launched


@pytest.mark.no_launch
@pytest.mark.parametrize("width, least", [(384, 24), (768, 48), (1024, 64)])
def test_one_long_sequence_is_read_by_many_multiprocessors(width, least):
    ((programs, config, _),) = recorded(1, 8192, width, save=False)
    assert programs >= least and config.BLOCK_M * config.BLOCK_N >= 16384


@pytest.mark.no_launch
def test_sizes_past_32_bits():
    """Three million tokens of BERT-base: more elements than int32 counts."""
    (forward, _, _), (backward, config, arguments) = recorded(6_000, 500, 768)
    assert forward >= 6_000 and arguments["n_rows"] == 3_000_000
    assert backward * config.BLOCK_M * config.BLOCK_N >= 3_000_000 * 768


@pytest.mark.no_launch
def test_nothing_is_kept_without_a_backward():
    for mode in MODES:
        ((_, _, arguments),) = recorded(2, 5, 24, mode, save=False)
        assert arguments["kept_ptr"] is None
        _, (_, _, arguments) = recorded(2, 5, 24, mode)
        assert arguments["kept_ptr"].shape == ((2, 24) if mode == "max" else (2,))


@pytest.mark.no_launch
@pytest.mark.parametrize(
    "argument, change",
    [
        ("x", {"x": torch.zeros(6)}),
        ("x", {"x": torch.zeros(6, 4, dtype=torch.int64)}),
        ("x", {"index": None, "x": torch.zeros(5, 4)}),
        ("mode", {"mode": "median"}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3, dtype=torch.int64)}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(2, dtype=torch.int32)}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3, 1, dtype=torch.int32)}),
        ("index", {"index": torch.zeros(6, dtype=torch.int64)}),
        ("index", {"index": torch.zeros(5, dtype=torch.int32)}),
        ("mask", {"mask": torch.zeros(2, 3)}),
        ("mask", {"mask": torch.zeros(3, 3, dtype=torch.bool)}),
    ],
    ids=str,
)
def test_wrong_arguments(argument, change):
    right = {
        "x": torch.zeros(6, 4),
        "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
        "index": torch.arange(6, dtype=torch.int32),
    }
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (right | {"mode": "mean"} | change).items()}
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        pool_rows(**given, n_sequences=2, seqlen=3)
