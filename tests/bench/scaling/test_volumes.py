"""Parameters, buckets and bytes against counts by hand."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining

from bench.scaling import parts, volumes
from bench.scaling.buckets import MIB, buckets
from bench.scaling.volumes import ALL_GATHER, ALL_REDUCE, BETWEEN, INSIDE, REDUCE_SCATTER, Collective, Sharding, sent
from tests.bench.scaling.tiny import tiny

LAYER = 12 * 1024**2 + 13 * 1024
EMBEDDINGS = (30522 + 512 + 2 + 2) * 1024
HEAD = 1024**2 + 3 * 1024 + 30522 + (1024**2 + 1024) + 2 * 1024 + 2  # transform, decoder's bias, pooler, next sentence


def test_bert_large():
    model = parts.bert("BERT-large")
    assert [part.numel for part in model.parts] == [HEAD, *[LAYER] * 24, EMBEDDINGS]
    assert model.numel == 336_226_108
    assert [part.name for part in model.parts][:2] == ["head", "bert.encoder.layer.23"]


def test_operations_are_those_of_flops():
    from bench.core.flops import forward_flops

    model = tiny()
    lengths = [128, 100, 4]
    found = model.forward_flops(lengths)
    assert sum(found) == forward_flops(model.config, "pretraining", lengths)
    tokens, pairs, hidden = 232, 128**2 + 100**2 + 4**2, 64
    assert found[1] == found[2] == 2 * tokens * (4 * hidden**2 + 2 * hidden * 256) + 4 * hidden * pairs


def test_modules_of_a_layer_have_all_of_it():
    model, stock = tiny(), tiny().by_module()
    assert [len(part.parameters) for part in stock.parts] == [9, *[4, 2, 4, 6] * 2, 5]
    assert stock.numel == model.numel
    whole, fine = model.forward_flops([128, 4]), stock.forward_flops([128, 4])
    assert sum(fine) == sum(whole) and sum(fine[1:5]) == whole[1] and fine[1] == fine[2] == 4 * fine[3] < 2 * fine[4]


def test_other_models_are_refused():
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1))
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got others: \['extra.bias', 'extra.weight'\]"):
        parts.of(model)


def test_buckets_of_bert_large():
    model = parts.bert("BERT-large")
    found = buckets(model)
    names = [name for bucket in found for name in bucket.names]
    assert names == [name for part in model.parts for name in part.parameters]
    assert sum(bucket.numel for bucket in found) == model.numel
    assert found[0].numel * 4 >= MIB and found[0].last == "head"
    assert all(4 * bucket.numel >= 25 * MIB for bucket in found[1:-1])
    assert 4 * found[-1].numel < 25 * MIB, "what is left"
    assert len(buckets(model, bucket_cap_mb=1e6)) == 1
    assert 4 * buckets(model, bucket_cap_mb=30)[0].numel > 30 * MIB, "no small first bucket with a cap of one's own"


def test_factors_of_a_ring():
    assert Collective(ALL_REDUCE, 800, 8, "").sent == 1400
    assert Collective(ALL_GATHER, 800, 8, "").sent == Collective(REDUCE_SCATTER, 800, 8, "").sent == 700
    assert Collective(ALL_REDUCE, 800, 1, "").sent == 0


def test_ddp():
    n = tiny().numel
    assert sent(volumes.ddp(tiny(), 4)) == pytest.approx(2 * 3 / 4 * 4 * n)
    assert sent(volumes.ddp(tiny(), 4, itemsize=2)) == pytest.approx(2 * 3 / 4 * 2 * n)


def test_fsdp_pads_first_dimensions():
    assert volumes.padded(torch.empty(2, 64), 8) == 8 * 64
    assert volumes.padded(torch.empty(1001), 8) == 1008
    assert volumes.padded(torch.empty(64, 3), 8) == 192


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp(reshard):
    model = tiny()
    layers = sum(layer.numel for layer in model.layers)
    # Over two ranks only first dimensions of 1001 are padded, by 1: the words, whose row has 64, and the decoder's bias.
    root = model.numel - layers + 64 + 1
    found = volumes.fsdp(model, 2, Sharding(2, 4, reshard))
    gathered = 2 * (root + layers * (2 if reshard else 1))
    assert sent(found) == pytest.approx((gathered + 4 * (root + layers)) / 2)
    assert [one.kind for one in found].count(ALL_GATHER) == (5 if reshard else 3)


def test_hsdp_sends_shards_between_nodes():
    found = volumes.fsdp(tiny(), 16, node=8)
    inside = [one for one in found if one.where == INSIDE]
    between = [one for one in found if one.where == BETWEEN]
    assert {one.ranks for one in inside} == {8} and {(one.ranks, one.kind) for one in between} == {(2, ALL_REDUCE)}
    scattered = sum(one.size for one in inside if one.kind == REDUCE_SCATTER)
    assert sum(one.size for one in between) == scattered // 8
    assert not [one for one in volumes.fsdp(tiny(), 8, node=8) if one.where == BETWEEN]


def test_zero_and_tensor_parallel():
    assert sent(volumes.zero1(tiny(), 4)) == pytest.approx(2 * 3 / 4 * 2 * tiny().numel)
    found = volumes.tensor_parallel(tiny().config, 100, 2)
    assert len(found) == 2 * 6 and sent(found) == 12 * 100 * 64 * 2
