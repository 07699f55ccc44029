"""attention as a custom op: opcheck, and the same bits under torch.compile as in eager mode."""

import pytest
import torch

from fastbert.kernels.attention import attention, bounds_of
from fastbert.testing.attention import BACKWARD, FORWARD, backward_of, make_inputs, normal
from fastbert.testing.rows import DEVICE, run, seed_tensor

from ..layouts import guarded
from ..opchecking import opcheck
from .test_layouts import every_second, heads_first, shared_heads

pytestmark = pytest.mark.one_in(3)

OPS = torch.ops.fastbert
# The op's arguments after q, k and v.
NAMES = ("key_mask", "key_bounds", "mask", "cu_seqlens", "cu_seqlens_q", "seed", "max_seqlen", "max_seqlen_q")
LAYOUTS = [torch.clone, every_second, shared_heads, heads_first]
BOUNDS = "key_bounds_kernel"
KINDS = ["plain", "causal", "dropped", "key_mask", "bool mask", "added mask", "packed", "other rows"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def options_of(kind):
    """Options for attention on [2, 5, 2, 8], or on [10, 2, 8] if packed."""
    seen = torch.arange(5, device=DEVICE) < torch.tensor([[3], [5]], device=DEVICE)
    return {
        "plain": {},
        "causal": {"causal": True},
        "dropped": {"p": 0.3, "seed": seed_tensor(3)},
        "key_mask": {"key_mask": seen},
        "bool mask": {"mask": seen[:, None, None]},
        "added mask": {"mask": normal(1, 2, 5, 5)},
        "packed": {
            "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE),
            "max_seqlen": 6,
            "p": 0.3,
            "seed": seed_tensor(3),
        },
        "other rows": {
            "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE),
            "max_seqlen": 6,
            "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE),
            "max_seqlen_q": 2,
        },
    }[kind]


def inputs_of(kind, dtype=torch.float32):
    inputs = make_inputs(2, 5, 2, 8, dtype)
    if kind in ("packed", "other rows"):
        inputs = {name: x.flatten(0, 1) for name, x in inputs.items()}
    if kind == "other rows":
        inputs["q"] = inputs["q"][:3]
    return inputs


def arguments_of(inputs, options):
    """The op's positional arguments, with masks in full."""
    options = dict(options)
    if "key_mask" in options:
        options["key_bounds"] = bounds_of(options["key_mask"])
    if "mask" in options:
        options["mask"] = options["mask"].expand(2, 2, 5, 5)
    last = (options.get("causal", False), 8**-0.5, options.get("p", 0.0))
    return *inputs.values(), *(options.get(name) for name in NAMES), *last


def opcheck_both(inputs, options, dout=torch.clone):
    """opcheck the forward, then the backward on its results."""
    arguments = arguments_of(inputs, options)
    opcheck(OPS.attention, *(x.requires_grad_() for x in arguments[:3]), *arguments[3:])
    q, k, v, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    out, logsumexp = OPS.attention(q, k, v, *rest)
    opcheck(OPS.attention_backward, dout(torch.randn_like(out)), q, k, v, *rest, out, logsumexp)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    opcheck_both(inputs_of(kind), options_of(kind))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["plain", "dropped"])
def test_opcheck_of_layouts(kind, layout):
    """Also of an expanded input and an expanded upstream gradient: the fakes promise dense results for them."""
    opcheck_both({name: layout(x) for name, x in inputs_of(kind).items()}, options_of(kind), layout)


def test_opcheck_of_one_product():
    product = normal(2, 5, 3, 2, 8)
    opcheck_both(dict(zip("qkv", product.unbind(2), strict=True)), {"causal": True})


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_opcheck_of_lengths_and_dtypes(dtype, lengths):
    opcheck_both(make_inputs(2, lengths, 1, 8, dtype), {"p": 0.2, "seed": seed_tensor(3), "causal": True})


@pytest.mark.no_launch
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
def test_opcheck_of_nothing(shape):
    opcheck_both({name: torch.zeros(shape, device=DEVICE) for name in ("q", "k", "v")}, {})


