"""The one-kernel backward of short sequences: against eager, and against the kernels for any length."""

import pytest
import torch

from fastbert.kernels import attention as module
from fastbert.kernels.attention import attention
from fastbert.kernels.core.configs import LENGTHS
from fastbert.kernels.core.launch import choose_short, counts
from fastbert.testing.attention import (
    BACKWARD,
    FORWARD,
    SHORT,
    check,
    drawn_keep,
    make_inputs,
    normal,
    short_tiles,
    tiles,
)
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from .test_attention import right_padding
from .test_dropout import kept_by_gradients
from .test_layouts import every_second, head_size_first
from .test_packed import LENGTHS_Q, MIXED, bounds, other_rows, packed_inputs, packing

HALF = torch.float16
TILES = [(32, 32), (64, 32), (64, 64), (128, 32), (128, 64)]
OPTIONS = ("plain", "causal", "padded", "dropped")
SIZES = [(1, 16), (7, 64), (31, 8), (33, 59), (64, 40), (65, 64), (127, 1), (128, 64), (128, 24)]


def options_of(option, batch, length):
    return {
        "plain": {},
        "causal": {"causal": True},
        "padded": {"key_mask": right_padding(batch, length)},
        "dropped": {"p": 0.2},
    }[option]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("length, head_size", SIZES, ids=str)
def test_against_the_reference(length, head_size, option):
    frozen = ("q", "k") if length == 1 else ()
    check(make_inputs(2, length, 2, head_size, HALF), frozen=frozen, **options_of(option, 2, length))
    assert counts[SHORT[0]]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile, option):
    """Blocks of keys that are all seen, that are partly seen, and that extend past the end."""
    with short_tiles(tile):
        check(make_inputs(2, tile[0] - 5, 1, 24, HALF), **options_of(option, 2, tile[0] - 5))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("lengths", [(5, 17), (17, 5), (1, 128), (128, 64), (40, 97), (97, 40)], ids=str)
def test_lengths_that_differ(lengths, causal):
    """Causal with more queries than keys: the first queries see none and average all."""
    check(make_inputs(1, lengths, 2, 16, HALF), causal=causal, p=0.1)


