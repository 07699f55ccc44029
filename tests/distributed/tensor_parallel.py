"""Shards tiny BERTs over ranks, each Linear of a layer by its columns or rows, and compares them with stock's whole model."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import fastbert
from tests.models.tiny import ANOTHER_ORDER, MLM, Batch, Kind, make, make_batch

COLUMNS = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
ROWS = ("attention.output.dense", "output.dense")
# transformers' names of the styles, by the patterns of the modules.
BY_NAME = {f"bert.encoder.layer.*.{name}": "colwise" for name in COLUMNS} | {
    f"bert.encoder.layer.*.{name}": "rowwise" for name in ROWS
}
Plan = dict[str, ParallelStyle]
# Its vocabulary can be divided by two and by four.
SETTINGS = {"num_attention_heads": 4, "vocab_size": 64, "tie_word_embeddings": False}


def plan_of(model: nn.Module, column: Callable[[], ParallelStyle] = ColwiseParallel, row: Any = RowwiseParallel) -> Plan:
    """torch's plan for a BERT or a head: the first products of attention and feed-forward by columns, the second by rows."""
    base = "bert." if hasattr(model, "bert") else ""
    layers = range(len(getattr(model, "bert", model).encoder.layer))
    styles = {name: column for name in COLUMNS} | {name: row for name in ROWS}
    return {f"{base}encoder.layer.{i}.{name}": style() for i in layers for name, style in styles.items()}


def vocabulary_plan() -> Plan:
    """Word embeddings and the decoder sharded by words; both return whole tensors."""
    return {
        "bert.embeddings.word_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "cls.predictions.decoder": ColwiseParallel(output_layouts=Replicate()),
    }


def sharded(mesh: DeviceMesh, plan: Any = plan_of, kind: Kind = MLM, patch_first: bool = True, **options: Any) -> nn.Module:
    """A patched tiny model with this plan: a function of the model, or a plan. `options` are patch's and the config's."""
    for_patch = {name: options.pop(name) for name in ("unpad", "mlm_logits") if name in options}
    model = make(kind, **{"attention": "sdpa"} | SETTINGS | options).cpu()
    if patch_first:
        fastbert.patch(model, **for_patch)
    parallelize_module(model, mesh, plan(model) if callable(plan) else plan)
    return model if patch_first else fastbert.patch(model, **for_patch)


def whole(kind: Kind = MLM, **options: Any) -> nn.Module:
    """The stock model on one rank."""
    return make(kind, **{"attention": "sdpa"} | SETTINGS | options).cpu()


def batch_of(kind: Kind = MLM, seed: int = 10, **options: Any) -> Batch:
    return {name: tensor.cpu() for name, tensor in make_batch(kind, seed=seed, **options).items()}


def full(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors_of(output: Any) -> Iterator[Tensor]:
    return (full(value) for value in output.to_tuple() if isinstance(value, Tensor))


def assert_equal_to_stock(model: nn.Module, stock: nn.Module, kind: Kind = MLM, batch: Batch | None = None) -> None:
    """Outputs, loss and every gradient of the sharded model are those of the whole one."""
    batch = batch_of(kind) if batch is None else batch
    found, expected = model(**batch), stock(**batch)
    for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **ANOTHER_ORDER)
    for output in (found, expected):
        (output.loss if "labels" in batch or "start_positions" in batch else output[0].square().mean()).backward()
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                full(parameter.grad), other.grad, **ANOTHER_ORDER, msg=lambda text, n=name: f"{n}: {text}"
            )


def states(model: nn.Module) -> dict[str, str]:
    """The states of the first layer's modules, and of the modules outside layers, by their names in the report."""
    rows = (row for row in fastbert.report(model).rows if ".layer.1" not in row.module)
    return {row.module.removeprefix("bert.").removeprefix("encoder.layer.0."): row.state for row in rows}


def reasons(model: nn.Module, module: str) -> str:
    return next(row.reason for row in fastbert.report(model).rows if row.module == module)
