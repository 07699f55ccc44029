"""docs/kernels-hub.md: attention by name in an embedder, and the folder of `fastbert hub` through the package `kernels`."""

from pathlib import Path

import torch
from kernels import use_kernel_mapping
from torch import nn
from transformers.activations import ACT2FN, GELUActivation

import fastbert
from fastbert.testing.models import counting
from fastbert.testing.rows import DEVICE
from tests.docs.play import Play
from tests.embedders.tiny import TEXTS, save
from tests.hub import written


def play(folder: Path) -> Play:
    names = {"texts": TEXTS}
    with counting() as launched:
        yield names, {"BAAI/bge-m3": save(folder / "bert"), "bfloat16": "float32"}
    assert names["embeddings"].shape == (len(TEXTS), 32)
    assert launched["attention_fwd_kernel"] == 2
    assert [r.reason for r in fastbert.report(names["model"]).rows if r.state == "active"] == ["selected by name"] * 2

    layer = nn.Linear(8, 24, device=DEVICE)
    names = {"DIR": str(written.build()), "model": nn.Sequential(layer, ACT2FN["gelu"])}
    with use_kernel_mapping({}, inherit_mapping=False):
        yield names, {'"cuda"': repr(DEVICE.type)}
    x = torch.randn(3, 8, device=DEVICE)
    torch.testing.assert_close(names["model"](x), nn.functional.gelu(layer(x)))
    if hasattr(GELUActivation, "kernel_layer_name"):  # a transformers that uses this release of kernels
        assert names["kernel"].kernels.core.launch.counts["bias_gelu_fwd_kernel"]
