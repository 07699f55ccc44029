"""An embedder inside FSDP, which puts hooks on all outputs: token embeddings are not left to be computed later."""

import copy

import pytest
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fastbert
from fastbert.integrations.lazy_tokens import LazyTokens
from tests.embedders.tiny import TEXTS, close, features_of, make, row_of


def by_fsdp_1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=next(model.parameters()).device)


@pytest.mark.parametrize("shard", [by_fsdp_1, fully_shard])
def test_fsdp(shard, one_rank, folder):
    stock = make(folder)
    features = features_of(stock, TEXTS)
    patched = fastbert.patch(copy.deepcopy(stock))
    assert isinstance(patched(dict(features))["token_embeddings"], LazyTokens)
    sharded = shard(patched)
    output = sharded(dict(features))
    assert not isinstance(output["token_embeddings"], LazyTokens)
    close(output["sentence_embedding"], stock(dict(features))["sentence_embedding"])
    output["sentence_embedding"].sum().backward()
    assert "FSDP around the embedder" in row_of(patched).reason
