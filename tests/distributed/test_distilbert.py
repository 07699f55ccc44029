"""DistilBERT under FSDP: it makes its mask before an engine has gathered the weights of its embeddings."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import fastbert
from fastbert.testing.models import counting
from tests.distributed.data import assert_parameters, named
from tests.distributed.test_fsdp import whole_gradients
from tests.models import test_distilbert as distilbert
from tests.ranks import on_ranks


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    """FSDP2; embeddings whose words are tied to a decoder stay in the model's own group."""
    layers = model.distilbert.transformer.layer
    for part in layers if hasattr(model, "vocab_projector") else (model.distilbert.embeddings, *layers):
        fully_shard(part, **settings)
    return fully_shard(model, **settings)


def flatten_embeddings(model: nn.Module) -> nn.Module:
    """FSDP 1 with two units: a shard of the embeddings has one dimension between forwards, as wide as it happens to be."""
    embeddings = ModuleWrapPolicy({type(model.distilbert.embeddings)})
    return FullyShardedDataParallel(model, auto_wrap_policy=embeddings, device_id=torch.device("cpu"), use_orig_params=True)


def train(head: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Compare loss and gradients with stock, and check that the kernels ran. Ranks have the same batch."""
    stock, batch = distilbert.make(head).cpu().train(), distilbert.make_batch(head)
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    parallel = wrap(fastbert.patch(copy.deepcopy(stock)))
    with counting(heads=True) as launched:
        loss = parallel(**batch).loss
        loss.backward()
    expected = stock(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert_parameters(whole_gradients(parallel), {name: p.grad for name, p in stock.named_parameters()})
    rows = [row for row in fastbert.report(parallel).rows if row.hf_class in ("TransformerBlock", "DistilBertForMaskedLM")]
    assert len(rows) == 2 + (head == "mlm") and all(row.state == "active" and not row.fallback_calls for row in rows), rows
    assert any(name.startswith("linear_cross_entropy") for name in launched) == (head == "mlm"), launched


def attention_weights_in_half_precision() -> None:
    """An additive mask must have the dtype of the scores, which differs from the one that the shards have."""
    stock, batch = distilbert.make(attention="eager").cpu().train(), distilbert.make_batch()
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    parallel = shard(fastbert.patch(copy.deepcopy(stock)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    found, expected = (model(**batch, output_attentions=True) for model in (parallel, stock.half()))
    assert len(found.attentions) == 2 and found.attentions[0].dtype == torch.float16
    torch.testing.assert_close(found.attentions, expected.attentions, rtol=0.0, atol=4 * 2.0**-11)
    # Two orders of computing in float16; each layer adds roundings of 2^-11. A wrong mask fails above.
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2)


def train_in_turn(rank: int) -> None:
    for head, wrap in (("classification", shard), ("mlm", shard), ("classification", flatten_embeddings)):
        with named(f"{head}, {wrap.__name__}"):
            train(head, wrap)
    with named("attention weights in half precision"):
        attention_weights_in_half_precision()


def test_fsdp() -> None:
    on_ranks(2, train_in_turn)
