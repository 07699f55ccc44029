"""The folder that `fastbert hub` writes, loaded by Hugging Face's `kernels` package beside the installed fastbert."""

import json
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from torch import nn
from transformers.activations import ACT2FN, GELUActivation

import fastbert
from fastbert.hub.build import write_build
from fastbert.kernels.core.op import NAMESPACE
from fastbert.testing.models import assert_equal, counting, gradients
from fastbert.testing.rows import DEVICE
from tests.packaging.environments import ROOT

from . import written
from .encoders import expected, flattened, make, one_by_one, texts, with_gradients

by_name = pytest.mark.skipif(
    not hasattr(GELUActivation, "kernel_layer_name"), reason="this transformers does not use this release of kernels"
)
LAYERS = {"gelu": "GeLU", "gelu_pytorch_tanh": "GeluTanh", "gelu_new": "NewGELU", "gelu_fast": "FastGELU", "silu": "SiLU"}


@pytest.fixture(scope="module")
def build() -> Path:
    return written.build()


@pytest.fixture(scope="module")
def kernel(build: Path):
    return get_local_kernel(build)


def of_the_copy(kernel) -> dict[str, int]:
    return dict(kernel.kernels.core.launch.counts)


def mapping(build: Path, mode: Mode | None = None):
    repositories = {name: LocalLayerRepository(build, layer_name=name) for name in LAYERS.values()}
    return {name: {DEVICE.type: found if mode is None else {mode: found}} for name, found in repositories.items()}


def test_the_loader_takes_it_under_a_name_of_its_own(kernel, build):
    metadata = json.loads((build / "build/torch-universal/metadata.json").read_text())
    assert kernel.__name__ == metadata["id"] != "fastbert" and kernel.__version__ == fastbert.__version__
    assert set(kernel.__all__) == {"flash_attn_func", "flash_attn_varlen_func", "layers"}
    [loaded] = [found for found in kernels.get_loaded_kernels() if found.module is kernel]
    assert str(loaded.metadata.name) == "fastbert" and loaded.metadata.license == "Apache-2.0"


def test_custom_ops_of_both_copies(kernel):
    """Each copy compiles to ops of its own: torch.library takes a name once."""
    assert NAMESPACE == "fastbert" and kernel.__name__ == kernel.kernels.core.op.NAMESPACE
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    found = []
    for function in (fastbert.ops.bias_gelu, kernel.kernels.bias_gelu.bias_gelu):
        torch.compiler.reset()
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.compiler.reset()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert hasattr(getattr(torch.ops, kernel.__name__), "bias_gelu") and hasattr(torch.ops.fastbert, "bias_gelu")


