"""attention: every head size, length and dtype, unequal lengths, scales, and which gradients exist."""

import random

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.kernels.core.launch import INTERPRETED, recording
from fastbert.testing.attention import BACKWARD, FORWARD, check, make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from ..cases import DTYPES, dtype_name, subsets

HEAD_SIZES = (1, 8, 12, 16, 32, 40, 59, 64, 80, 96, 111, 128)
LENGTHS = (1, 2, 5, 17, 63, 64, 65, 97, 127, 128, 129, 257, 512, 513)
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


def right_padding(batch, length):
    """A mask whose first row is full, and each further row a third of the length shorter."""
    lengths = torch.tensor([max(2, length - i * (length // 3 + 1)) for i in range(batch)], device=DEVICE)
    return torch.arange(length, device=DEVICE) < lengths[:, None]


def matrix():
    """The full product of head sizes and lengths, with dtypes arranged so that each meets each of both; batch, heads, tiles and
    options are drawn. Lengths over 65 meet every fourth head size; the rest of the product is in the long run."""
    draw = random.Random("attention")
    parameters = []
    for i, head_size in enumerate(HEAD_SIZES):
        for j, length in enumerate(LENGTHS):
            for k, dtype in enumerate(DTYPES):
                options = ["plain", "plain", "causal", "padded", "dropped"]
                if length <= 17:
                    shapes, sides = [(1, 3), (3, 1), (2, 2)], [16, 32]
                elif length <= 129:
                    shapes, sides = [(1, 1), (1, 1), (1, 2), (2, 1)], [32, 64] if length <= 65 else [64, 128]
                else:
                    shapes, sides, options = [(1, 1)], [128, 256], options[:4]
                batch, heads = draw.choice(shapes)
                option, tile = draw.choice(options), (draw.choice(sides), draw.choice(sides))
                quick = (i + j + k) % 3 == 0 and (length <= 65 or (i - j) % 4 == 0)
                name = f"{length}x{head_size}-{dtype_name(dtype)}-{batch}x{heads}-{option}-{tile[0]}x{tile[1]}"
                parameters.append(
                    pytest.param(
                        *(batch, length, heads, head_size, dtype, option, tile),
                        id=name,
                        marks=[] if quick else [pytest.mark.long],
                    )
                )
    return parameters


@pytest.mark.parametrize("batch, length, heads, head_size, dtype, option, tile", matrix())
def test_matrix(batch, length, heads, head_size, dtype, option, tile):
    options = {
        "plain": {},
        "causal": {"causal": True},
        "padded": {"key_mask": right_padding(batch, length)},
        "dropped": {"p": 0.1},
    }[option]
    # With one key, q and k have no gradient: see test_one_key.
    frozen = ("q", "k") if length == 1 else ()
    with tiles(tile):
        results = check(make_inputs(batch, length, heads, head_size, dtype), frozen=frozen, **options)
    assert results["y"].shape == (batch, length, heads, head_size) and results["y"].is_contiguous()


@pytest.mark.parametrize("head_size", [129, 192, 256])
@pytest.mark.parametrize("length, dtype", [(5, DOUBLE), (65, SINGLE), (97, HALF)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_wide_heads(head_size, length, dtype, p):
    check(make_inputs(1, length, 1, head_size, dtype), p=p)


CROSS = [(1, 5), (1, 129), (1, 513), (2, 65), (5, 17), (17, 5), (63, 65), (64, 128), (97, 33), (128, 64), (129, 5)]
CROSS += [(257, 17), (33, 257), (513, 2)]


@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
@pytest.mark.parametrize("lengths", CROSS, ids=str)
def test_lengths_that_differ(lengths, option):
    """Causal aligns the last query with the last key, so with more queries than keys the first queries see none."""
    batch, dtype, head_size = 2 if max(lengths) < 65 else 1, DTYPES[sum(lengths) % 3], (8, 40, 64)[lengths[0] % 3]
    with tiles((64, 64) if max(lengths) > 65 else (16, 32)):
        check(make_inputs(batch, lengths, 1, head_size, dtype), causal=option == "causal", p=0.3 * (option == "dropped"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("length", [1, 33])
def test_one_key(length, dtype):
    """The key's weight is 1 whatever q and k are: out is v to the bit, and the gradients of q and k are exactly 0.

    Small whole numbers, so that no sum is rounded.
    """
    inputs = {name: torch.randint(-3, 4, (2, n, 2, 8)).to(DEVICE, dtype) for name, n in [("q", length), ("k", 1)]}
    inputs["v"] = torch.randint(-3, 4, (2, 1, 2, 8)).to(DEVICE, dtype)
    dy = torch.randint(-3, 4, (2, length, 2, 8)).to(DEVICE, dtype)
    results = run(attention, inputs, dy)
    assert torch.equal(results["y"], inputs["v"].expand_as(dy))
    assert not results["dq"].any() and not results["dk"].any()
    assert torch.equal(results["dv"], dy.sum(1, keepdim=True)) and results["dv"].any()


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.02, 0.0, 2.0, -0.3])
@pytest.mark.parametrize("option", ["plain", "causal"])
def test_scale(scale, option):
    """An explicit scale, in blocks with a mask and in blocks without."""
    with tiles((16, 16)):
        check(make_inputs(1, 37, 2, 24), scale=scale, causal=option == "causal")


@pytest.mark.parametrize("head_size", [16, 59])
def test_the_scale_by_default(head_size):
    inputs, dy = make_inputs(1, 17, 1, head_size), normal(1, 17, 1, head_size)
    assert_same(run(attention, inputs, dy), run(attention, inputs, dy, scale=head_size**-0.5))


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=dtype_name)
@pytest.mark.parametrize("of_values", [1e-4, 1e4])
@pytest.mark.parametrize("of_scores", [1e-4, 2.0])
def test_small_and_large_numbers(of_scores, of_values, dtype):
    inputs = make_inputs(1, 37, 2, 24, dtype, scale=of_scores)
    inputs["v"] = normal(1, 37, 2, 24, dtype=dtype) * of_values
    check(inputs, normal(1, 37, 2, 24, dtype=dtype) / of_values, p=0.1)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "causal"])
def test_scores_past_what_an_exponential_holds(masked, sign):
    """Scores of thousands would give inf / inf if the maximum were not subtracted. Each row has one weight left."""
    inputs = make_inputs(1, 64, 1, 16, scale=60.0)
    with tiles((32, 16)):
        check(inputs, frozen=("q", "k"), causal=masked, scale=sign, relative_fp32=None)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "causal"])
def test_a_top_score_that_grows_from_block_to_block(masked):
    """Each block of keys exceeds the one before by far, then each falls short of it: the sum is rescaled."""
    inputs = make_inputs(2, 96, 1, 16)
    ramp = torch.linspace(-8, 8, 96, device=DEVICE)[:, None, None]
    inputs["q"] = inputs["q"].abs()
    inputs["k"] = torch.stack([inputs["k"][0] + ramp, inputs["k"][1] - ramp])
    with tiles((32, 16)):
        check(inputs, causal=masked, relative_fp32=None)


@pytest.mark.parametrize("frozen", subsets(("q", "k", "v")), ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_frozen_inputs(frozen, p):
    """Each gradient is the same whichever others are asked for."""
    inputs, dy, seed = make_inputs(1, 33, 2, 16), normal(1, 33, 2, 16), seed_tensor(3)
    results = check(inputs, dy, frozen=frozen, p=p, seed=seed)
    everything = run(attention, inputs, dy, p=p, seed=seed)
    for name in ("q", "k", "v"):
        gradient = results["d" + name]
        assert gradient is None if name in frozen else torch.equal(gradient, everything["d" + name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_gradients(mode, p, launches):
    inputs = make_inputs(2, 33, 1, 16)
    trained = run(attention, inputs, None, p=p, seed=seed_tensor(5))["y"]
    with mode():
        y = attention(**inputs, p=p, seed=seed_tensor(5))
    assert not y.requires_grad and torch.equal(y, trained)
    assert launches() == {FORWARD: 2}


def test_gradients_accumulate(launches):
    leaves = {name: tensor.requires_grad_() for name, tensor in make_inputs(1, 17, 2, 16).items()}
    y = attention(**leaves)
    y.square().sum().backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    y.square().sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[name]) and leaf.grad.any(), name
    assert launches() == {FORWARD: 1} | {name: 2 for name in BACKWARD}


def test_q_k_and_v_may_be_one_tensor():
    x, dy = normal(1, 17, 2, 16).requires_grad_(), normal(1, 17, 2, 16)
    attention(x, x, x).backward(dy)
    apart = run(attention, {name: x.detach() for name in ("q", "k", "v")}, dy)
    torch.testing.assert_close(x.grad, apart["dq"] + apart["dk"] + apart["dv"])


@pytest.mark.no_launch
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "key_mask"])
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (0, 0, 0, 8)], ids=str)
def test_empty_inputs(shape, masked):
    key_mask = torch.ones(shape[:2], dtype=torch.bool, device=DEVICE) if masked else None
    check({name: torch.zeros(shape, device=DEVICE) for name in ("q", "k", "v")}, key_mask=key_mask)


