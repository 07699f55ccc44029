"""Packed rows: concatenated sequences, delimited by cu_seqlens, each attended to as if it were alone."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.attention import attention
from fastbert.testing.attention import check, normal, tiles
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from ..cases import DTYPES, dtype_name
from .test_layouts import every_second, head_size_first, heads_first

pytestmark = pytest.mark.one_in(2)

HEADS, HEAD_SIZE = 2, 16
MIXED = (5, 0, 33, 1, 18)  # with tiles of 16: three blocks, two, one, none
LENGTHS = {"mixed": MIXED, "one": (37,), "ones": (1, 1, 1), "empty ends": (0, 0, 20, 0), "alike": (16, 16), "nothing": (0, 0)}


def bounds(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


def packed_inputs(lengths, dtype=torch.float32):
    return {name: normal(sum(lengths), HEADS, HEAD_SIZE, dtype=dtype) for name in ("q", "k", "v")}


def packing(lengths):
    return {"cu_seqlens": bounds(lengths), "max_seqlen": max(lengths)}


def padded(rows, lengths, length, filler=0.0):
    """The rows of the sequences as a padded [sequences, length, heads, head size]."""
    batch = rows.new_full((len(lengths), length, *rows.shape[1:]), filler)
    batch[present(lengths, length)] = rows
    return batch


def present(lengths, length):
    return torch.arange(length, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
@pytest.mark.parametrize(
    "lengths", [pytest.param(v, id=k, marks=[pytest.mark.no_launch] if not sum(v) else []) for k, v in LENGTHS.items()]
)
def test_against_the_reference(lengths, option):
    inputs = packed_inputs(lengths)
    # With one key q and k have no gradient: all there is of it is rounding.
    frozen = ("q", "k") if max(lengths) == 1 else ()
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        results = check(inputs, frozen=frozen, causal=option == "causal", p=0.3 * (option == "dropped"), **packing(lengths))
    assert results["y"].shape == inputs["q"].shape and results["y"].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("head_size", [1, 40, 64])
def test_dtypes_and_head_sizes(head_size, dtype):
    inputs = {name: normal(41, 1, head_size, dtype=dtype) for name in ("q", "k", "v")}
    check(inputs, causal=head_size == 40, scale=0.2, **packing((34, 2, 5)))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_the_same_bits_as_padded(dtype, causal, p):
    """The bits of a padded batch's rows, forward and backward, with the dropout of those rows."""
    inputs, dy = packed_inputs(MIXED, dtype), normal(sum(MIXED), HEADS, HEAD_SIZE, dtype=dtype)
    here, options = present(MIXED, 33), {"causal": causal, "p": p, "seed": seed_tensor(6)}
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        results = run(attention, inputs, dy, **packing(MIXED), **options)
        batch = {name: padded(x, MIXED, 33) for name, x in inputs.items()}
        others = run(attention, batch, padded(dy, MIXED, 33), key_mask=here, **options)
    assert_same(results, {name: x[here] for name, x in others.items()})
    assert not p or not torch.equal(results["y"], run(attention, inputs, None, **packing(MIXED), causal=causal)["y"])


@pytest.mark.parametrize("longest", [34, 64, 200])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_max_seqlen_may_be_larger_than_any_sequence(p, longest):
    inputs, dy, options = packed_inputs(MIXED), normal(sum(MIXED), HEADS, HEAD_SIZE), {"p": p, "seed": seed_tensor(6)}
    with tiles((32, 32)):
        expected = run(attention, inputs, dy, **packing(MIXED), **options)
        results = run(attention, inputs, dy, **packing(MIXED) | {"max_seqlen": longest}, **options)
    assert_same(results, expected)


