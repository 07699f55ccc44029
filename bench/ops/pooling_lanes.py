"""Peers of pool_rows: sentence-transformers' Pooling, padded and flattened, and torch's segment_reduce on packed rows.

A packed batch is unpacked for the padded Pooling, which takes a padded one only. In cases without padding nothing is unpacked,
and its time is that of the module alone.
"""

import torch
from torch import Tensor

from bench.core.peers import require
from bench.ops.grid import Case, Function, Inputs, Lane


def _padded(case: Case) -> Function:
    pooling = _pooling(case)

    def call(inputs: Inputs, p: float) -> Tensor:
        x, tokens = inputs.leaves["x"], inputs.peers["tokens"]
        if inputs.context["index"] is not None:
            x = x.new_zeros(tokens.numel(), x.shape[1]).index_copy(0, inputs.peers["places"], x)
        return pooling({"token_embeddings": x.view(*tokens.shape, -1), "attention_mask": tokens})["sentence_embedding"]

    return call


def _flattened(case: Case) -> Function:
    """As after FlashAttention on a flattened batch: the rows are added up by index."""
    pooling = _pooling(case)

    def call(inputs: Inputs, p: float) -> Tensor:
        features = {"token_embeddings": inputs.leaves["x"][None], "cu_seq_lens_q": inputs.context["cu_seqlens"]}
        return pooling(features)["sentence_embedding"]

    return call


def _pooling(case: Case) -> torch.nn.Module:
    require("sentence-transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(case.hidden, pooling_mode="mean")


def _segments(case: Case) -> Function:
    def call(inputs: Inputs, p: float) -> Tensor:
        x, bounds = inputs.leaves["x"], inputs.context["cu_seqlens"]
        # Sums in float32, as the other lanes form them.
        return torch.segment_reduce(x.float(), "mean", offsets=bounds.long(), axis=0, initial=0.0).to(x.dtype)

    return call


PEERS = {
    "sentence-transformers": Lane(_padded),
    "sentence-transformers, flattened": Lane(_flattened),
    "segment_reduce": Lane(_segments),
}
