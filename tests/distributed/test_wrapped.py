"""What engines put over a model, in one process: classes of FSDP2, wrappers around layers, DataParallel's replicas."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.bert.modeling_bert import BertLayer

import fastbert
from fastbert.dispatch import kind_of
from fastbert.testing.models import assert_bitwise, counting, expected_launches, run
from tests.distributed.data import assert_layers, assert_packed, batch_of, model_of
from tests.graphs.stepping import adamw
from tests.models import test_distilbert as distilbert
from tests.models.test_wrappers import replicas_of
from tests.models.tiny import ANOTHER_ORDER, CLASSIFICATION, MLM, make, make_batch


def shard(model: nn.Module, **settings) -> nn.Module:
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


@pytest.mark.parametrize("kind", [CLASSIFICATION, MLM], ids=str)
def test_a_sharded_model_is_patched_and_unpatched(one_rank, kind):
    model = shard(model_of(kind))
    before = {name: type(module) for name, module in model.named_modules()}
    assert fastbert.patch(model, strict=True) is model
    for module, stock in ((model, kind.cls), (model.bert.encoder.layer[0], BertLayer)):
        assert isinstance(module, FSDPModule) and kind_of(module).__module__.startswith("fastbert.")
        assert type(module).__name__ == f"FSDP{stock.__name__}"
    with fastbert.patched(model, attention=False):
        pass
    with counting(heads=True) as launched:
        model(**batch_of(0, kind)).loss.backward()
    assert_layers(model)
    if kind is CLASSIFICATION:
        assert_packed(model)
    else:
        assert any(name.startswith("linear_cross_entropy") for name in launched), launched
    fastbert.unpatch(model)
    for name, module in model.named_modules():
        assert type(module).__mro__[1:] == before[name].__mro__[1:], name
    assert not any(row.state == "active" for row in fastbert.report(model).rows)


def keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpointing_that_keeps_products():
    model = fastbert.patch(model_of())
    expected = run(copy.deepcopy(model), batch_of(0))
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    assert_bitwise(run(model, batch_of(0)), expected)
    assert_layers(model)


def test_wrapped_layers_that_are_no_op_are_not_packed():
    """The encoder would run the last one for some rows only, and so without its wrapper."""
    model = model_of(CLASSIFICATION, hidden_act="mish")
    stock = run(copy.deepcopy(model), batch_of(0, CLASSIFICATION))
    fastbert.patch(model)
    wrap(model)
    torch.testing.assert_close(without_wrappers(run(model, batch_of(0, CLASSIFICATION))), stock, **ANOTHER_ORDER)
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEncoder"]
    assert row.fallback_calls == {"a layer that is a CheckpointWrapper": 1}


@pytest.mark.parametrize("kind", [CLASSIFICATION, MLM], ids=str)
def test_layers_in_checkpoint_wrappers_run_as_one_op(kind):
    model = fastbert.patch(model_of(kind))
    expected = run(copy.deepcopy(model), batch_of(0, kind))
    wrap(model)
    with counting() as launched:
        results = run(model, batch_of(0, kind))
    once = expected_launches(model_of(kind))
    assert launched == once + expected_launches(model_of(kind).bert.encoder, backward=False)
    assert_layers(model)
    if kind is CLASSIFICATION:
        assert_packed(model)
    assert_bitwise(without_wrappers(results), expected)


def wrap(model: nn.Module, **settings) -> None:
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, **settings)


def without_wrappers(results):
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in results.items()}


def test_a_checkpoint_function_of_ones_own_sees_the_mask_of_stock():
    seen = []

    def own(function, *args, **kwargs):
        seen.append(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    model = model_of(CLASSIFICATION)
    stock = run(copy.deepcopy(model), batch_of(0, CLASSIFICATION))
    fastbert.patch(model)
    wrap(model, checkpoint_fn=own)
    results = without_wrappers(run(model, batch_of(0, CLASSIFICATION)))
    torch.testing.assert_close(results, stock)
    assert len(seen) == 2 and all(isinstance(mask, torch.Tensor) and mask.dim() == 4 for mask in seen)
    assert_layers(model, "module by module", "a mask that the patched model did not pass")


def test_a_hook_on_a_wrapper_sees_the_mask_of_stock():
    seen = []
    model = fastbert.patch(model_of())
    wrap(model)
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[1]), with_kwargs=True)
    model(**batch_of(0)).loss.backward()
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)
    assert_layers(model, "module by module", "a mask that the patched model did not pass")


def test_replicas_of_data_parallel_run_layers_as_one_op():
    model = fastbert.patch(make(MLM).train())
    batch = make_batch(MLM)
    expected = run(copy.deepcopy(model), batch)
    (replica,) = replicas_of(model, 1)
    replica(**batch).loss.backward()
    assert_layers(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"gradient of {name}"], msg=name)


def test_layers_share_bounds_and_seeds_in_mixed_precision(one_rank, monkeypatch):
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **more: drawn.append(args) or randint(*args, **more))
    model = make(MLM, attention="sdpa", hidden_dropout_prob=0.1).cpu().train()
    shard(fastbert.patch(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    batch = batch_of(0)
    drawn.clear()
    with counting(heads=True) as launched:
        model(**batch).loss.backward()
    assert_layers(model)
    assert launched["key_bounds_kernel"] == 1 and [args for args in drawn if args[1:] == ((2, 6),)] == [(2**62, (2, 6))]


@pytest.mark.parametrize("padded", [True, False])
def test_distilbert_in_half_precision(one_rank, padded):
    """Its mask passes through the model, and FSDP2 casts what floats on the way."""
    model = distilbert.make().cpu().train()
    batch = {name: tensor.cpu() for name, tensor in distilbert.make_batch(padded=padded).items()}
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)}
    stock_outputs = run(copy.deepcopy(model).half(), batch)
    fastbert.patch(model)
    for module in (*model.distilbert.transformer.layer, model.distilbert.transformer, model):
        fully_shard(module, **policy)
    outputs = model(**batch)
    outputs.loss.backward()
    rows = [row for row in fastbert.report(model).rows if row.hf_class in ("TransformerBlock", "Transformer")]
    assert rows and all(row.state == "active" and not row.fallback_calls for row in rows), rows
    torch.testing.assert_close(outputs.loss.float(), stock_outputs["loss"].float(), rtol=1e-2, atol=1e-2)


def test_verifying_a_sharded_model_is_one_clear_error(one_rank):
    assert fastbert.verify(DistributedDataParallel(model_of()), batch_of(0))
    with pytest.raises(ValueError, match="expected one that is not sharded, got a FSDPBertForMaskedLM; verify it before"):
        fastbert.verify(shard(model_of()), batch_of(0))
    flat = FullyShardedDataParallel(model_of(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="got a FullyShardedDataParallel"):
        fastbert.verify(flat, batch_of(0))


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (DistributedDataParallel, "a DistributedDataParallel"),
        (lambda model: shard(model), "hooks on a FSDPBertLayer, which a replay does not call"),
        (lambda model: (wrap(model), model)[1], "a CheckpointWrapper"),
    ],
    ids=["ddp", "fsdp2", "checkpoint wrappers"],
)
def test_graphed_steps_are_ordinary(one_rank, engine, reason):
    model = fastbert.patch(model_of(CLASSIFICATION))
    parallel = engine(model)
    step = fastbert.graphed_step(parallel, adamw(parallel))
    for _ in range(3):
        step(**batch_of(0, CLASSIFICATION))
    assert step.report().ordinary == {reason: 3} and reason in str(step)
