"""Triton is missing, too old, or cannot write its cache: fastbert says so, and the model runs."""

import errno
import importlib.util
import json
import logging
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import triton

from fastbert import ops
from fastbert.cli.environment import environment
from fastbert.kernels.core import failures

from .broken import break_kernels
from .cases import cases
from .processes import COMPILE, start


def fresh_ops():
    """A second import of fastbert.ops, beside the one in use."""
    spec = importlib.util.spec_from_file_location("fastbert_ops_again", ops.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["2.1.0", "3.4.0", "3.4.1+git0d2e3f", "3.0.0.post1"])
def test_too_old(version, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: version)
    found = fresh_ops()
    assert f"the kernels cannot be imported: triton {version} is too old, 3.5 or newer is needed" == found.MISSING
    assert found.bias_gelu is None and found.attention is None


@pytest.mark.parametrize("version", ["3.5.0", "3.5.1+gitab12", "3.10.0", "4.0", "unknown"])
def test_new_enough(version, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: version)
    assert fresh_ops().MISSING is None


def test_under_another_name(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert fresh_ops().MISSING is None


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastbert.kernels.attention", None)
    assert fresh_ops().MISSING.startswith("the kernels cannot be imported: ")


@pytest.mark.parametrize("how", ["missing", pytest.param("too old", marks=pytest.mark.long)])
def test_a_model_trains_without(how, tmp_path):
    """Results are bitwise stock's, AdamW steps like torch's, and report and `fastbert env` give the reason."""
    hidden = 'sys.modules["triton"] = None' if how == "missing" else "metadata.version = older"
    program = f"""
import sys
from importlib import metadata
version = metadata.version
older = lambda package: "3.1.0" if package == "triton" else version(package)
{hidden}
from tests.faults.without_triton import check
check("{"too old" if how == "too old" else "triton"}")
"""
    process = start(program, cache=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0 and out.strip() == "checked", err[-3000:]


def unwritable(tmp_path):
    """A folder below a file, which even root cannot create."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


USELESS = {
    "EACCES": lambda: OSError(errno.EACCES, "Permission denied"),
    "EROFS": lambda: OSError(errno.EROFS, "Read-only file system"),
    "ENOSPC": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "ENOTDIR": lambda: OSError(errno.ENOTDIR, "Not a directory"),
    "deleted": lambda: OSError(errno.ENOENT, "No such file or directory", os.path.join(triton.knobs.cache.dir, "x.ptx")),
    "incomplete": lambda: KeyError("Unknown key: 'cubin'"),
    "damaged": lambda: json.JSONDecodeError("Expecting value", "", 0),
    "not text": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
}


def test_a_missing_compiler_is_no_fault_of_the_cache(monkeypatch):
    monkeypatch.setattr(failures.move_cache, "folder", None)
    assert not failures.move_cache(OSError(errno.ENOENT, "No such file or directory", "/usr/bin/gcc"))
    assert failures.move_cache.folder is None


@pytest.mark.parametrize("error", USELESS)
def test_another_cache_is_taken_once(error, monkeypatch, caplog, launches):
    case = cases()["bias_gelu gelu"]
    (broken,) = break_kernels(monkeypatch, case.forward, USELESS[error], bad=1).values()
    monkeypatch.setattr(failures.move_cache, "folder", None)
    with triton.knobs.cache.scope(), caplog.at_level(logging.WARNING, "fastbert"):
        former = triton.knobs.cache.dir
        case.check(case.run())
        assert os.path.isdir(triton.knobs.cache.dir) and triton.knobs.cache.dir != former
    (record,) = caplog.records
    assert former in record.message and "TRITON_CACHE_DIR" in record.message
    assert broken.attempts == 1 and not failures.reasons and launches()["bias_gelu_fwd_kernel"] == 1


@pytest.mark.long
def test_a_cache_that_cannot_be_written(tmp_path):
    """Triton itself raises NotADirectoryError or PermissionError from its first compilation."""
    cache = unwritable(tmp_path)
    program = COMPILE + "print(compile_once(), failures.reasons, triton.knobs.cache.dir, len(launch.counts))"
    process = start(program, cache=cache, TMPDIR=str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    digest, reasons, folder, launched = out.split()
    assert len(digest) == 64 and reasons == "{}" and launched == "1"
    assert folder.startswith(str(tmp_path / "fastbert-triton-"))
    assert err.count("cannot be used") == 1 and str(cache) in err and "TRITON_CACHE_DIR" in err
    assert not os.path.exists(folder)  # removed with the process


@pytest.mark.long
@pytest.mark.parametrize("damage", ["truncated", "not text", "deleted"])
def test_a_damaged_cache(damage, tmp_path):
    """Triton itself finds an entry that another process wrote, and cannot read it."""
    cache, program = tmp_path / "cache", COMPILE + "print(compile_once(), failures.reasons, triton.knobs.cache.dir)"
    first, err = start(program, cache=cache).communicate()
    assert first, err[-3000:]
    for path in cache.glob("*/gather_rows*"):
        if path.suffix == ".json" and damage == "truncated":
            path.write_text(path.read_text()[:20])
        elif path.suffix == ".ttir" and damage == "not text":
            path.write_bytes(b"\xff")
        elif path.suffix == ".cubin" and damage == "deleted":
            path.unlink()
    process = start(program, cache=cache, TMPDIR=str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    digest, reasons, folder = out.split()
    assert digest == first.split()[0] and reasons == "{}", (out, first)
    assert folder.startswith(str(tmp_path / "fastbert-triton-")) and str(cache) in err and "damaged" in err


def test_no_folder_at_all_can_be_written(monkeypatch, caplog):
    """Neither the cache nor a temporary folder: plain PyTorch runs, after one log line for the cache and one for the kernel."""
    case = cases()["bias_gelu gelu"]
    monkeypatch.setattr(failures.move_cache, "folder", None)
    (broken,) = break_kernels(monkeypatch, case.forward, lambda: PermissionError(13, "Permission denied")).values()
    with triton.knobs.cache.scope(), caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(2):
            case.check(case.run())
        assert failures.move_cache.folder.name == triton.knobs.cache.dir
    cache, kernel = (record.message for record in caplog.records)
    assert "TRITON_CACHE_DIR" in cache and "bias_gelu_fwd_kernel" in kernel and "PermissionError" in kernel
    assert broken.attempts == 2


def test_env_says_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there" / "yet"))
    assert environment()["Triton's cache"] == str(tmp_path / "not" / "there" / "yet")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(unwritable(tmp_path)))
    assert "not writable: set TRITON_CACHE_DIR" in environment()["Triton's cache"]


def test_env_asks_for_permission(tmp_path, monkeypatch):
    """Simulated by os.access, because root may write into any folder."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode == os.W_OK))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert "not writable" in environment()["Triton's cache"]
