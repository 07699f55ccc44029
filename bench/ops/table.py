"""The ops and their lanes: one table. A new op is an entry in OPS, a new peer a line in its lanes.

Apart from the grid of sizes, because the lanes import triton, whose interpreter is chosen before that.
"""

from bench.ops import attention_lanes, decoder_lanes, embedding_lanes, feed_forward_lanes, packing_lanes, row_lanes
from bench.ops.grid import Op

OPS: dict[str, Op] = row_lanes.OPS | {
    "attention": attention_lanes.OP,
    "embedding_layernorm": embedding_lanes.OP,
    "feed_forward": feed_forward_lanes.OP,
    "gather_rows": packing_lanes.OP,
    "linear_cross_entropy": decoder_lanes.OP,
}