@by_name
@pytest.mark.parametrize("name", LAYERS)
def test_kernelize_replaces_activations(name, kernel, build):
    torch.manual_seed(0)
    stock, model = (nn.Sequential(nn.Linear(8, 24, device=DEVICE), ACT2FN[name]) for _ in range(2))
    model.load_state_dict(stock.state_dict())
    with use_kernel_mapping(mapping(build)):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=DEVICE, use_fallback=False)
    x = torch.randn(5, 8, device=DEVICE)

    def results(module, x):
        out = module(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).view(out.shape)).sum().backward()
        return {"out": out.detach()} | gradients(module.named_parameters())

    before = of_the_copy(kernel)
    found = results(model, x)
    assert of_the_copy(kernel)["bias_gelu_fwd_kernel"] == before.get("bias_gelu_fwd_kernel", 0) + 1
    assert of_the_copy(kernel)["bias_gelu_bwd_kernel"] == before.get("bias_gelu_bwd_kernel", 0) + 1
    in_float32 = results(stock, x)
    stock.zero_grad()
    assert_equal(found, in_float32, results(stock.double(), x.double()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_kernel_does_not_take_is_stocks(name, dtype, kernel):
    if DEVICE.type == "cuda" and dtype == torch.bfloat16:
        pytest.skip("a GPU's kernels take bfloat16")
    x = torch.arange(-3, 4, device=DEVICE).to(dtype)
    layer = getattr(kernel.layers, LAYERS[name])()
    before = of_the_copy(kernel)
    torch.testing.assert_close(layer(x), ACT2FN[name](x), rtol=0.0, atol=0.0)
    torch.testing.assert_close(torch.func.vmap(layer)(x.float()), ACT2FN[name](x.float()))
    assert of_the_copy(kernel) == before


@by_name
@pytest.mark.parametrize("order", ["kernelize alone", "kernelize, patch", "patch, kernelize"])
def test_a_bert_with_and_without_patch(order, kernel, build):
    given, model = texts((4, 6)), make("Bert")
    stock, exact = expected(make("Bert"), given)
    steps = {
        "kernelize": lambda: kernelize(model, mode=Mode.TRAINING, device=DEVICE),
        "patch": lambda: fastbert.patch(model),
    }
    with use_kernel_mapping(mapping(build)):
        for step in order.removesuffix(" alone").split(", "):
            steps[step]()
    before = of_the_copy(kernel).get("bias_gelu_fwd_kernel", 0)
    with counting() as launched:
        results = with_gradients(model, one_by_one(model, given))
    assert_equal(results, stock, exact)
    assert of_the_copy(kernel)["bias_gelu_fwd_kernel"] == before + 4  # two texts, two layers
    assert not any(row.hf_class == "BertLayer" and row.state == "active" for row in fastbert.report(model).rows)
    assert launched["bias_gelu_fwd_kernel"] == 0 and launched["attention_fwd_kernel"] == ("patch" in order) * 4


@by_name
def test_an_attention_by_the_name_of_a_repository(kernel, build, monkeypatch):
    """`LOCAL_KERNELS` points the package at a folder for a repository, here without any network."""
    monkeypatch.setenv("LOCAL_KERNELS", f"nobody/fastbert-flash={build}")
    given = texts()
    stock, exact = expected(make("ModernBert"), given)
    model = make("ModernBert", "nobody/fastbert-flash")
    before = of_the_copy(kernel).get("attention_fwd_kernel", 0)
    with counting() as launched:
        results = with_gradients(model, model(**flattened("ModernBert", given))[0][0])
    assert not launched and of_the_copy(kernel)["attention_fwd_kernel"] == before + 2
    assert_equal(results, stock, exact)


# fastbert cannot be imported here; the kernels of the folder can.
ALONE = """
import sys
sys.modules["fastbert"] = None
from pathlib import Path
import torch
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]))
x = torch.randn(2, 5, 2, 16)
out = kernel.flash_attn_func(x, x, x)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2))
torch.testing.assert_close(kernel.layers.GeLU()(x), torch.nn.functional.gelu(x))
print([name for name in sys.modules if name.split(".")[0] == "fastbert"], dict(kernel.kernels.core.launch.counts))
"""


def test_it_needs_no_fastbert(build, tmp_path):
    result = subprocess.run([sys.executable, "-c", ALONE, build], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['fastbert'] {'attention_fwd_kernel': 1, 'bias_gelu_fwd_kernel': 1}"


def test_the_folder_follows_the_sources(build, tmp_path):
    again = write_build(tmp_path / "new")
    first = build / "build/torch-universal"
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((again / name).read_bytes() == (first / name).read_bytes() for name in files)
    own = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {str(name.relative_to("fastbert/kernels")) for name in files if name.is_relative_to("fastbert/kernels")} == own


def test_other_sources_have_another_name(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(fastbert.hub.build, "INIT", fastbert.hub.build.INIT + "# changed\n")
    assert json.loads((write_build(tmp_path) / "metadata.json").read_text())["id"] != kernel.__name__


def test_it_writes_over_nothing(build, tmp_path):
    with pytest.raises(fastbert.errors.InputError, match=r"^--out: expected a folder without a build, but .*build exists"):
        write_build(build)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(fastbert.errors.InputError, match=r"^--out: expected a folder, got the file"):
        write_build(file)
