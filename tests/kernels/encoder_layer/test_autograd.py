"""A layer's autograd function: what it saves, what it leaves alone, and what happens when it runs again."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastbert.kernels.core.launch import counts
from fastbert.kernels.encoder_layer import Settings, encoder_layer
from fastbert.testing.encoder_layer import NAMES, flat, make_inputs, seeds
from fastbert.testing.rows import DEVICE, assert_same, run

DROPPED = Settings(3, attention_p=0.2, attention_output_p=0.3, output_p=0.4)
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.bool, device=DEVICE)
READ = {"cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE), "max_seqlen": 6}
INDEX = torch.tensor([8, -1, 4], dtype=torch.int32, device=DEVICE)
CAUSAL_READ = READ | {"index": INDEX, "inverse": torch.tensor([-1] * 4 + [2] + [-1] * 3 + [0, -1]).to(INDEX)}
READ |= {"cu_seqlens_q": torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE), "max_seqlen_q": 2}
CALLS = {
    "padded": ((2, 5, 24), None, {"settings": DROPPED, "key_mask": MASK}),
    "plain": ((2, 5, 24), None, {"settings": Settings(3)}),
    "read": ((10, 24), 3, {"settings": DROPPED, **READ}),
    "read anywhere": ((10, 24), None, {"settings": DROPPED._replace(causal=True), **CAUSAL_READ}),
    "mixed": ((2, 5, 24), None, {"settings": Settings(3), "product_dtype": torch.float16, "norm_dtype": torch.float32}),
    "mixed and dropped": ((2, 5, 24), None, {"settings": DROPPED, "product_dtype": torch.float16}),
}
each_call = pytest.mark.parametrize("call", CALLS)


def made(call):
    """Inputs, which require a gradient unless they are None, and options."""
    shape, queries, options = CALLS[call]
    inputs = make_inputs(shape, 96, queries=queries)
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}, dict(options)


def leaves_of(inputs):
    return [x for x in inputs.values() if x is not None]


def bitwise(found, others):
    assert len(found) == len(others)
    for a, b in zip(found, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


@contextmanager
def saving():
    """The tensors that autograd is given to save."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        yield saved


@each_call
def test_two_backwards_are_bitwise_one_and_write_over_nothing(call):
    inputs, options = made(call)
    with saving() as saved:
        y = flat(encoder_layer)(**inputs, **options)
    dy = torch.randn_like(y)
    kept = [*saved, *leaves_of(inputs), y.detach(), dy]
    before = [x.detach().clone() for x in kept]
    first = torch.autograd.grad(y, leaves_of(inputs), dy, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(y, leaves_of(inputs), dy)
    bitwise(second, copies)
    bitwise(first, copies)
    bitwise([x.detach() for x in kept], before)


@each_call
def test_what_is_kept(call):
    """With F = 4 H, 11 T H elements. The activation's output would be 4 more, the first LayerNorm's one more."""
    inputs, options = made(call)
    with saving() as saved:
        y = flat(encoder_layer)(**inputs, **options)
    given = {x.untyped_storage().data_ptr() for x in leaves_of(inputs)}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    found = sum(size for address, size in storages.items() if address not in given)
    rows, hidden, n = inputs["x"].numel() // 24, 24, y.numel() // 24
    low = options.get("product_dtype") or torch.float32
    is_cast = low != torch.float32
    keys = rows * (3 if inputs["queries"] is None else 2) + (0 if inputs["queries"] is None else n)
    elements = keys + n + 4 * n  # projections, attention's output, and the activation's input
    anywhere = "index" in options
    elements += rows if anywhere else 0  # attention's whole output, of which only some rows are read
    copies = (rows + (0 if inputs["queries"] is None else n)) if is_cast else 0
    expected = (elements + copies) * hidden * low.itemsize
    expected += 2 * n * hidden * 4  # both LayerNorms' inputs, in x's dtype or that of the first LayerNorm's result
    statistics = 4 * n + (1 if is_cast else 2) * 3 * (rows if anywhere else n)
    expected += statistics * 4
    weights = 3 * hidden * hidden + 3 * hidden
    weights += (hidden * hidden + 2 * 96 * hidden) if is_cast else 0
    expected += weights * low.itemsize
    expected += 6 * 8 if options["settings"].drops else 0
    room_for_alignment = 7 * 16
    assert expected <= found <= expected + room_for_alignment
    if call == "plain":
        assert elements + 2 * n + rows == 11 * rows


def test_no_gradient_arrives():
    """For an output that nobody used, nothing is computed and no zeros are returned."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, _):
            return None

    inputs, options = made("padded")
    y = flat(encoder_layer)(**inputs, **options)
    before = counts.copy()
    assert torch.autograd.grad(Nothing.apply(y), leaves_of(inputs), allow_unused=True) == (None,) * 17
    assert counts == before


@each_call
def test_a_second_derivative_raises(call):
    inputs, options = made(call)
    y = flat(encoder_layer)(**inputs, **options, seed=seeds())
    wanted = torch.autograd.grad(y, leaves_of(inputs), torch.ones_like(y), retain_graph=True)
    found = torch.autograd.grad(y, leaves_of(inputs), torch.ones_like(y), create_graph=True)
    bitwise(found, wanted)
    for gradient in (found[0], found[-1]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward(retain_graph=True)


@each_call
def test_a_second_derivative_by_each_input_raises(call):
    """The gradient of a plain sum with everything else frozen, so that only the input leads anywhere."""
    inputs, options = made(call)
    for name in (name for name, x in inputs.items() if x is not None and not name.endswith("bias")):
        leaves = {other: None if x is None else x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        y = flat(encoder_layer)(**leaves, **options, seed=seeds())
        (gradient,) = torch.autograd.grad(y.sum(), leaves[name], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.sum(), leaves[name], allow_unused=True)


@pytest.mark.parametrize("reentrant", [False, True])
@each_call
def test_checkpointing_is_bitwise(call, reentrant):
    """Dropout included: the recomputed forward draws the same seed."""
    inputs, options = made(call)
    layer = flat(encoder_layer)

    def step(function):
        torch.manual_seed(7)
        y = function()
        return y.detach(), *torch.autograd.grad(y, leaves_of(inputs), torch.ones_like(y), materialize_grads=True)

    wanted = step(lambda: layer(**inputs, **options))
    names = [name for name, x in inputs.items() if x is not None]

    def of(*tensors):
        return layer(**inputs | dict(zip(names, tensors, strict=True)), **options)

    if reentrant:  # which sets gradients in .grad only
        torch.manual_seed(7)
        y = checkpoint(of, *leaves_of(inputs), use_reentrant=True)
        y.backward(torch.ones_like(y))
        bitwise([y.detach(), *(x.grad for x in leaves_of(inputs))], wanted)
    else:
        bitwise(step(lambda: checkpoint(of, *leaves_of(inputs), use_reentrant=False)), wanted)


@each_call
def test_it_repeats_itself(call):
    inputs, options = made(call)
    inputs = {name: None if x is None else x.detach() for name, x in inputs.items()}
    dy = torch.randn_like(flat(encoder_layer)(**inputs, **options))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(run(flat(encoder_layer), inputs, dy, **options))
    assert_same(*found)


@pytest.mark.parametrize("needs", [True, False], ids=["gradient", "no gradient"])
def test_dropout_follows_the_generator(needs):
    inputs, options = made("padded")
    layer = flat(encoder_layer)

    def drawn(seed):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(needs):
            return [layer(**inputs, **options).detach() for _ in range(2)]

    (one, two), again, other = drawn(1), drawn(1), drawn(2)
    bitwise([one, two], again)
    assert not torch.equal(one, two)  # like two layers of a model
    assert not torch.equal(one, other[0])


def test_each_dropout_takes_a_seed_of_its_own():
    """Both LayerNorms' sums have the same shape: with one seed they would lose the same elements."""
    inputs = {name: None if x is None else x.detach() for name, x in made("padded")[0].items()}
    layer = flat(encoder_layer)
    for i, name in enumerate(("attention_p", "attention_output_p", "output_p")):
        settings = Settings(3)._replace(**{name: 0.5})
        seed = seeds()
        first = layer(**inputs, settings=settings, seed=seed)
        for j in range(6):
            changed = seed.clone()
            changed[j] += 1
            assert torch.equal(layer(**inputs, settings=settings, seed=changed), first) == (j != 2 * i)


def test_without_dropout_the_generator_stays_where_it_was():
    inputs, options = made("plain")
    before = torch.random.get_rng_state()
    flat(encoder_layer)(**inputs, **options).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["intermediate", "output_norm", "x"])
