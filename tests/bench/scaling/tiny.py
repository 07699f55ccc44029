"""A BertForPreTraining of two layers without memory, as bench.scaling sees it."""

from functools import cache

import torch
from transformers import BertConfig, BertForPreTraining

from bench.scaling import parts


@cache
def tiny(layers: int = 2) -> parts.Model:
    config = BertConfig(
        vocab_size=1001,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=128,
    )
    with torch.device("meta"):
        return parts.of(BertForPreTraining(config))
