"""Where a layer keeps what the layer op reads: the names of its modules, in the families that name them alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fastbert.layers.family import DISTILBERT, Family


@dataclass(frozen=True)
class Layout:
    """The modules inside a layer, by name.

    parts: the part that a module must be, and whether by the fast class.
    attention: the module with the attention's numbers and config.
    linears: of queries, keys, values, the attention's output, the intermediate and the output product.
    norms: after attention, and after the feed-forward.
    dropouts: of the scores, of the attention's output and of the feed-forward's; None where there is none.
    activation: the module that has it, and its attribute.
    chunks: the module that may compute the feed-forward in chunks ("" for the layer), and its method for one chunk.
    """

    parts: Mapping[str, tuple[str, bool]]
    attention: str
    linears: tuple[str, ...]
    norms: tuple[str, str]
    dropouts: tuple[str | None, ...]
    activation: tuple[str, str]
    chunks: tuple[str, str]


_LIKE_BERT = Layout(
    parts={
        "attention": ("Attention", False),
        "attention.self": ("SelfAttention", True),
        "attention.output": ("SelfOutput", True),
        "intermediate": ("Intermediate", True),
        "output": ("Output", True),
    },
    attention="attention.self",
    linears=(
        *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        *("intermediate.dense", "output.dense"),
    ),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    dropouts=("attention.self.dropout", "attention.output.dropout", "output.dropout"),
    activation=("intermediate", "intermediate_act_fn"),
    chunks=("", "feed_forward_chunk"),
)
_DISTILBERT = Layout(
    parts={"attention": ("SelfAttention", True), "ffn": ("FFN", False)},
    attention="attention",
    linears=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    norms=("sa_layer_norm", "output_layer_norm"),
    dropouts=("attention.dropout", None, "ffn.dropout"),
    activation=("ffn", "activation"),
    chunks=("ffn", "ff_chunk"),
)


def layout_of(family: Family) -> Layout:
    """The layout of the layers of a family."""
    return _DISTILBERT if family is DISTILBERT else _LIKE_BERT


def self_attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention of a layer."""
    attention = layer.attention
    return attention._modules.get("self", attention)


def chunk_size_of(layer: nn.Module) -> int:
    """The rows that the feed-forward of a layer takes at once; 0 for all."""
    return layer._modules.get("ffn", layer).chunk_size_feed_forward
