"""The fewest bytes an op can move, and the time that takes at the measured copy bandwidth. KERNELS has the targets.

T = tokens, W = width (hidden size, or 4 times that for bias_gelu), b = bytes an element. Weights, biases and the
row statistics are left out: at 4,096 tokens they are under 1 %.
"""

from bench.hardware import COPY_BYTES_PER_SECOND

# Tensors of T x W elements that are read or written.
TENSORS = {
    "dropout_add_layernorm": {
        "forward": ("x", "residual", "z", "y"),
        "backward": ("dy", "z", "dx", "dresidual"),
    },
    "bias_gelu": {"forward": ("x", "y"), "backward": ("dy", "x", "dx")},
    "gelu_layernorm": {"forward": ("x", "y"), "backward": ("dy", "x", "dx")},
}

MODELS = {"BERT-base": 768, "BERT-large": 1024}
TOKENS = {"512 (one row)": 512, "4,096 (32 x 128)": 4096, "32,768 (64 x 512)": 32768}


def width(op: str, hidden: int) -> int:
    return 4 * hidden if op == "bias_gelu" else hidden


def stated_bytes(op: str, direction: str, tokens: int, hidden: int, itemsize: int) -> int:
    """KERNELS' formula: so many tensors of tokens x width elements."""
    return len(TENSORS[op][direction]) * tokens * width(op, hidden) * itemsize


def floor_microseconds(moved: float) -> float:
    return moved / COPY_BYTES_PER_SECOND * 1e6
