"""Test support for models: runs one stock, patched and in float64, compares the results, and counts launches."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bert import modeling_bert as bert
from transformers.models.camembert import modeling_camembert
from transformers.models.data2vec import modeling_data2vec_text
from transformers.models.electra import modeling_electra
from transformers.models.ernie import modeling_ernie
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

import fastbert
from fastbert.kernels.core.launch import counts
from fastbert.verify import _compare_all

# Deliberately not read from fastbert.registry: a module missing there must fail here. Per family its module, the prefix of its
# classes, the class of its MLM transform, and its heads with a loss of a language model.
_FAMILIES = (
    (bert, "Bert", "PredictionHeadTransform", ("ForMaskedLM", "ForPreTraining", "LMHeadModel")),
    (modeling_roberta, "Roberta", "LMHead", ("ForMaskedLM", "ForCausalLM")),
    (modeling_xlm_roberta, "XLMRoberta", "LMHead", ("ForMaskedLM", "ForCausalLM")),
    (modeling_camembert, "Camembert", "LMHead", ("ForMaskedLM", "ForCausalLM")),
    (modeling_data2vec_text, "Data2VecText", "LMHead", ("ForMaskedLM", "ForCausalLM")),
    (modeling_electra, "Electra", "GeneratorPredictions", ("ForMaskedLM", "ForCausalLM")),
    (modeling_ernie, "Ernie", "PredictionHeadTransform", ("ForMaskedLM", "ForPreTraining", "ForCausalLM")),
)
_KERNELS = {
    "Embeddings": "embedding_layernorm",
    "SelfAttention": "attention",
    "CrossAttention": "attention",
    "SelfOutput": "dropout_add_layernorm",
    "Output": "dropout_add_layernorm",
    "Intermediate": "bias_gelu",
}
KERNELS = {getattr(module, name + part): kernel for module, name, *_ in _FAMILIES for part, kernel in _KERNELS.items()}
KERNELS |= {getattr(module, name + transform): "gelu_layernorm" for module, name, transform, _ in _FAMILIES}
KERNELS[modeling_electra.ElectraDiscriminatorPredictions] = "bias_gelu"
POOLED = (bert.BertForSequenceClassification, bert.BertForNextSentencePrediction, bert.BertForMultipleChoice)
MLM_HEADS = tuple(getattr(module, name + head) for module, name, _, heads in _FAMILIES for head in heads)
ENCODERS = tuple(getattr(module, name + "Encoder") for module, name, *_ in _FAMILIES)
BACKWARD = {"attention": ("attention_bwd_kv_kernel", "attention_bwd_q_kernel")}
Tensors = dict[str, Tensor]


def check(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    backward: bool = True,
    expected: Counter[str] | None = None,
    eager: nn.Module | None = None,
) -> Tensors:
    """Check that patched equals stock in the same dtype, both measured against stock in float64, and ran on the kernels.

    Args:
        model: a stock model, which is not changed; three copies run.
        batch: the keyword arguments of its forward.
        backward: also compare gradients.
        expected: the launches. By default every module that has a kernel must use it, once in the forward and once in the
            backward, and never fall back.
        eager: the model to compare with instead of `model`, for example the same one with eager attention.

    Returns:
        The results of the patched copy.
    """
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(patched, batch, backward)
    if expected is None:
        # Whether the encoder packs depends on the batch (test_unpad). A head without labels computes no loss, and the
        # causal one falls back in float64, where stock rounds logits to float32.
        lossless = "labels" not in batch or model.dtype == torch.float64
        assert_no_fallback(patched, but=(*names(ENCODERS), *(names(MLM_HEADS) if lossless else ())))
        expected = expected_launches(model, backward=backward)
    assert launched == expected, launched
    stock = model if eager is None else eager
    exact = run(copy.deepcopy(stock).double(), doubled(batch), backward)
    assert_equal(results, run(copy.deepcopy(stock), batch, backward), exact)
    return results


def run(
    model: nn.Module, batch: Mapping[str, Any], backward: bool = True, within: AbstractContextManager | None = None
) -> Tensors:
    """Every tensor of the output by name; with `backward` also the gradient of every parameter and input that has one.

    Only the forward runs inside `within`, for example autocast.
    """
    inputs = {name: leaf(value) for name, value in batch.items()}
    with within or nullcontext():
        outputs = dict(named_tensors("", model(**inputs)))
    results = {name: tensor.detach().clone() for name, tensor in outputs.items()}
    if backward:
        model.zero_grad()
        scalar(outputs).backward()
        results |= gradients((*model.named_parameters(), *inputs.items()))
    return results


def leaf(value: Any) -> Any:
    """A detached copy of an input, so that its gradient belongs to one run."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def gradients(named: Iterable[tuple[str, Any]]) -> Tensors:
    return {f"gradient of {name}": x.grad for name, x in named if getattr(x, "grad", None) is not None}


def scalar(outputs: Tensors) -> Tensor:
    """The loss, or without one a fixed random projection of every output, so that each element matters."""
    if "loss" in outputs:
        return outputs["loss"]
    generator = torch.Generator().manual_seed(0)
    terms = []
    for tensor in outputs.values():
        weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.requires_grad:
            terms.append((tensor * weights.to(tensor)).mean())
    return torch.stack(terms).sum()


