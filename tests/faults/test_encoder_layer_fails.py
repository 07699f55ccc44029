"""A kernel of the layer op that does not compile or launch: plain PyTorch computes that pass with the same dropout."""

import pytest
import torch

from fastbert.kernels.core import failures
from fastbert.kernels.encoder_layer import KERNELS, Settings, encoder_layer, reference
from fastbert.testing.encoder_layer import assert_right, direct, flat, kept, make_inputs, seeds, together
from fastbert.testing.rows import DEVICE, double, run

from .broken import ERRORS, break_kernels

DROPPED = Settings(3, attention_p=0.2, attention_output_p=0.3, output_p=0.4)
FORWARD = [name for name in KERNELS if "_fwd_" in name]
BACKWARD = [name for name in KERNELS if name not in FORWARD]
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0], [0] * 5], dtype=torch.bool, device=DEVICE)
READ = {"cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE), "max_seqlen": 6}
INDEX = torch.tensor([8, -1, 4], dtype=torch.int32, device=DEVICE)
CAUSAL_READ = READ | {"index": INDEX, "inverse": torch.tensor([-1] * 4 + [2] + [-1] * 3 + [0, -1]).to(INDEX)}
READ |= {"cu_seqlens_q": torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE), "max_seqlen_q": 2}
CALLS = {
    "padded": ((3, 5, 24), None, torch.float32, {"settings": DROPPED, "key_mask": MASK}),
    "without dropout": ((3, 5, 24), None, torch.float64, {"settings": Settings(3)}),
    "read": ((10, 24), 3, torch.float32, {"settings": DROPPED, **READ}),
    "read anywhere": ((10, 24), None, torch.float32, {"settings": DROPPED._replace(causal=True), **CAUSAL_READ}),
    "autocast": (
        (3, 5, 24),
        None,
        torch.float32,
        {"settings": DROPPED, "product_dtype": torch.float16, "norm_dtype": torch.float32},
    ),
}


def made(call):
    shape, queries, dtype, options = CALLS[call]
    inputs = make_inputs(shape, dtype=dtype, queries=queries)
    if queries is not None or "index" in options:
        shape = 3, 24
    return inputs, torch.randn(shape).to(DEVICE, dtype), options | {"seed": seeds()}


def unused(call):
    """The attention kernels that a backward does not use: short 16-bit sequences take one kernel, others two."""
    return ("attention_bwd_q_kernel", "attention_bwd_kv_kernel") if call == "autocast" else ("attention_bwd_short_kernel",)


def check(results, inputs, dy, options):
    plainly = {name: value for name, value in options.items() if name != "seed"}
    plainly["keep"] = kept(inputs, options["settings"], options)
    eager = run(flat(reference.encoder_layer), inputs, dy, **plainly)
    exactly = plainly | dict.fromkeys(("product_dtype", "norm_dtype"))
    exact = run(flat(reference.encoder_layer), double(inputs), dy.double(), **exactly)
    rounded = options.get("product_dtype") == torch.float16
    assert_right(*map(together, (results, eager, exact)), rounded=rounded)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.one_in(2)
def test_is_right_all_the_same(name, call, monkeypatch, caplog):
    inputs, dy, options = made(call)
    break_kernels(monkeypatch, [name])
    for _ in range(2):
        check(run(flat(encoder_layer), inputs, dy, **options), inputs, dy, options)
    failed = name not in unused(call)
    assert failures.reasons.keys() == ({name} if failed else set())
    assert len([record for record in caplog.records if name in record.message]) == failed


@pytest.mark.parametrize("call", ["padded", "read", "autocast"])
@pytest.mark.parametrize("names", [FORWARD, BACKWARD, KERNELS], ids=["forward", "backward", "all"])
def test_several_kernels_fail(names, call, monkeypatch):
    inputs, dy, options = made(call)
    break_kernels(monkeypatch, names)
    check(run(flat(encoder_layer), inputs, dy, **options), inputs, dy, options)
    assert failures.reasons.keys() <= set(names) and failures.reasons


@pytest.mark.parametrize("name", ["attention_bwd_kv_kernel", "column_sums_kernel"])
def test_the_gradients_that_are_needed_and_no_others(name, monkeypatch):
    inputs, dy, options = made("padded")
    needed = {"x", "output_bias"}
    wanted = run(flat(encoder_layer), inputs, dy, inputs.keys() - needed, **options)
    break_kernels(monkeypatch, [name])
    found = run(flat(encoder_layer), inputs, dy, inputs.keys() - needed, **options)
    assert {k for k, x in found.items() if x is not None} == {"y", "dx", "doutput_bias"}
    for k in ("dx", "doutput_bias"):
        torch.testing.assert_close(found[k], wanted[k])


@pytest.mark.parametrize("name", ["bias_gelu_fwd_kernel", "dropout_add_layernorm_fwd_kernel"])
def test_a_layer_gets_the_failure(name, monkeypatch):
    """The modules then take over, and each has a plain fallback for the failed kernel only."""
    inputs, _, options = made("without dropout")
    break_kernels(monkeypatch, [name])
    with pytest.raises(failures.KernelFailed, match=name):
        flat(direct)(**inputs, settings=Settings(3))
    assert failures.reasons.keys() == {name}


@pytest.mark.parametrize("name", ["attention_fwd_kernel", "attention_bwd_q_kernel", "column_sums_kernel"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_what_is_no_fault_of_the_kernel_is_raised(name, strict, monkeypatch):
    inputs, dy, options = made("padded")
    error = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(failures, "strict", strict)

    def raised():
        raise error

    break_kernels(monkeypatch, [name], raised)
    with pytest.raises(torch.OutOfMemoryError):
        run(flat(encoder_layer), inputs, dy, **options)
    assert not failures.reasons


@pytest.mark.parametrize("name", ["attention_fwd_kernel", "attention_bwd_q_kernel"])
def test_strict_raises(name, monkeypatch):
    inputs, dy, options = made("padded")
    monkeypatch.setattr(failures, "strict", True)
    break_kernels(monkeypatch, [name], ERRORS["ptxas"])
    with pytest.raises(failures.KernelFailed, match=name):
        run(flat(encoder_layer), inputs, dy, **options)
