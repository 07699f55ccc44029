"""Finds the other implementations (peers) that a lane may need, and says why one cannot be used here. None: it can."""

from collections.abc import Callable
from importlib.util import find_spec

import torch

NO_GPU = "needs a GPU"


class Absent(Exception):
    """This lane cannot run this case. The message gives the reason."""


def _importable(module: str, package: str) -> str | None:
    return None if find_spec(module) else f"{package} is not installed"


def _gpu() -> str | None:
    return None if torch.cuda.is_available() else NO_GPU


def _flash_attn() -> str | None:
    return _importable("flash_attn", "flash-attn") or _gpu()


def _liger() -> str | None:
    return _importable("liger_kernel", "liger-kernel") or _gpu()


def _flash_attention_2() -> str | None:
    """transformers' own check, which requires a GPU and a supported version of flash-attn."""
    from transformers.utils import is_flash_attn_2_available

    return _flash_attn() or (None if is_flash_attn_2_available() else "transformers does not accept this flash-attn")


PEERS: dict[str, Callable[[], str | None]] = {
    "flash-attn": _flash_attn,
    "liger": _liger,
    "flash_attention_2": _flash_attention_2,
    "gpu": _gpu,
}


def require(peer: str) -> None:
    """Raise Absent with the reason if `peer` cannot be used here."""
    reason = PEERS[peer]()
    if reason:
        raise Absent(reason)
