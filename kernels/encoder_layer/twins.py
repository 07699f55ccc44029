"""A layer's result in the products' dtype beside the one that LayerNorm returns, for the products of the layer that follows.

Under autocast a layer returns float32, of which the next one's products read a cast. LayerNorm's kernel has the row in
registers and writes both: 2 T H bytes instead of a launch that moves 6.
"""

import torch
from torch import Tensor

__all__ = ["Twins"]


class Twins:
    """What the calls of one forward hand from one to the next."""

    def __init__(self) -> None:
        self.low: Tensor | None = None  # [T, H], of the last result
        self._of: Tensor | None = None
        self._version: int | None = None

    def beside(self, y: Tensor) -> None:
        """`y` is the result that `low` is a twin of."""
        self._of, self._version = y, _version(y)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The twin of `x` in `dtype`, if x is the last result and was not written to since. It is taken once."""
        of, version, low = self._of, self._version, self.low
        self.clear()
        if of is not x or low is None or low.dtype != dtype or version != _version(x):
            return None
        return low

    def clear(self) -> None:
        """Keep nothing alive."""
        self._of = self._version = self.low = None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
