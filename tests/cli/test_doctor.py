"""`fastbert doctor`: each fault of a machine is named with what to do about it, and decides the exit code."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from fastbert import forwards, ops
from fastbert.cli import checks, doctor
from fastbert.cli.checks import FAILED, NOTE, OK
from fastbert.kernels.core import launch
from fastbert.registry import ENTRIES

H100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend, to the checks, that torch was built for CUDA and sees these GPUs."""

    def pretend(*gpus, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (gpus[0].major, gpus[0].minor))
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


@pytest.fixture
def whole(monkeypatch):
    """A machine without variables that change anything."""
    for name in ("FASTBERT_DISABLE", "TRITON_INTERPRET", "CC", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def wrong():
    return {check.name: check for check in checks.all_checks() if check.state != OK}


def test_nothing_is_wrong_with_a_whole_machine(gpu, whole):
    gpu(H100)
    assert wrong() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is that of a machine without a GPU")
def test_on_a_machine_without_a_gpu(fastbert_says):
    """The self-test runs in the interpreter, and passes; the verdict is that no model would run on a kernel here."""
    code, out, err = fastbert_says("doctor")
    assert code == 1 and "Triton's interpreter" in err
    assert out.splitlines()[-1].startswith("NOT READY: patched models run stock code here")
    (test,) = [line for line in out.splitlines() if line.startswith("ok") and "self-test" in line]
    assert "of a tiny BERT" in out and "in Triton's interpreter on" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json(fastbert_says, tmp_path):
    code, out, _ = fastbert_says("doctor", "--json", "-")
    found = json.loads(out)
    assert found["ok"] is (code == 0)
    assert {check["name"] for check in found["checks"]} >= {"torch", "triton", "transformers", "self-test"}
    assert all(check["advice"] for check in found["checks"] if check["state"] == FAILED)
    assert found["self_test"]["ok"] and found["self_test"]["kernel_calls"] and found["environment"]["torch"]


def test_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    found = checks.check_torch()
    assert found.state == FAILED and "without CUDA" in found.found and "CUDA build" in found.advice


def test_torch_for_amd(gpu):
    gpu(hip="6.4")
    assert checks.check_torch().state == FAILED and "AMD" in checks.check_torch().found


@pytest.mark.parametrize(
    "said", ["The NVIDIA driver on your system is too old (found version 11040)", "Found no NVIDIA driver"]
)
def test_a_driver_that_does_not_fit(gpu, whole, monkeypatch, said):
    def refuse():
        raise RuntimeError(f"{said}.\nPlease update.")

    gpu()
    monkeypatch.setattr(torch.cuda, "init", refuse)
    (found,) = checks.check_gpus()
    assert (found.state, found.found) == (FAILED, f"{said}.") and found.advice


def test_hidden_gpus(gpu, whole, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = checks.check_gpus()
    assert found.state == FAILED and "CUDA_VISIBLE_DEVICES is ''" in found.advice


@pytest.mark.parametrize(("capability", "state"), [((7, 5), FAILED), ((8, 0), OK), ((8, 9), NOTE), ((12, 0), NOTE)])
def test_an_architecture(gpu, capability, state, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_80")
    gpu(SimpleNamespace(name="some GPU", major=capability[0], minor=capability[1]))
    (found,) = checks.check_gpus()
    assert found.state == state and bool(found.advice) is (state != OK)


def test_triton_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr(ops, "MISSING", "the kernels cannot be imported: No module named 'triton'")
    found = checks.check_triton()
    assert found.state == FAILED and "No module" in found.found and "install triton 3.5" in found.advice
    test, result = doctor.self_test()
    assert test.state == FAILED and result is None and test.advice


def test_a_release_of_transformers_that_is_not_known(monkeypatch):
    monkeypatch.setattr(forwards, "table", lambda package="transformers": {})
    monkeypatch.setattr(forwards, "_judged", {})
    for entry in ENTRIES:
        monkeypatch.setattr(entry.code, "_functions", None)
        monkeypatch.setattr(entry.code, "_reason", None)
    found = {check.found.partition(":")[0]: check for check in checks.check_transformers()}
    assert found["BERT"].state == FAILED and transformers.__version__ in found["BERT"].found
    assert found["RoBERTa"].state == NOTE and found["RoBERTa"].advice


def test_no_compiler(gpu, whole, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.check_compiler(gpu=True).state == FAILED and "gcc" in checks.check_compiler(gpu=True).advice
    assert checks.check_compiler(gpu=False).state == NOTE
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "'no-such-compiler'" in checks.check_compiler(gpu=True).found


def test_no_headers_of_python(whole, monkeypatch, tmp_path):
    monkeypatch.setattr(checks.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    found = checks.check_compiler(gpu=True)
    assert found.state == FAILED and "Python.h" in found.found and "python3-dev" in found.advice


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "cache_of_triton", lambda: (tmp_path / "cache", False))
    found = checks.check_cache()
    assert found.state == NOTE and "TRITON_CACHE_DIR" in found.advice


def test_a_user_without_a_home(monkeypatch, tmp_path):
    """A container may run as a user whom no one has named: HOME is not set, and `~` means nothing."""
    monkeypatch.setattr(checks.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(checks, "cache_of_triton", lambda: (tmp_path / "cache", True))
    assert checks.check_cache() == checks.Check("triton's cache", OK, str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["FASTBERT_DISABLE", "TRITON_INTERPRET"])
def test_variables(whole, monkeypatch, name):
    assert list(checks.check_variables(gpu=True)) == []
    monkeypatch.setenv(name, "1")
    (found,) = checks.check_variables(gpu=True)
    assert (found.name, found.state, found.advice) == (name, FAILED, "unset it")


def test_a_kernel_that_computes_something_else(monkeypatch):
    right = ops.encoder_layer
    monkeypatch.setattr(ops, "encoder_layer", lambda *arguments: right(*arguments) * 1.01)
    test, result = doctor.self_test()
    assert test.state == FAILED and not result.ok and "do not use fastbert here" in test.advice
    diagnosis = doctor.Diagnosis({}, (test,), result)
    assert not diagnosis.ok and "self-test failed" in diagnosis.verdict


def test_a_self_test_that_raises_is_no_traceback(monkeypatch):
    def broken(*arguments):
        raise OSError("ptxas:\n  not found")

    monkeypatch.setattr(doctor.fastbert, "verify", broken)
    test, result = doctor.self_test()
    assert (test.state, test.found, result) == (FAILED, "OSError: ptxas: not found", None) and test.advice


def test_a_disabled_machine_says_why_nothing_ran(monkeypatch):
    monkeypatch.setenv("FASTBERT_DISABLE", "1")
    test, result = doctor.self_test()
    assert test.state == FAILED and result.kernel_calls == 0 and "no call went through a kernel" in test.found


def test_the_verdict_of_a_whole_machine():
    ready = doctor.Diagnosis({}, (checks.Check("torch", OK, ""), checks.Check("GPU 0", NOTE, "", "x")), None)
    assert ready.ok and ready.verdict.startswith("READY")