def test_one_sequence_is_a_batch_of_one():
    inputs, dy, options = packed_inputs((37,)), normal(37, HEADS, HEAD_SIZE), {"p": 0.3, "seed": seed_tensor(1)}
    results = run(attention, inputs, dy, **packing((37,)), **options)
    batch = run(attention, {name: x[None] for name, x in inputs.items()}, dy[None], **options)
    assert_same(results, {name: x[0] for name, x in batch.items()})


def test_sequences_do_not_see_each_other():
    """Whatever the others contain: a NaN in one changes no bit of the next."""
    inputs, dy = packed_inputs(MIXED), normal(sum(MIXED), HEADS, HEAD_SIZE)
    starts = bounds(MIXED).tolist()
    mine = slice(starts[2], starts[3])
    with tiles((16, 16)):
        alone = run(attention, {name: x[mine] for name, x in inputs.items()}, dy[mine], **packing((33,)))
        for tensor in (*inputs.values(), dy):
            tensor[: mine.start] = torch.nan
            tensor[mine.stop :] = torch.nan
        together = run(attention, inputs, dy, **packing(MIXED))
    assert_same({name: x[mine] for name, x in together.items()}, alone)


def test_the_order_of_sequences():
    order = (2, 4, 0, 3, 1)
    inputs, dy = packed_inputs(MIXED), normal(sum(MIXED), HEADS, HEAD_SIZE)
    index = torch.cat([torch.arange(sum(MIXED))[sum(MIXED[:i]) : sum(MIXED[: i + 1])] for i in order]).to(DEVICE)
    with tiles((16, 32)):
        expected = run(attention, inputs, dy, **packing(MIXED), causal=True)
        moved = {name: x[index] for name, x in inputs.items()}
        results = run(attention, moved, dy[index], **packing([MIXED[i] for i in order]), causal=True)
    assert_same(results, {name: x[index] for name, x in expected.items()})


