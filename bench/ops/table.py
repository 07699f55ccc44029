"""Lists the timed ops and their lanes: those that a spec gives, and other implementations beside them.

Separate from bench.ops.grid, because lanes import triton and a dry run has to select its interpreter first.
"""

from bench.ops import attention_lanes, decoder_lanes, feed_forward_lanes, pooling_lanes, row_lanes
from bench.ops.from_spec import op_of
from bench.ops.grid import NAMES, Lane, Op
from fastbert.testing.specs import SPECS

PEERS: dict[str, dict[str, Lane]] = {
    "attention": attention_lanes.PEERS,
    "dropout_add_layernorm": row_lanes.DROPOUT_ADD_LAYERNORM,
    "gelu_layernorm": row_lanes.GELU_LAYERNORM,
    "linear_cross_entropy": decoder_lanes.PEERS,
    "pool_rows": pooling_lanes.PEERS,
}
OTHER_WAYS: dict[str, dict[str, Lane]] = {"attention": attention_lanes.PACKED, "feed_forward": feed_forward_lanes.WAYS}
OPS: dict[str, Op] = {name: op_of(SPECS[name], PEERS.get(name), OTHER_WAYS.get(name)) for name in NAMES}
