"""Model tests that need a GPU: bf16, realistic lengths, streams, devices, synchronisation, CUDA graphs."""

import copy

import pytest
import torch

import fastbert
from fastbert.testing.models import (
    assert_bitwise,
    assert_equal,
    assert_no_fallback,
    check,
    counting,
    doubled,
    expected_launches,
    run,
)
from tests.models.tiny import CLASSIFICATION, KINDS, MLM, make, make_batch

pytestmark = pytest.mark.gpu

LENGTH = 128
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": LENGTH,
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def wide(kind=MLM, dtype=torch.float32, attention="eager", **overrides):
    model = make(kind, torch.float32, attention, **WIDE | overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(0.3)  # sums over 256 or 1024 columns with the tiny models' weights would saturate
    return model.to(dtype)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_class_is_equal_in_half_precision(kind, dtype, attention):
    check(wide(kind, HALF[dtype], attention).train(), in_half(make_batch(kind, length=LENGTH), HALF[dtype]))


def in_half(batch, dtype):
    """The batch in half precision, float labels too: stock has no gradient of a half-precision loss for float32 labels."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


@pytest.mark.parametrize("dtype", HALF)
def test_float32_labels_in_half_precision_are_refused_as_in_stock(dtype):
    regression = next(kind for kind in KINDS if str(kind) == "regression")
    model, batch = wide(regression, HALF[dtype]), make_batch(regression)
    messages = []
    for one in (copy.deepcopy(model), fastbert.patch(model)):
        with pytest.raises(RuntimeError, match="Found dtype Float but expected") as error:
            run(one, batch)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_class_is_equal_under_autocast(kind, dtype):
    model, batch = wide(kind).train(), make_batch(kind, length=LENGTH) | {"output_hidden_states": True}
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(patched, batch, within=torch.autocast("cuda", HALF[dtype]))
    assert launched == expected_launches(model)
    assert_no_fallback(patched, but=("BertEncoder",))  # hidden states are requested, so it does not pack
    eager = run(copy.deepcopy(model), batch, within=torch.autocast("cuda", HALF[dtype]))
    assert_equal(results, eager, run(copy.deepcopy(model).double(), doubled(batch)))


def test_float32_does_not_become_tf32():
    check(wide(), make_batch(length=LENGTH))


def test_a_model_moved_to_the_gpu_after_patching():
    model, batch = make().cpu(), {name: tensor.cpu() for name, tensor in make_batch().items()}
    stock = run(copy.deepcopy(model), batch)
    with counting() as launched:
        assert_bitwise(run(fastbert.patch(model), batch), stock)
    assert not launched
    reasons = {reason for row in fastbert.report(model).rows for reason in row.fallback_calls}
    assert reasons == {"tensors on cpu: the kernels need an NVIDIA GPU"}
    model.cuda()
    with counting() as launched:
        run(model, make_batch())
    assert launched == expected_launches(model)


def test_a_side_stream_gives_the_same_bits():
    model, batch = fastbert.patch(wide()), make_batch(length=LENGTH)
    first = run(model, batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), counting() as launched:
        # Work ahead of it on the same stream, so that a kernel on another stream would overtake it.
        torch.cuda._sleep(20_000_000)
        results = run(model, batch)
    torch.cuda.current_stream().wait_stream(stream)
    assert launched == expected_launches(model)
    assert_bitwise(results, first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_gpu_while_the_first_is_current():
    model, batch = fastbert.patch(wide()), make_batch(length=LENGTH)
    first = run(model, batch)
    assert torch.cuda.current_device() == 0
    with counting() as launched:
        results = run(model.to("cuda:1"), {name: tensor.to("cuda:1") for name, tensor in batch.items()})
    assert launched == expected_launches(model)
    assert_bitwise({name: tensor.to("cuda:0") for name, tensor in results.items()}, first)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_waits_for_the_gpu(p):
    model = fastbert.patch(wide(CLASSIFICATION, hidden_dropout_prob=p)).train()
    batch = make_batch(CLASSIFICATION, "none", length=LENGTH)
    run(model, batch)  # compiles and allocates everything
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Captured:
    """One step, forward and backward, as a CUDA graph."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with counting() as self.launched, torch.cuda.graph(self.graph):
            self.loss = self.step()

    def step(self):
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**self.batch).loss
        loss.backward()
        return loss

    def replay(self):
        self.graph.replay()
        torch.cuda.synchronize()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return found | {"loss": self.loss.detach().clone()}


def test_a_cuda_graph_computes_what_eager_does():
    batch = make_batch(CLASSIFICATION, "none", length=LENGTH)
    model = fastbert.patch(wide(CLASSIFICATION))
    eager = run(copy.deepcopy(model), batch)
    captured = Captured(model, batch)
    assert captured.launched == expected_launches(model)
    replayed = captured.replay()
    weight = "bert.encoder.layer.0.output.LayerNorm.weight"
    torch.testing.assert_close(replayed["loss"], eager["loss"])
    torch.testing.assert_close(replayed[weight], eager[f"gradient of {weight}"])
    # New data in the same memory, which the graph reads.
    batch["input_ids"].copy_(make_batch(CLASSIFICATION, "none", seed=9, length=LENGTH)["input_ids"])
    changed = captured.replay()
    torch.testing.assert_close(changed["loss"], model(**batch).loss.detach())
    assert not torch.equal(changed["loss"], replayed["loss"])


def test_a_cuda_graph_drops_anew_at_each_replay():
    batch = make_batch(CLASSIFICATION, "none", length=LENGTH)
    captured = Captured(fastbert.patch(wide(CLASSIFICATION, hidden_dropout_prob=0.3)).train(), batch)
    losses = {captured.replay()["loss"].item() for _ in range(4)}
    assert len(losses) == 4
    torch.cuda.manual_seed(5)
    first = captured.replay()
    torch.cuda.manual_seed(5)
    assert torch.equal(captured.replay()["loss"], first["loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype):
    torch.compiler.reset()
    model, batch = wide(MLM, dtype), make_batch(length=LENGTH)
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(torch.compile(patched, fullgraph=True), batch)
    assert launched == expected_launches(model)
    results = {name.replace("_orig_mod.", ""): tensor for name, tensor in results.items()}
    assert_equal(results, run(copy.deepcopy(model), batch), run(model.double(), doubled(batch)))