@pytest.mark.no_launch
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"p": 0.5}], ids=str)
@pytest.mark.parametrize("lengths", [(5, 0), (0, 5)], ids=["no_keys", "no_queries"])
def test_nothing_on_one_side(lengths, options):
    """Without keys the output is 0, like a product with an empty matrix; without queries no key has a gradient."""
    inputs = make_inputs(2, lengths, 2, 8)
    seed = {"seed": seed_tensor(1)} if "p" in options else {}
    results = run(attention, inputs, torch.ones_like(inputs["q"]), **options, **seed)
    for name, of in (("y", "q"), ("dq", "q"), ("dk", "k"), ("dv", "v")):
        assert torch.equal(results[name], torch.zeros_like(inputs[of])), name


@pytest.mark.no_launch
@pytest.mark.parametrize("setting, precision", [(None, "ieee"), ("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_precision_of_float32_products_is_torchs(setting, precision):
    """Read at each launch, forward and backward. Triton's own default would be TF32."""
    seen, before = [], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting or before)
        with recording("sm_90", lambda kernel, programs, config, arguments: seen.append((kernel.__name__, arguments))):
            run(attention, make_inputs(1, 17, 1, 16), normal(1, 17, 1, 16))
    finally:
        torch.set_float32_matmul_precision(before)
    assert [name for name, _ in seen] == [FORWARD, *BACKWARD]
    products = [arguments["PRECISION"] for _, arguments in seen]
    assert products == [precision] * 3


@pytest.mark.no_launch
def test_the_precision_that_torch_backends_sets():
    before, seen = torch.backends.cuda.matmul.fp32_precision, []
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            with recording("sm_90", lambda kernel, programs, config, arguments: seen.append(arguments["PRECISION"])):
                attention(**make_inputs(1, 17, 1, 16))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == ["tf32", "ieee"]


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
@pytest.mark.parametrize(
    "dtype",
    [
        HALF,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason="wrong in Triton's interpreter"),
        ),
    ],
    ids=dtype_name,
)
def test_bfloat16_under_the_interpreter(dtype):
    """Pins the fault: if this passes, Triton is fixed, and bfloat16 belongs in the other tests."""
    check(make_inputs(1, 40, 2, 16, dtype))