MASKS = {
    "holes": lambda keys: keys % 3 != 1,
    "left": lambda keys: keys >= 40,
    "one": lambda keys: keys == 33,
    "first block": lambda keys: keys < 32,
    "none": lambda keys: keys < 0,
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_keys(mask, causal):
    """A masked sequence beside an unmasked one. A row that sees no key is the average of all, and so are its gradients."""
    keys = torch.arange(70, device=DEVICE)
    key_mask = torch.stack([MASKS[mask](keys), keys >= 0])
    with short_tiles((128, 32)):
        results = check(make_inputs(2, 70, 1, 16, HALF), key_mask=key_mask, causal=causal)
    if mask != "none" and not causal:
        hidden = ~key_mask[0]
        assert not results["dk"][0, hidden].any() and not results["dv"][0, hidden].any()


def test_masked_keys_do_not_matter_where_the_others_score_low():
    """The weight of a masked key, loaded as 0, overflows if a row's scores are all below -128: it is clamped to 1."""
    inputs = make_inputs(1, 40, 1, 16, HALF)
    inputs["q"] = inputs["q"].abs() + 2
    inputs["k"] = -inputs["k"].abs() - 2
    key_mask = torch.arange(40, device=DEVICE)[None] < 21
    results = check(inputs, key_mask=key_mask, scale=2.0, frozen=("q", "k"))
    assert results["y"].isfinite().all()
    gradients = run(attention, inputs, normal(1, 40, 1, 16, dtype=HALF), key_mask=key_mask, scale=2.0)
    assert all(x.isfinite().all() for x in gradients.values())


@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
@pytest.mark.parametrize("lengths", [MIXED, (1, 1, 1), (0, 0, 20, 0), (128, 3)], ids=str)
def test_packed(lengths, option):
    frozen = ("q", "k") if max(lengths) == 1 else ()
    options = {"causal": option == "causal", "p": 0.3 * (option == "dropped")}
    check(packed_inputs(lengths, HALF), frozen=frozen, **options, **packing(lengths))


def test_packed_queries_of_other_rows():
    inputs, how = other_rows(LENGTHS_Q, MIXED, HALF)
    check(inputs, p=0.3, **how)
    inputs, how = other_rows((3, 2), (0, 5), HALF)
    results = run(attention, inputs, normal(5, 2, 16, dtype=HALF), **how)
    assert not results["dq"][:3].any() and results["dk"].isfinite().all()
    inputs, how = other_rows((0, 2), (4, 5), HALF)
    results = run(attention, inputs, normal(2, 2, 16, dtype=HALF), **how)
    assert not results["dk"][:4].any() and not results["dv"][:4].any() and results["dk"][4:].any()


def test_the_longest_sequence_chooses_the_tile_and_not_the_result():
    inputs, dy = packed_inputs(MIXED, HALF), normal(sum(MIXED), 2, 16, dtype=HALF)
    expected = run(attention, inputs, dy, p=0.4, seed=seed_tensor(6), **packing(MIXED))
    for longest in (64, 128):
        results = run(attention, inputs, dy, p=0.4, seed=seed_tensor(6), cu_seqlens=bounds(MIXED), max_seqlen=longest)
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("tile", TILES[1:], ids=str)
@pytest.mark.parametrize("lengths", [(40, 40), (23, 41), (41, 23)], ids=str)
def test_the_forwards_dropout(lengths, tile):
    """Every gradient uses the same bits that the forward drew."""
    seed, p = seed_tensor(9), 0.3
    keep = drawn_keep(2, 2, *lengths, p, seed)
    with short_tiles(tile):
        for name, mask in kept_by_gradients(*lengths, p, seed, dtype=HALF).items():
            assert torch.equal(mask, keep), name
    assert counts[SHORT[0]]


def test_p_one_drops_everything():
    inputs, dy = make_inputs(2, 40, 2, 16, HALF), normal(2, 40, 2, 16, dtype=HALF)
    results = run(attention, inputs, dy, p=1.0)
    assert all(torch.equal(result, torch.zeros_like(result)) for result in results.values())


@pytest.mark.parametrize("layout", [every_second, head_size_first], ids=lambda f: f.__name__)
def test_layouts(layout):
    inputs, dy = make_inputs(2, 40, 2, 16, HALF), normal(2, 40, 2, 16, dtype=HALF)
    options = {"p": 0.2, "seed": seed_tensor(3)}
    strided = {name: layout(x) for name, x in inputs.items()}
    assert_same(run(attention, strided, layout(dy), **options), run(attention, inputs, dy, **options))


def test_the_same_bits_each_time():
    inputs, dy = make_inputs(2, 100, 2, 16, HALF), normal(2, 100, 2, 16, dtype=HALF)
    options = {"p": 0.2, "seed": seed_tensor(3), "key_mask": right_padding(2, 100)}
    assert_same(run(attention, inputs, dy, **options), run(attention, inputs, dy, **options))


@pytest.mark.parametrize("option", OPTIONS)
def test_as_the_kernels_of_any_length(option):
    inputs, dy = make_inputs(2, 100, 2, 16, HALF), normal(2, 100, 2, 16, dtype=HALF)
    options = options_of(option, 2, 100) | {"seed": seed_tensor(3)}
    one = run(attention, inputs, dy, **options)
    with tiles((64, 64)):
        two = run(attention, inputs, dy, **options)
    for name, result in one.items():
        torch.testing.assert_close(result, two[name], rtol=0, atol=4e-3)


GENERAL = {
    "longer": ((1, 129, 1, 16, HALF), {}),
    "longer keys": ((1, (5, 129), 1, 16, HALF), {}),
    "larger heads": ((1, 20, 1, 65, HALF), {}),
    "32 bits": ((1, 20, 1, 16, torch.float32), {}),
    "general mask": ((1, 20, 1, 16, HALF), {"mask": torch.ones(20, 20, dtype=torch.bool, device=DEVICE)}),
}


@pytest.mark.parametrize("call", GENERAL)
def test_other_calls_take_the_kernels_of_any_length(call, launches):
    shape, options = GENERAL[call]
    inputs = make_inputs(*shape)
    run(attention, inputs, torch.ones_like(inputs["q"]), **options)
    assert launches() == dict.fromkeys((FORWARD, *BACKWARD), 1)


def test_a_short_call_takes_one(launches):
    inputs = make_inputs(1, 128, 1, 64, HALF)
    run(attention, inputs, torch.ones_like(inputs["q"]))
    assert launches() == dict.fromkeys((FORWARD, *SHORT), 1)


@pytest.mark.no_launch
def test_each_length_has_a_tile_that_holds_it():
    like = torch.empty(0, dtype=HALF, device=DEVICE)
    for length in range(1, 129):
        config = choose_short("attention_backward_short", like, 64, length)
        assert min(limit for limit in LENGTHS if limit >= length) == config.BLOCK_M
    assert choose_short("attention_backward_short", like, 64, 129) is None
    assert choose_short("attention_backward_short", like, 65, 128) is None


@pytest.mark.parametrize("option", [*OPTIONS, "nothing seen"])
def test_sums_of_each_sequence(option):
    """dq and dv are summed before rounding; the sum of dk is written as 0, which it is except for rounding."""
    if option == "nothing seen":
        options = {"key_mask": torch.arange(2, device=DEVICE)[:, None].expand(2, 70) > 0}
    else:
        options = options_of(option, 2, 70)
    options = {"causal": False, "p": 0.0, "key_mask": None} | options
    key_mask = options.pop("key_mask")
    bounds_of = None if key_mask is None else module.bounds_of(key_mask)
    q, k, v = make_inputs(2, 70, 3, 24, HALF).values()
    dout, seed = normal(2, 70, 3, 24, dtype=HALF), seed_tensor(3) if options["p"] else None
    masks = key_mask, bounds_of, None, None, None, seed, None, None, options["causal"], 0.2, options["p"]
    inputs = module.Inputs(q, k, v, *masks)
    out, logsumexp = module.launch_forward(inputs)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    geometry = module.geometry_of(inputs)
    sums = torch.full((2, 3, 3, 24), torch.nan, device=DEVICE)
    strides = q.stride(1), k.stride(1)
    module.backward_short_work(geometry, q, dout.stride(), *strides, False).launch(
        q, q_ptr=q, k_ptr=k, v_ptr=v, dout_ptr=dout, key_mask_ptr=key_mask, key_bounds_ptr=bounds_of, cu_seqlens_q_ptr=None,
        cu_seqlens_k_ptr=None, out_ptr=out, logsumexp_ptr=logsumexp, seed_ptr=seed,
        **dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), grads, strict=True)), sums_ptr=sums,
    )  # fmt: skip
    found = torch.stack([grad.float().sum(1) for grad in grads], dim=1)
    torch.testing.assert_close(sums, found, rtol=0, atol=2e-2)
    assert not sums[:, 1].any() and sums[:, 0].any() and sums[:, 2].any()