@pytest.mark.parametrize("layout", [every_second, head_size_first, heads_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_layouts(layout, causal):
    def laid_out(x):
        return layout(x[None])[0]

    inputs, dy = packed_inputs((5, 19)), normal(24, HEADS, HEAD_SIZE)
    strided = {name: laid_out(x) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    with tiles((16, 16)):
        results = check(strided, laid_out(dy), causal=causal, **packing((5, 19)))
        assert_same(results, run(attention, inputs, dy, causal=causal, **packing((5, 19))))


def test_views_of_one_product():
    """[T, 3, heads, head size], unbound, as the projection returns it; the gradient is one such buffer, not a copy."""
    product, dy = normal(24, 3, HEADS, HEAD_SIZE), normal(24, HEADS, HEAD_SIZE)
    results = check(dict(zip("qkv", product.unbind(1), strict=True)), dy, **packing((5, 19)))
    gradients = [results[name] for name in ("dq", "dk", "dv")]
    for i, gradient in enumerate(gradients):
        assert gradient.stride() == (3 * HEADS * HEAD_SIZE, HEAD_SIZE, 1)
        assert gradient.storage_offset() == i * HEADS * HEAD_SIZE
    product.requires_grad_()
    attention(*product.unbind(1), **packing((5, 19))).backward(dy)
    assert torch.equal(product.grad, torch.stack(gradients, dim=1))


def test_gradient_of_a_sum():
    check(packed_inputs((5, 19)), torch.ones((), device=DEVICE).expand(24, HEADS, HEAD_SIZE), **packing((5, 19)))


def test_cu_seqlens_of_any_stride():
    inputs, lengths = packed_inputs(MIXED), packing(MIXED)
    spread = torch.full((12,), -99, dtype=torch.int32, device=DEVICE)[::2].copy_(lengths["cu_seqlens"])
    assert not spread.is_contiguous()
    plain = run(attention, inputs, None, **lengths)
    assert_same(run(attention, inputs, None, **lengths | {"cu_seqlens": spread}), plain)


def test_rows_around_the_sequences_are_not_read():
    """The first sequence may start after row 0 and the last end before row T, in a buffer longer than its contents."""
    inputs, dy = packed_inputs((5, 19)), normal(24, HEADS, HEAD_SIZE)
    expected = run(attention, inputs, dy, **packing((5, 19)))
    around = {name: torch.cat([x.new_full((3, *x.shape[1:]), torch.nan), x, x.new_full((4, *x.shape[1:]), torch.nan)])
              for name, x in (inputs | {"dy": dy}).items()}  # fmt: skip
    dy = around.pop("dy")
    results = run(attention, around, dy, cu_seqlens=bounds((5, 19)) + 3, max_seqlen=19)
    assert_same({name: x[3:-4] for name, x in results.items()}, expected)


LENGTHS_Q = (1, 0, 20, 17, 3)  # for MIXED's sequences: one without keys has no queries here


def other_rows(lengths_q, lengths, dtype=torch.float32):
    """Queries of their own with packed keys, and the packing of both."""
    inputs = packed_inputs(lengths, dtype) | {"q": normal(sum(lengths_q), HEADS, HEAD_SIZE, dtype=dtype)}
    return inputs, packing(lengths) | {"cu_seqlens_q": bounds(lengths_q), "max_seqlen_q": max(lengths_q)}


@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
@pytest.mark.parametrize("lengths_q", [LENGTHS_Q, (1,) * 5, (0, 0, 2, 0, 0)], ids=["mixed", "first rows", "few"])
def test_queries_of_other_rows(lengths_q, option):
    """As many queries as are read of each sequence; causal aligns the last of them with the sequence's last key."""
    lengths = tuple(max(n, 1) for n in MIXED) if lengths_q[1] else MIXED
    causal = option == "causal"
    if causal:
        lengths_q = tuple(min(n, m) for n, m in zip(lengths_q, lengths, strict=True))
    inputs, how = other_rows(lengths_q, lengths)
    with tiles((16, 16), kv=(32, 16), q=(16, 32)):
        check(inputs, causal=causal, p=0.3 * (option == "dropped"), **how)


def test_queries_that_are_some_rows_give_the_bits_of_those_rows():
    inputs = packed_inputs(MIXED)
    rows = torch.tensor([0, 4, 5, 30, 37, 38, 56], device=DEVICE)  # of sequences 0, 0, 2, 2, 2, 3, 4
    lengths_q = (2, 0, 3, 1, 1)
    with tiles((16, 16)):
        every = run(attention, inputs, None, **packing(MIXED))["y"]
        how = packing(MIXED) | {"cu_seqlens_q": bounds(lengths_q), "max_seqlen_q": 3}
        some = run(attention, inputs | {"q": inputs["q"][rows]}, None, **how)["y"]
    assert torch.equal(some, every[rows])


def test_queries_of_a_sequence_without_keys_are_zero():
    """An empty sum is zero, and such queries have no gradient."""
    inputs, how = other_rows((3, 2), (0, 5))
    results = run(attention, inputs, normal(5, HEADS, HEAD_SIZE), **how)
    assert not results["y"][:3].any() and not results["dq"][:3].any() and results["dk"].isfinite().all()
    alone = run(attention, {n: x[3:] if n == "q" else x for n, x in inputs.items()}, None, **packing((5,)) | {
        "cu_seqlens_q": bounds((2,)), "max_seqlen_q": 2})  # fmt: skip
    assert torch.equal(results["y"][3:], alone["y"])


def test_the_reference_is_attention_sequence_by_sequence():
    """Checks the specification itself, against its padded form."""
    inputs = packed_inputs(MIXED, torch.float64)
    batch = {name: padded(x, MIXED, 33) for name, x in inputs.items()}
    here = present(MIXED, 33)
    packed = reference.attention(**inputs, **packing(MIXED))
    torch.testing.assert_close(packed, reference.attention(**batch, key_mask=here)[here])
    assert run(attention, inputs, None, **packing(MIXED))["y"].shape == packed.shape
