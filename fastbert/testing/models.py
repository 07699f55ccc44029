"""Run a model stock, patched and in float64, and judge what comes out; count what was launched."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.kernels.core.launch import counts
from fastbert.verify import _compare_all

# Written out again, not read from fastbert.registry: what the registry forgets has to fail here.
KERNELS = {
    bert.BertEmbeddings: "embedding_layernorm",
    bert.BertSelfAttention: "attention",
    bert.BertCrossAttention: "attention",
    bert.BertSelfOutput: "dropout_add_layernorm",
    bert.BertOutput: "dropout_add_layernorm",
    bert.BertIntermediate: "bias_gelu",
    bert.BertPredictionHeadTransform: "gelu_layernorm",
}
POOLED = (bert.BertForSequenceClassification, bert.BertForNextSentencePrediction, bert.BertForMultipleChoice)
MLM_HEADS = (bert.BertForMaskedLM, bert.BertForPreTraining, bert.BertLMHeadModel)
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
    """Patched equals stock in the same dtype, both measured from stock in float64; and it went through the kernels.

    `model` is stock and stays as it is: three copies run. `eager` is the model to be equal to where it is not `model`:
    the same one with eager attention. `expected` are the launches; without it every module that
    has a kernel has to use it, once in the forward and once in the backward, and never fall back. Returns what the
    patched copy gave.
    """
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(patched, batch, backward)
    if expected is None:
        # Whether the encoder packs depends on the batch (test_unpad); a head without labels has no loss to be fast at,
        # nor has the causal one in float64, whose logits stock rounds to float32.
        lossless = "labels" not in batch or model.dtype == torch.float64
        assert_no_fallback(patched, but=("BertEncoder", *(names(MLM_HEADS) if lossless else ())))
        expected = expected_launches(model, backward=backward)
    assert launched == expected, launched
    stock = model if eager is None else eager
    exact = run(copy.deepcopy(stock).double(), doubled(batch), backward)
    assert_equal(results, run(copy.deepcopy(stock), batch, backward), exact)
    return results


def run(
    model: nn.Module, batch: Mapping[str, Any], backward: bool = True, within: AbstractContextManager | None = None
) -> Tensors:
    """Every tensor of the output; with `backward` also the gradient of every parameter and input that has one.

    The forward alone runs inside `within`, as one does with autocast.
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
    """An input of its own for each run, so that its gradient is that run's."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def gradients(named: Iterable[tuple[str, Any]]) -> Tensors:
    return {f"gradient of {name}": x.grad for name, x in named if getattr(x, "grad", None) is not None}


def scalar(outputs: Tensors) -> Tensor:
    """The loss; where there is none, a fixed random projection of every output, so that each element counts."""
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
    """The tensors of an output (nested in mappings, tuples and caches) with a name for where each stood."""
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
    """The rule of `fastbert.verify`, for every tensor that any of the three runs has.

    A gradient that is zero in exact arithmetic (a key's bias, a bias that all choices share) is what is left where
    terms cancelled. Such noise has no size of its own: it is measured by the largest tensor, in roundings of the
    coarsest type in the model (autocast computes float32 gradients in float16: `computed` says so where no result shows it).
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
    """`with counting() as launched`: after the block `launched` holds the kernels launched in it, by name.

    Those of masks, of packing and of the MLM heads' loss, which depend on the batch, and those that end sums over rows are
    counted where `heads`. Those that add up the gradients of the embeddings' tables never are: which of them run depends on
    what the model was given.
    """
    before = counts.copy()
    launched: Counter[str] = Counter()
    yield launched
    found = _settled(counts - before)
    launched.update(found if heads else of_layers(found))


def of_layers(found: Mapping[str, int]) -> Counter[str]:
    """Without the kernels of masks, packing and the heads' loss, and without those that add up the gradients of tables."""
    return Counter({name: n for name, n in _settled(found).items() if not name.startswith(_OF_HEADS)})


def _settled(found: Mapping[str, int]) -> dict[str, int]:
    """Attention's one kernel for gradients of short sequences stands for the two of any length: which it is, length and dtype
    decide."""
    short = found.get("attention_bwd_short_kernel", 0)
    found = {name: n for name, n in found.items() if name != "attention_bwd_short_kernel"}
    found |= {name: short + found.get(name, 0) for name in BACKWARD["attention"] if short}
    return {name: n for name, n in found.items() if not name.startswith("embedding_layernorm_bwd_") or name == _ROWS}


_ROWS = "embedding_layernorm_bwd_kernel"
_OF_HEADS = (
    *("column_sums", "embedding_layernorm_ids", "gather_rows", "key_bounds", "linear_cross_entropy"),
    *("packed_rows", "row_counts"),
)


def rows_in_products(call: Callable[[], Any]) -> list[int]:
    """How many rows each matrix product in it has, in their order, whichever module asked for it."""
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
    """What so many passes through every module of `model` launch, but for the kernels named in `without`; the same whether
    a layer is one op or runs module by module."""
    expected: Counter[str] = Counter()
    for module in model.modules():
        for stock, kernel in KERNELS.items():
            if isinstance(module, stock) and kernel not in without:
                expected += launches_of(kernel, forward, int(backward))
    assert expected
    return expected


def launches_of(kernel: str, forward: int = 1, backward: int = 1) -> Counter[str]:
    """What so many forwards and backwards of one module with this kernel launch."""
    names = BACKWARD.get(kernel, (f"{kernel}_bwd_kernel",))
    return +Counter({f"{kernel}_fwd_kernel": forward} | dict.fromkeys(names, backward))


def names(classes: Iterable[type]) -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in classes)


def assert_no_fallback(model: nn.Module, but: Iterable[str] = ()) -> None:
    """Every module that has a kernel was called through it, and through nothing else; but for these classes."""
    rows = [row for row in fastbert.report(model).rows if row.kernel and row.hf_class not in but]
    rows = [row for row in rows if row.state != "module by module"]  # whose modules have rows of their own
    assert rows
    wrong = [row for row in rows if row.state != "active" or not row.kernel_calls or row.fallback_calls]
    assert not wrong, wrong
