"""The tensors that graphs of one bucket read, and how a batch gets into them."""

import torch
from torch import Tensor

from fastbert.graphs.request import Request


class Inputs:
    """Token ids, segments and the mask of a bucket, shape [rows, (choices,) length].

    A smaller batch is in the upper left corner. Around it the mask is False, so what stands there reaches no output: a masked
    key has weight 0. With `first`, rows below the batch have one token, because a head that reads their first position must
    find one.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, first: bool) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside it
            self.ids, self.types = torch.zeros((2, *shape), dtype=torch.int64, device=device).unbind()
            self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.shape, self._first = shape, first
        self._holds: tuple[torch.Size, bool, bool] | None = None  # the shape inside, and whether types and mask were given
        self._views: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}

    def fill(self, request: Request) -> None:
        """Copy a batch into the tensors."""
        shape, types, mask = request.ids.shape, request.types, request.mask
        holds = shape, types is not None, mask is not None
        ids_here, types_here, mask_here = self._inside(shape)
        if holds != self._holds:
            self._holds = None  # if a copy fails, the next call starts anew
            self._clear(shape, types is None)
            if mask is None:
                mask_here.fill_(True)
        if types is None:
            ids_here.copy_(request.ids)
        else:
            torch._foreach_copy_((ids_here, types_here), (request.ids, types))
        if mask is not None:
            mask_here.copy_(mask)
        self._holds = holds

    def _clear(self, shape: torch.Size, types: bool) -> None:
        """Mask everything that a batch of this shape does not cover."""
        if types:
            self.types.zero_()
        if shape != self.mask.shape:
            self.mask.zero_()
            if self._first and shape[0] < self.shape[0]:
                self.mask[shape[0] :, ..., 0] = True

    def _inside(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the tensors that a batch of this shape covers."""
        found = self._views.get(shape)
        if found is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            whole = self.ids, self.types, self.mask
            found = self._views[shape] = tuple(tensor[: shape[0], ..., : shape[-1]] for tensor in whole)
        return found


MOST_VIEWS = 1024  # per bucket; a view takes a microsecond to make and half a KiB to keep