@pytest.mark.no_launch
@pytest.mark.parametrize("lengths", [(0, 3), (3, 0)], ids=str)
def test_opcheck_of_nothing_on_one_side(lengths):
    opcheck_both(make_inputs(2, lengths, 2, 8), {})


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, dtype, launches):
    inputs, options = inputs_of(kind, dtype), options_of(kind)
    dy = torch.randn_like(inputs["q"])
    eager = run(attention, inputs, dy, **options)
    results = run(compiled(attention), inputs, dy, **options)
    bounds = {BOUNDS: 2} if kind == "key_mask" else {}
    assert launches() == {name: 2 for name in (FORWARD, *backward_of(inputs, options))} | bounds
    for name, result in results.items():
        assert torch.equal(result, eager[name]), name


@pytest.mark.parametrize("frozen", [("k",), ("q", "v"), ("q", "k")], ids=str)
def test_frozen_inputs(frozen):
    inputs, dy = inputs_of("plain"), normal(2, 5, 2, 8)
    eager, results = (run(function, inputs, dy, frozen) for function in (attention, compiled(attention)))
    for name, result in results.items():
        assert result is eager[name] or torch.equal(result, eager[name]), name


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda f: f.__name__)
def test_layouts(layout):
    inputs, dy = {name: layout(x) for name, x in inputs_of("plain").items()}, layout(normal(2, 5, 2, 8))
    eager, results = (run(function, inputs, dy) for function in (attention, compiled(attention)))
    assert all(torch.equal(results[name], eager[name]) for name in eager)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "key_mask"])
def test_one_graph_for_every_length(masked, launches):
    """Sizes are symbols: a batch of another length compiles nothing anew."""
    function = compiled(attention, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 7, 11):
            inputs, dy = make_inputs(2, length, 2, 8), normal(2, length, 2, 8)
            options = {"key_mask": torch.rand(2, length, device=DEVICE) > 0.3} if masked else {}
            results, eager = run(function, inputs, dy, **options), run(attention, inputs, dy, **options)
            assert all(torch.equal(results[name], eager[name]) for name in eager)
    assert launches() == {name: 6 for name in (FORWARD, *BACKWARD)} | ({BOUNDS: 6} if masked else {})


def test_dropout_draws_anew_each_call_and_repeats_with_the_seed():
    inputs, function = inputs_of("plain"), compiled(attention)
    torch.manual_seed(3)
    first, second = (run(function, inputs, None, p=0.5)["y"] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(run(function, inputs, None, p=0.5)["y"], first) and not torch.equal(first, second)


def test_gradients_of_compiled_dropout_belong_to_its_mask():
    """One-hot values and upstream gradients: out is the dropped weights [query, key], dv the same [key, query]."""
    one_hot = torch.eye(8, device=DEVICE)[None, :, None].expand(1, 8, 2, 8)
    inputs = {"q": torch.zeros_like(one_hot), "k": torch.zeros_like(one_hot), "v": one_hot}
    results = run(compiled(attention), inputs, one_hot, p=0.5)
    assert 0 < (results["y"] > 0).sum() < results["y"].numel()
    assert torch.equal(results["dv"].transpose(1, 3) > 0, results["y"] > 0)


def test_without_gradients():
    inputs = inputs_of("plain")
    with torch.no_grad():
        assert torch.equal(compiled(attention)(**inputs), attention(**inputs))


def test_between_other_operations():
    """As in BertSelfAttention: one product, its three views, attention, and the heads concatenated again."""

    def layer(x, matrix):
        q, k, v = (x @ matrix).unflatten(-1, (3, 2, 8)).unbind(-3)
        return attention(q, k, v).flatten(-2).square().mean()

    tensors = [guarded(normal(2, 5, 12)).requires_grad_(), normal(12, 48).requires_grad_()]
    expected = torch.autograd.grad(layer(*tensors), tensors)
    for one, other in zip(torch.autograd.grad(compiled(layer)(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(one, other)
