"""The ops and their lanes: one table. A new op is its spec, a new peer a lane beside it.

Apart from the grid of sizes, because the lanes import triton, whose interpreter is chosen before that.
"""

from bench.ops import attention_lanes, decoder_lanes, feed_forward_lanes, row_lanes
from bench.ops.from_spec import op_of
from bench.ops.grid import Op
from fastbert.testing.specs import SPECS

OPS: dict[str, Op] = {
    "dropout_add_layernorm": op_of(SPECS["dropout_add_layernorm"], row_lanes.DROPOUT_ADD_LAYERNORM),
    "bias_gelu": op_of(SPECS["bias_gelu"]),
    "gelu_layernorm": op_of(SPECS["gelu_layernorm"], row_lanes.GELU_LAYERNORM),
    "gather_rows": op_of(SPECS["gather_rows"]),
    "attention": op_of(SPECS["attention"], attention_lanes.PEERS, attention_lanes.PACKED),
    "embedding_layernorm": op_of(SPECS["embedding_layernorm"]),
    "feed_forward": op_of(SPECS["feed_forward"], more=feed_forward_lanes.WAYS),
    "linear_cross_entropy": op_of(SPECS["linear_cross_entropy"], decoder_lanes.PEERS),
}
