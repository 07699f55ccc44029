"""A layer's result in the products' dtype, beside the one that LayerNorm returns, for the products of the next layer.

Under autocast a layer returns float32, and the next layer's products read a cast of it. LayerNorm's kernel has the row in
registers and writes both: 2 T H bytes instead of a launch that moves 6 T H. The twin is used only by a call whose input is that
very tensor, not written to since.
"""

import torch
from torch import Tensor

__all__ = ["Twins"]


class Twins:
    """Hands results from layer to layer within one forward."""

    def __init__(self) -> None:
        self.low: Tensor | None = None  # [T, H], the last result
        self._of: Tensor | None = None
        self._version: int | None = None

    def beside(self, y: Tensor) -> None:
        """Declare `low` to be the twin of `y`."""
        self._of, self._version = y, _version(y)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The twin of `x` in `dtype`, once; None unless x is the last result, not written to since."""
        of, version, low = self._of, self._version, self.low
        self.clear()
        if of is not x or low is None or low.dtype != dtype or version != _version(x):
            return None
        return low

    def clear(self) -> None:
        """Release all tensors."""
        self._of = self._version = self.low = None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
