"""The checks of `fastbert doctor`: each looks at one thing that decides whether kernels run here, and says what to do.

A check that cannot pass without another, such as a compiler for a GPU that is not there, is a note instead of a failure.
"""

import os
import shutil
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from fastbert import ops
from fastbert.cli.environment import cache_of_triton
from fastbert.cli.interpreter import is_switched_on, numpy_misfit

OK, NOTE, FAILED = "ok", "note", "FAILED"
OLDEST_CAPABILITY = 8  # compute capability 8.0, sm_80


@dataclass(frozen=True)
class Check:
    """What one check found. `advice` says what to do about it, and is empty if all is well."""

    name: str
    state: str  # OK, NOTE or FAILED
    found: str
    advice: str = ""


def all_checks() -> Iterator[Check]:
    """Every check of the machine and the installation, without running a kernel."""
    gpu = torch.cuda.is_available()
    yield check_torch()
    yield from check_gpus()
    yield check_triton()
    yield from check_transformers()
    yield check_compiler(gpu)
    yield check_cache()
    yield from check_variables(gpu)


def check_torch() -> Check:
    """torch must be built for CUDA."""
    found = torch.__version__
    if torch.version.hip is not None:
        return Check("torch", FAILED, f"{found} is built for AMD GPUs", "the kernels need an NVIDIA GPU and torch for CUDA")
    if torch.version.cuda is None:
        advice = "install a CUDA build of torch (pytorch.org, Get started); on a machine without an NVIDIA GPU there is none"
        return Check("torch", FAILED, f"{found} is built without CUDA", advice)
    return Check("torch", OK, f"{found}, built for CUDA {torch.version.cuda}")


def check_gpus() -> Iterator[Check]:
    """There must be an NVIDIA GPU of compute capability 8.0 or newer that torch can use."""
    if not torch.cuda.is_available():
        yield Check("GPU", FAILED, _why_no_gpu(), _what_to_do_without_gpu())
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        name, found = f"GPU {index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"
        if gpu.major < OLDEST_CAPABILITY:
            yield Check(name, FAILED, found, "the kernels need compute capability 8.0 or newer (A100, RTX 30 and later)")
        elif ops.MISSING or f"sm_{gpu.major}{gpu.minor}" in _tables():
            yield Check(name, OK, found)
        else:
            from fastbert.kernels.core.launch import architecture

            table = architecture(torch.device("cuda", index))
            advice = "results are the same; `python -m bench tune` in a checkout finds faster configurations"
            yield Check(name, NOTE, f"{found}: no configurations were tuned for it, those of {table} are used", advice)


def _tables() -> tuple[str, ...]:
    from fastbert.kernels.core.configs import ARCHITECTURES

    return ARCHITECTURES


def _why_no_gpu() -> str:
    """torch's own reason, in one line: no driver, a driver that is too old, no device that is visible."""
    if torch.version.cuda is None:
        return "this torch cannot use a GPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "torch finds none"


def _what_to_do_without_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name a GPU"
    if torch.version.cuda is None or shutil.which("nvidia-smi") is None:
        return "without one, patched models run stock code and compute the same; the kernels run on NVIDIA GPUs only"
    return "nvidia-smi shows the driver's version; a newer driver or a torch for an older CUDA makes them fit"


def check_triton() -> Check:
    """triton must be there, and compile the kernels or, without a GPU, interpret them with the numpy that is there."""
    if ops.MISSING:
        oldest = ".".join(map(str, ops.OLDEST_TRITON))
        advice = f"install triton {oldest} or newer; a CUDA build of torch brings the one that it needs"
        return Check("triton", FAILED, ops.MISSING, advice)
    if not torch.cuda.is_available() and (misfit := numpy_misfit()) is not None:
        return Check("triton", FAILED, *misfit)
    import triton

    return Check("triton", OK, triton.__version__)


def check_transformers() -> Iterator[Check]:
    """A class whose code fastbert was not tested against stays stock."""
    from fastbert import registry
    from fastbert.layers.stock import part_of

    reasons: dict[str, set[str]] = defaultdict(set)
    for entry in registry.ENTRIES:
        if (reason := entry.code.untested(strict=True)) is not None:
            reasons[part_of(entry.stock).family.title].add(reason)
    if not reasons:
        yield Check("transformers", OK, f"{transformers.__version__}, whose models fastbert was tested against")
    for family, found in reasons.items():
        yield Check(
            "transformers",
            FAILED if family == "BERT" else NOTE,
            f"{family}: {sorted(found)[0]}",
            "such modules stay stock: install a release that was tested (README), or patch(model, untested=True) after verify",
        )


def check_compiler(gpu: bool) -> Check:
    """triton compiles a small C file against Python's headers before its first launch."""
    failed = FAILED if gpu else NOTE
    where = "" if gpu else " (only needed with a GPU)"
    given = os.environ.get("CC")
    compiler = shutil.which(given) if given else shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        found = f"CC is {given!r}, which is no program" if given else "there is neither gcc nor clang"
        return Check("C compiler", failed, f"{found}{where}", "install gcc, or set CC to a C compiler")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.exists():
        advice = "install Python's headers (python3-dev on Debian and Ubuntu, python3-devel on Fedora)"
        return Check("C compiler", failed, f"{compiler}, but there is no {headers}{where}", advice)
    return Check("C compiler", OK, compiler)


def check_cache() -> Check:
    """Compiled kernels are kept in a folder."""
    folder, writable = cache_of_triton()
    if folder is None:
        return Check("triton's cache", NOTE, "none, because the kernels cannot be imported", "see triton above")
    home = os.path.expanduser("~")  # still "~" for a user without a home, for whom Path.home() raises
    if folder.is_relative_to(home):
        folder = "~" / folder.relative_to(home)
    if writable:
        return Check("triton's cache", OK, str(folder))
    advice = "set TRITON_CACHE_DIR to a folder that can be written; until then each process compiles anew"
    return Check("triton's cache", NOTE, f"{folder} cannot be written", advice)


def check_variables(gpu: bool) -> Iterator[Check]:
    """Environment variables that keep kernels from running."""
    if os.environ.get("FASTBERT_DISABLE", "0") not in ("", "0"):
        yield Check("FASTBERT_DISABLE", FAILED, "is set: fastbert.patch leaves every model as it is", "unset it")
    if gpu and is_switched_on():
        yield Check("TRITON_INTERPRET", FAILED, "is set: triton runs kernels in its interpreter, not on the GPU", "unset it")