def test_what_was_written_over_before_the_backward_is_noticed(name):
    """As in autograd: gradients from other numbers than the forward's would be wrong."""
    inputs, options = made("plain")
    y = flat(encoder_layer)(**inputs, **options)
    with torch.no_grad():
        inputs[name].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        y.sum().backward()


def test_the_upstream_gradient_may_be_expanded():
    inputs, options = made("plain")
    y = flat(encoder_layer)(**inputs, **options)
    found = torch.autograd.grad(y.sum(), leaves_of(inputs), retain_graph=True)
    bitwise(found, torch.autograd.grad(y, leaves_of(inputs), torch.ones_like(y)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_it_changes_nothing(dtype):
    """Its dtypes are its arguments, in the forward and in the backward."""
    inputs, options = made("plain")
    wanted = run(flat(encoder_layer), inputs, torch.ones(2, 5, 24, device=DEVICE), **options)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = run(flat(encoder_layer), inputs, torch.ones(2, 5, 24, device=DEVICE), **options)
    assert_same(found, wanted)


def test_a_write_through_data_is_seen_by_the_next_call():
    inputs, options = made("plain")
    layer = flat(encoder_layer)
    first = layer(**inputs, **options)
    inputs["key"].data.mul_(2.0)
    second = layer(**inputs, **options)
    fresh = {name: None if x is None else x.detach().clone() for name, x in inputs.items()}
    assert not torch.equal(first, second) and torch.equal(layer(**fresh, **options), second)


def test_one_tensor_may_be_several_weights():
    """The gradients of its uses add up."""
    inputs, options = made("plain")
    shared = inputs["query"]
    y = flat(encoder_layer)(**inputs | {"key": shared, "value": shared}, **options)
    (found,) = torch.autograd.grad(y, [shared], torch.ones_like(y))
    apart = {name: shared.detach().clone().requires_grad_() for name in ("query", "key", "value")}
    y = flat(encoder_layer)(**inputs | apart, **options)
    parts = torch.autograd.grad(y, list(apart.values()), torch.ones_like(y))
    torch.testing.assert_close(found, sum(parts))


def test_gradients_may_be_accumulated_into():
    """Vectors' gradients share an allocation, yet the caller may write to each."""
    inputs, options = made("plain")
    for _ in range(2):
        flat(encoder_layer)(**inputs, **options).sum().backward()
    twice = [x.grad.clone() for x in leaves_of(inputs)]
    for x in leaves_of(inputs):
        x.grad = None
    flat(encoder_layer)(**inputs, **options).sum().backward()
    bitwise(twice, [2 * x.grad for x in leaves_of(inputs)])
    for name in NAMES:
        rest = {other: inputs[other].grad.clone() for other in NAMES if other != name}
        inputs[name].grad.zero_()
        bitwise([inputs[other].grad for other in rest], list(rest.values()))