def named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output (nested in mappings, tuples and caches), with their paths as names."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(f"{name}.{key}".strip("."), item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from named_tensors(f"{name}[{index}]", item)
    elif hasattr(value, "self_attention_cache"):
        yield from named_tensors(f"{name}.self", value.self_attention_cache)
        yield from named_tensors(f"{name}.cross", value.cross_attention_cache)
    elif hasattr(value, "layers"):
        for index, layer in enumerate(value.layers):
            yield from named_tensors(f"{name}[{index}]", {"keys": layer.keys, "values": layer.values})
    else:
        assert value is None or isinstance(value, (bool, int, float, str)), f"{name}: {type(value)} was passed over"


def doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in batch.items()}


def assert_equal(results: Tensors, eager: Tensors, reference: Tensors, computed: torch.dtype = torch.float64) -> None:
    """Apply the rule of `fastbert.verify` to every tensor that any of the three runs has.

    A gradient that is zero in exact arithmetic (a key's bias, a bias that all choices share) is pure noise of cancelled
    terms. It may be as large as a rounding of the largest tensor in the coarsest dtype of the model. `computed` is that dtype
    if no result shows it (autocast computes float32 gradients in float16).
    """
    assert results
    sizes = {name: float(x.abs().max()) for name, x in reference.items() if x.is_floating_point() and x.numel()}
    coarsest = max(torch.finfo(x.dtype).eps for x in results.values() if x.is_floating_point())
    noise = max(coarsest, torch.finfo(computed).eps) * max(sizes.values())
    failures = []
    for comparison in _compare_all(results, eager, reference):
        name = comparison.name
        cancelled = name.startswith("gradient of") and sizes.get(name, 1.0) < 1e-12 * max(sizes.values())
        if not (comparison.ok or (cancelled and comparison.error <= noise)):
            failures.append(f"{name}: {comparison.reason}")
    assert not failures, "\n".join(failures)


def assert_bitwise(results: Tensors, others: Tensors) -> None:
    assert results and results.keys() == others.keys()
    different = [name for name in results if not torch.equal(results[name], others[name])]
    assert not different, different


@contextmanager
def counting(heads: bool = False) -> Iterator[Counter[str]]:
    """`with counting() as launched`: after the block, `launched` holds the launches in it per kernel name.

    With `heads` it includes the kernels of masks, packing and the MLM heads' loss, which depend on the batch, and those that
    finish sums over rows. It never includes the kernels that add up gradients of the embedding tables, because which of them
    run depends on the inputs.
    """
    before = counts.copy()
    launched: Counter[str] = Counter()
    yield launched
    found = _settled(counts - before)
    launched.update(found if heads else of_layers(found))


def of_layers(found: Mapping[str, int]) -> Counter[str]:
    """The launches without those of masks, packing, the heads' loss and the gradients of embedding tables."""
    return Counter({name: n for name, n in _settled(found).items() if not name.startswith(_OF_HEADS)})


def _settled(found: Mapping[str, int]) -> dict[str, int]:
    """The launches with attention's one backward kernel for short sequences counted as the two for any length.

    Length and dtype decide which of them run.
    """
    short = found.get("attention_bwd_short_kernel", 0)
    found = {name: n for name, n in found.items() if name != "attention_bwd_short_kernel"}
    found |= {name: short + found.get(name, 0) for name in BACKWARD["attention"] if short}
    return {name: n for name, n in found.items() if not name.startswith("embedding_layernorm_bwd_") or name == _ROWS}


_ROWS = "embedding_layernorm_bwd_kernel"
_OF_HEADS = (
    *("column_sums", "embedding_layernorm_ids", "gather_rows", "key_bounds", "linear_cross_entropy"),
    *("packed_rows", "pool_rows", "row_counts"),
)


def rows_in_products(call: Callable[[], Any]) -> list[int]:
    """The number of rows of each matrix product in `call`, in order."""
    rows: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = op.name().removeprefix("aten::").partition(".")[0]
            if name in ("mm", "addmm", "addmm_", "bmm"):
                rows.append([x for x in args if isinstance(x, Tensor)][-2].shape[-2])
            return op(*args, **kwargs or {})

    with Products():
        call()
    return rows


def expected_launches(
    model: nn.Module, *, forward: int = 1, backward: int | bool = 1, without: Iterable[str] = ()
) -> Counter[str]:
    """The launches of so many passes through every module of `model`, except the kernels named in `without`.

    They are the same whether a layer is one op or runs module by module.
    """
    expected: Counter[str] = Counter()
    for module in model.modules():
        for stock, kernel in KERNELS.items():
            if isinstance(module, stock) and kernel not in without:
                expected += launches_of(kernel, forward, int(backward))
    assert expected
    return expected


def launches_of(kernel: str, forward: int = 1, backward: int = 1) -> Counter[str]:
    """The launches of so many forwards and backwards of one module with this kernel."""
    names = BACKWARD.get(kernel, (f"{kernel}_bwd_kernel",))
    return +Counter({f"{kernel}_fwd_kernel": forward} | dict.fromkeys(names, backward))


def names(classes: Iterable[type]) -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in classes)


def assert_no_fallback(model: nn.Module, but: Iterable[str] = ()) -> None:
    """Check that every module with a kernel used it in all calls, except modules of the classes `but`."""
    rows = [row for row in fastbert.report(model).rows if row.kernel and row.hf_class not in but]
    rows = [row for row in rows if row.state != "module by module"]  # their modules have rows as well
    assert rows
    wrong = [row for row in rows if row.state != "active" or not row.kernel_calls or row.fallback_calls]
    assert not wrong, wrong
