"""Under torch.compile the ops are custom ops: one graph, no break, the same bits as in eager mode."""

import pytest
import torch

from fastbert.testing.rows import (
    BIAS_GELU,
    DEVICE,
    DROPOUT_ADD_LAYERNORM,
    GELU_LAYERNORM,
    OPS,
    make_inputs,
    run,
    seed_tensor,
)

CASES = [
    (DROPOUT_ADD_LAYERNORM, {"p": 0.0}, (), torch.float32),
    (DROPOUT_ADD_LAYERNORM, {"p": 0.3}, (), torch.float16),
    (DROPOUT_ADD_LAYERNORM, {"p": 0.3, "out_dtype": torch.float32}, ("x", "weight"), torch.float16),
    (BIAS_GELU, {"activation": "gelu"}, (), torch.float32),
    (BIAS_GELU, {"activation": "silu"}, ("bias",), torch.float16),
    (GELU_LAYERNORM, {"activation": "gelu"}, (), torch.float32),
    (GELU_LAYERNORM, {"activation": "gelu_tanh", "out_dtype": torch.float32}, ("x",), torch.float16),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("op, options, frozen, dtype", CASES, ids=lambda value: str(value).replace("'", ""))
def test_outputs_and_gradients(op, options, frozen, dtype, launches):
    inputs, dy = make_inputs(op, (3, 5, 24), dtype), torch.randn(3, 5, 24).to(DEVICE, options.get("out_dtype", dtype))
    if options.get("p"):
        options = options | {"seed": seed_tensor(5)}
    eager = run(op.call, inputs, dy, frozen, **options)
    assert launches() == dict.fromkeys((op.forward_kernel, *op.backward_kernels), 1)

    results = run(compiled(op.call), inputs, dy, frozen, **options)
    assert launches() == dict.fromkeys((op.forward_kernel, *op.backward_kernels), 2)
    assert results.keys() == eager.keys()
    for name, result in results.items():
        assert result is eager[name] or torch.equal(result, eager[name]), name


@pytest.mark.parametrize("op", OPS, ids=str)
def test_one_graph_for_every_length(op, launches):
    """Sizes are symbols: a batch of another length recompiles nothing."""
    function = compiled(op.call, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 7, 11):
            inputs, dy = make_inputs(op, (2, length, 24)), torch.randn(2, length, 24, device=DEVICE)
            results, eager = run(function, inputs, dy), run(op.call, inputs, dy)
            assert all(torch.equal(results[name], eager[name]) for name in eager)
    assert launches() == dict.fromkeys((op.forward_kernel, *op.backward_kernels), 6)


def test_dropout_draws_anew_each_call_and_repeats_with_the_seed():
    inputs = make_inputs(DROPOUT_ADD_LAYERNORM, (5, 24))
    function = compiled(DROPOUT_ADD_LAYERNORM.call)
    torch.manual_seed(3)
    first, second = (run(function, inputs, None, p=0.5)["y"] for _ in range(2))
    torch.manual_seed(3)
    again = run(function, inputs, None, p=0.5)["y"]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_gradients_of_compiled_dropout_belong_to_its_mask():
    """Elements that the forward dropped have no gradient in the backward."""
    inputs = make_inputs(DROPOUT_ADD_LAYERNORM, (5, 24))
    inputs["residual"], dy = torch.zeros_like(inputs["x"]), torch.randn(5, 24, device=DEVICE)
    inputs["weight"], inputs["bias"] = torch.ones_like(inputs["weight"]), torch.zeros_like(inputs["bias"])
    results = run(compiled(DROPOUT_ADD_LAYERNORM.call), inputs, dy, p=0.5)
    dropped = results["dx"] == 0
    assert 0 < dropped.sum() < dropped.numel()
    for y, gone in zip(results["y"], dropped, strict=True):
        assert len(y[gone].unique()) <= 1  # all of them (0 - mean) / deviation


@pytest.mark.parametrize("op", OPS, ids=str)
def test_without_gradients(op):
    inputs = make_inputs(op, (5, 24))
    with torch.no_grad():
        assert torch.equal(compiled(op.call)(**inputs), op.call(**inputs))


def test_between_other_operations():
    """As in BertOutput: product, op, and the sum of gradients where the residual branches off."""

    def layer(x, matrix, weight, bias):
        return DROPOUT_ADD_LAYERNORM.call(BIAS_GELU.call(x @ matrix), x, weight, bias).square().mean()

    tensors = [torch.randn(5, 24), torch.randn(24, 24) / 5, torch.ones(24), torch.zeros(24)]
    tensors = [t.to(DEVICE).requires_grad_() for t in tensors]
    expected = torch.autograd.grad(layer(*tensors), tensors)
    for one, other in zip(torch.autograd.grad(compiled(layer)(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(one, other)
