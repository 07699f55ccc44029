"""What a layer consists of, and what one call of it is: the names that the other files here share."""

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """A layer's parameters, all of one dtype. Products' weights are [out, in], as nn.Linear has them."""

    query: Tensor  # [H, H]
    query_bias: Tensor  # [H]
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    attention_output: Tensor  # [H, H]
    attention_output_bias: Tensor
    attention_norm: Tensor  # [H]
    attention_norm_bias: Tensor
    intermediate: Tensor  # [F, H]
    intermediate_bias: Tensor  # [F]
    output: Tensor  # [H, F]
    output_bias: Tensor  # [H]
    output_norm: Tensor
    output_norm_bias: Tensor


class Settings(NamedTuple):
    """A layer's numbers.

    heads: of H / heads columns each, up to 256.
    activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
    attention_eps, output_eps: added to the variance, by the LayerNorm after attention and the one after the feed-forward.
    attention_p: probability of dropping a probability; attention_output_p, output_p: of dropping an element before each
        LayerNorm's sum.
    scale: of scores; None: 1 / sqrt(H / heads).
    """

    heads: int
    activation: str = "gelu"
    attention_eps: float = 1e-12
    output_eps: float = 1e-12
    attention_p: float = 0.0
    attention_output_p: float = 0.0
    output_p: float = 0.0
    causal: bool = False
    scale: float | None = None

    @property
    def drops(self) -> bool:
        return self.attention_p > 0.0 or self.attention_output_p > 0.0 or self.output_p > 0.0


class Layout(NamedTuple):
    """How the rows of x lie and which of them are read: encoder_layer's arguments of these names."""

    key_mask: Tensor | None = None
    key_bounds: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    queries: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None
    index: Tensor | None = None
    inverse: Tensor | None = None


class Call(NamedTuple):
    """What of a call's tensors decides which kernels run and how; with Settings it names a plan.

    rows: of x, in `sequences` of up to `longest`. read_rows: of the queries, where they are rows of their own; their longest
    sequence is `longest_read`, None where attention runs for all rows and those are taken of what it gives. product_dtype and
    norm_dtype: see encoder_layer.
    """

    rows: int
    sequences: int
    longest: int
    read_rows: int | None
    longest_read: int | None
    packed: bool
    masked: bool
    hidden: int
    inner: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    product_dtype: torch.dtype
    norm_dtype: torch.dtype | None
    device: torch.device
    precision: str  # torch's of float32 products
    gradient: bool
