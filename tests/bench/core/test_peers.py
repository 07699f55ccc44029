"""Other libraries that lanes need: each that cannot run here says why, and nothing is downloaded to find out."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from bench.core import peers
from bench.models import workloads
from bench.models.run import run

TINY = workloads.tiny(workloads.Workload("tiny", "mlm", "train", 4, 16, 0.5))
LIBRARIES = (workloads.FLATTENED_FLASH, workloads.FLASH_ATTENTION_2, workloads.PACKED_ENCODERS, workloads.LIGER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a lane of FlashAttention-2 may run on a GPU")
@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_lane_without_its_library_says_why(lane):
    (record,) = run(TINY, lane, details=False)
    assert record.status == "absent" and record.reason


def test_a_kernel_that_is_not_here_is_not_downloaded(monkeypatch):
    from huggingface_hub import HfApi, constants

    def download(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "list_repo_refs", download)
    monkeypatch.setenv("KERNELS_CACHE", "/nowhere")
    said = peers._local_kernel("kernels-community/no-such-kernel-flash2")
    assert "cannot be loaded without a download" in said and "a download)" not in said
    assert constants.HF_HUB_OFFLINE is False


def test_what_transformers_could_load_needs_a_gpu(monkeypatch):
    hub = pytest.importorskip("transformers.integrations.hub_kernels")
    monkeypatch.setattr(hub, "load_and_register_attn_kernel", lambda repository: ModuleType("kernel"))
    monkeypatch.setattr(peers, "_importable", lambda module, package: None)
    assert peers._local_kernel(peers.FLASH_ATTN_2) == (None if torch.cuda.is_available() else peers.NO_GPU)


def library(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class Unsupported(Exception):
    pass


def test_a_library_that_does_not_know_bert_is_absent(monkeypatch):
    """Both libraries are asked about the model itself, so that a release which learns BERT becomes a lane with a time."""
    model = BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))

    def refuse(target):
        raise Unsupported("could not locate a supported backbone in 'BertModel' (engines: modernbert). More words.")

    library(monkeypatch, "packed_encoders", pack=refuse, PackedEncodersError=Unsupported)
    with pytest.raises(peers.Absent, match=r"^packed-encoders .*: could not locate .* \(engines: modernbert\)$"):
        peers.adapt("packed-encoders", model)
    library(monkeypatch, "liger_kernel")
    library(monkeypatch, "liger_kernel.transformers")
    library(monkeypatch, "liger_kernel.transformers.monkey_patch", MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    with pytest.raises(peers.Absent, match="has no function for bert"):
        peers.adapt("liger model", model)


def test_a_library_that_knows_bert_changes_the_model(monkeypatch):
    packed, applied = [], []
    library(monkeypatch, "packed_encoders", pack=packed.append, PackedEncodersError=Unsupported)
    known = {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"bert": None}, "_apply_liger_kernel_to_instance": applied.append}
    library(monkeypatch, "liger_kernel")
    library(monkeypatch, "liger_kernel.transformers")
    library(monkeypatch, "liger_kernel.transformers.monkey_patch", **known)
    model = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
    for peer in (None, "gpu", "packed-encoders", "liger model"):
        peers.adapt(peer, model)
    assert packed == applied == [model]
