"""Whole models whose kernels fail: outputs, losses and gradients are unchanged, and the report names kernel and reason."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.kernels.core import failures
from fastbert.kernels.encoder_layer import KERNELS as LAYER
from fastbert.testing.models import KERNELS, assert_equal, doubled, launches_of, run
from tests.models.tiny import MLM, make, make_batch

from .broken import break_kernels
from .cases import cases

FORWARD = {name for kernel in KERNELS.values() for name in launches_of(kernel, 1, 0)}
BACKWARD = {name for kernel in KERNELS.values() for name in launches_of(kernel, 0, 1)}
TABLES = {f"embedding_layernorm_bwd_{part}_kernel" for part in ("order", "runs", "sums", "finish")}
HEADS = {f"linear_cross_entropy_{part}_kernel" for part in ("fwd", "reduce", "bwd_scale")}
PACKING = {f"{op}_kernel" for op in ("gather_rows", "key_bounds", "row_counts", "packed_rows")}
EVERY = FORWARD | BACKWARD | TABLES | HEADS | PACKING


@pytest.mark.parametrize("broken", [FORWARD | HEADS, BACKWARD | TABLES, EVERY], ids=["forward", "backward", "every"])
@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "packed"])
@pytest.mark.one_in(2)
def test_is_equal_to_stock(unpad, broken, monkeypatch, launches):
    model, batch = make(MLM), make_batch(MLM)
    # No hidden states in the output, so zeros at padded positions are not visible.
    options = {"unpad": True, "mlm_logits": "none"} if unpad else {"unpad": False}
    model.train()
    patched = fastbert.patch(copy.deepcopy(model), **options)
    attempts = break_kernels(monkeypatch, broken)
    results = [run(patched, batch) for _ in range(2)]
    assert failures.reasons.keys() <= broken and not launches().keys() & broken
    # Attempts: one in the layer op by the first forward, or by each pending backward, and one by the module's own launcher.
    layers = 1 + len(patched.bert.encoder.layer)
    most = {name: layers if "bwd" in name or name == "column_sums_kernel" else 2 for name in LAYER}
    assert not {name: k.attempts for name, k in attempts.items() if k.attempts > most.get(name, 1)}
    eager, exact = run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
    for found in (eager, exact):
        found.pop("logits" if unpad else "", None)
    for found in results:
        assert_equal(found, eager, exact)


@pytest.mark.parametrize(("kernels", "good"), [(FORWARD, 1), (BACKWARD, 0)], ids=["forward", "backward"])
def test_a_step_with_dropout_and_checkpoints_goes_on(kernels, good, monkeypatch):
    """Kernels that fail mid-step: a recomputed forward draws the first one's dropout, on a kernel or in plain PyTorch."""
    settings = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "num_hidden_layers": 1}
    model, batch = fastbert.patch(make(MLM, **settings)).train(), make_batch(MLM)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(model, batch):
        torch.manual_seed(7)
        return run(model, batch)

    intact = step(copy.deepcopy(model), batch)
    with monkeypatch.context() as patch:  # float64 takes longest in the interpreter
        break_kernels(patch, EVERY)
        exact = step(copy.deepcopy(model).double(), doubled(batch))
    failures.reset()
    broken = break_kernels(monkeypatch, kernels, good=good)
    assert_equal(step(model, batch), intact, exact)
    assert failures.reasons.keys() <= kernels and any(kernel.attempts for kernel in broken.values())


def test_report_names_the_kernel(monkeypatch):
    model = fastbert.patch(make(MLM))
    break_kernels(monkeypatch, ["bias_gelu_fwd_kernel", "gelu_layernorm_bwd_kernel"])
    for _ in range(2):
        run(model, make_batch(MLM))
    rows = {row.hf_class: row for row in fastbert.report(model).rows}
    fell_back, backward = rows[bert.BertIntermediate.__name__], rows[bert.BertPredictionHeadTransform.__name__]
    assert fell_back.state == "fell back" and fell_back.kernel_calls == 0
    ((reason, calls),) = fell_back.fallback_calls.items()
    assert calls == 2 and "bias_gelu_fwd_kernel failed: OutOfResources: out of resource: shared memory" in reason
    assert backward.state == "active" and backward.kernel_calls == 2 and not backward.fallback_calls
    assert "gelu_layernorm_bwd_kernel failed: OutOfResources" in backward.reason
    assert "bias_gelu_fwd_kernel failed" in str(fastbert.report(model))


def test_report_names_kernels_that_are_no_modules_own(monkeypatch):
    """What finishes a layer's gradients, bounds its mask or counts the rows to pack belongs to the module that launches it."""
    model = fastbert.patch(make(MLM), unpad=True, mlm_logits="none")
    batch = make_batch(MLM)
    run(model, batch)
    assert not any("failed" in row.reason for row in fastbert.report(model).rows)
    helpers = dict.fromkeys(("row_counts_kernel", "packed_rows_kernel"), bert.BertEncoder)
    helpers["column_sums_kernel"] = bert.BertLayer
    break_kernels(monkeypatch, helpers)
    run(model, batch)
    rows = {row.hf_class: row for row in fastbert.report(model).rows}
    assert failures.reasons.keys() == helpers.keys()
    for kernel, cls in helpers.items():
        row = rows[cls.__name__]
        assert row.state == "active" and f"{kernel} failed: OutOfResources" in row.reason
        assert not any(kernel in other.reason for other in rows.values() if other.hf_class not in (cls.__name__, _TRANSFORM))


_TRANSFORM = bert.BertPredictionHeadTransform.__name__  # its gradients end in column_sums too


def test_in_a_compiled_model(monkeypatch):
    """The custom ops use the same launchers, so a compiled model continues too."""
    case = cases()["bias_gelu gelu"]
    torch._dynamo.reset()
    broken = break_kernels(monkeypatch, (*case.forward, *case.backward))
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    case.check(replace(case, call=compiled).run())
    assert failures.reasons.keys() == broken.keys()
