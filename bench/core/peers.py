"""Finds the other implementations (peers) that a lane may need, and says why one cannot be used here. None: it can."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

NO_GPU = "needs a GPU"
FLASH_ATTN_2 = "kernels-community/flash-attn2"  # what transformers loads through `kernels` where flash-attn is missing


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
    """transformers takes a flash-attn that it accepts, otherwise a kernel through the package `kernels`."""
    from transformers.utils import is_flash_attn_2_available

    if torch.cuda.is_available() and is_flash_attn_2_available():
        return None
    package = _flash_attn() or "transformers does not accept this flash-attn"
    kernel = _local_kernel(FLASH_ATTN_2)
    return None if kernel is None else package if package == NO_GPU else f"{package}; {kernel}"


@contextmanager
def without_downloads() -> Iterator[None]:
    """Let `kernels` and transformers find only what is on this machine."""
    hub = import_module("huggingface_hub.constants")
    with mock.patch.object(hub, "HF_HUB_OFFLINE", True):
        yield


def _local_kernel(repository: str) -> str | None:
    """Why transformers cannot load this kernel from the local cache, or from where LOCAL_KERNELS says."""
    if missing := _importable("kernels", "kernels"):
        return missing
    try:
        hub = import_module("transformers.integrations.hub_kernels")
        with without_downloads():
            hub.load_and_register_attn_kernel(repository)
    except Exception as error:  # an import of compiled code, or releases of transformers and kernels that differ
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{repository} cannot be loaded without a download ({first[:120]})"
    return _gpu()


def _packed_encoders() -> str | None:
    return _importable("packed_encoders", "packed-encoders") and (
        "packed-encoders is not installed; its release 0.2 takes ModernBERT and Qwen3.5, not BERT"
    )


def _liger_models() -> str | None:
    return _importable("liger_kernel", "liger-kernel") and (
        "liger-kernel is not installed; its release 0.8 has no function for BERT"
    )


def pack_encoder(model: Any) -> None:
    """Run `model` by packed-encoders.

    Raises:
        Absent: the package finds no model in it that it supports.
    """
    package = import_module("packed_encoders")
    try:
        package.pack(model)
    except package.PackedEncodersError as error:
        raise Absent(f"packed-encoders {_version('packed-encoders')}: {_first_sentence(error)}") from None


def apply_liger(model: Any) -> None:
    """Run `model` with the kernels that Liger has for its family.

    Raises:
        Absent: it has none.
    """
    liger = import_module("liger_kernel.transformers.monkey_patch")
    family = model.config.model_type
    if family not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise Absent(f"liger-kernel {_version('liger-kernel')} has no function for {family}")
    liger._apply_liger_kernel_to_instance(model)


ADAPTERS: dict[str, Callable[[Any], None]] = {"packed-encoders": pack_encoder, "liger model": apply_liger}


def adapt(peer: str | None, model: Any) -> None:
    """Let `peer` change `model`, if it is a library that patches models."""
    if peer in ADAPTERS:
        ADAPTERS[peer](model)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0]


def _sentence_transformers() -> str | None:
    return _importable("sentence_transformers", "sentence-transformers")


PEERS: dict[str, Callable[[], str | None]] = {
    "flash-attn": _flash_attn,
    "liger": _liger,
    "flash_attention_2": _flash_attention_2,
    "packed-encoders": _packed_encoders,
    "liger model": _liger_models,
    "sentence-transformers": _sentence_transformers,
    "gpu": _gpu,
}


def require(peer: str) -> None:
    """Raise Absent with the reason if `peer` cannot be used here."""
    reason = PEERS[peer]()
    if reason:
        raise Absent(reason)
