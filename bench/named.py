"""Configurations that `python -m bench gpu` times before any other: compiled well, expected to be faster (bench/NOTES.md).

Each is what differs from the present entry. The general search over bench.candidates.ENTRIES follows.
"""

NAMED: dict[str, list[dict[str, int]]] = {
    "attention_forward": [
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    ],
    "attention_backward_q": [
        {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8},
    ],
    "attention_backward_kv": [
        {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8},
    ],
    "layernorm_backward": [
        {"maxnreg": 168, "programs_per_multiprocessor": 3},
        {"programs_per_multiprocessor": 3},
        {"BLOCK_M": 8, "num_warps": 8},
    ],
}
# Entries that were there before anything was timed; any other is a candidate of its own, and comes first.
GENERAL = (
    "attention_forward",
    "attention_backward_kv",
    "attention_backward_q",
    "layernorm_backward",
    "layernorm_forward",
    "gelu_layernorm_backward",
    "bias_gelu_backward",
    "bias_gelu_forward",
    "gather_rows",
    "linear_cross_entropy",
    "embedding_runs",
    "embedding_sums_backward",
)
