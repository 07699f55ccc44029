"""What only a GPU shows: bfloat16, no synchronisation, and `use_kernels`, whose mappings transformers keeps for devices."""

import sys

import pytest
import torch
from transformers import KernelConfig
from transformers.activations import GELUActivation

from fastbert.hub.build import write_build
from fastbert.integrations.flash import NAME
from fastbert.testing.models import assert_equal, counting
from tests.gpu import no_synchronisation

from .encoders import FAMILIES, expected, flattened, make, texts, with_gradients

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_flattened_batch_in_16_bits(family, dtype):
    given = texts()
    stock, exact = expected(make(family).to(dtype), given)
    model, batch = make(family, NAME).to(dtype), flattened(family, given)
    with counting() as launched:
        results = with_gradients(model, model(**batch)[0][0])
    assert launched["attention_fwd_kernel"] == 2
    assert_equal(results, stock, exact)


def test_given_bounds_are_not_read():
    model, batch = make("Bert", NAME), flattened("Bert", texts())
    model(**batch)
    with no_synchronisation():
        model(**batch)


@pytest.mark.skipif(not hasattr(GELUActivation, "kernel_layer_name"), reason="this transformers does not use this kernels")
def test_use_kernels(tmp_path):
    write_build(tmp_path)
    given, model = texts((4, 6)), make("Bert", NAME)
    stock, exact = expected(make("Bert"), given)
    model.set_use_kernels(True, KernelConfig({"GeLU": f"{tmp_path}:GeLU"}, use_local_kernel=True))
    forward = model.encoder.layer[0].intermediate.intermediate_act_fn.forward
    copy = sys.modules[forward.__func__.__module__.split(".")[0]]
    results = with_gradients(model, model(**flattened("Bert", given))[0][0])
    assert copy.kernels.core.launch.counts["bias_gelu_fwd_kernel"] == 2
    assert_equal(results, stock, exact)
