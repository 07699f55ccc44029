"""Collects what `fastbert env` prints for a bug report: versions, GPUs and environment variables."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, GPUs and environment variables, as text by name."""
    import torch

    import fastbert
    from fastbert import ops

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    facts: dict[str, Any] = {"fastbert": fastbert.__version__, "python": platform.python_version()}
    facts["system"] = platform.platform()
    facts["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    facts |= {package: version(package) for package in ("triton", "transformers", "peft", "sentence-transformers")}
    facts["kernels"] = ops.MISSING or ("in Triton's interpreter" if ops.INTERPRETED else "compiled, on CUDA tensors")
    facts["Triton's cache"] = _cache_in_words()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        facts[f"GPU {index}"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
    if not torch.cuda.device_count():
        facts["GPU"] = "none"
    facts |= {name: os.environ.get(name, "not set") for name in ("FASTBERT_DISABLE", "TRITON_INTERPRET")}
    return facts


def cache_of_triton() -> tuple[Path | None, bool]:
    """The folder of compiled kernels, None without triton, and whether it can be written."""
    from fastbert import ops

    if ops.MISSING:
        return None, True
    import triton

    folder = existing = Path(triton.knobs.cache.dir)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return folder, existing.is_dir() and os.access(existing, os.W_OK)


def _cache_in_words() -> str:
    folder, writable = cache_of_triton()
    if folder is None:
        return "none"
    return str(folder) if writable else f"{folder}, which is not writable: set TRITON_CACHE_DIR to a writable folder"
