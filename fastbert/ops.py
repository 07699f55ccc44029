"""The kernels' public functions; or, where triton cannot be imported, the reason that there are none."""

MISSING: str | None = None
INTERPRETED = False
MAX_WIDTH = 0

try:
    from fastbert.kernels.bias_gelu import bias_gelu
    from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
    from fastbert.kernels.gelu_layernorm import gelu_layernorm
    from fastbert.kernels.launch import INTERPRETED, MAX_WIDTH
except ImportError as error:
    MISSING = f"the kernels cannot be imported: {error}"
    bias_gelu = dropout_add_layernorm = gelu_layernorm = None

__all__ = ["INTERPRETED", "MAX_WIDTH", "MISSING", "bias_gelu", "dropout_add_layernorm", "gelu_layernorm"]
