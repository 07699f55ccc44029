"""Tensor parallelism over gloo: a patched model whose Linears are sharded gives stock's numbers on every rank.

A layer runs module by module there: its Linears are called as modules, which do the communication, and attention gets the
heads of its rank.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

import fastbert
from tests.distributed.tensor_parallel import (
    BY_NAME,
    assert_equal_to_stock,
    batch_of,
    full,
    plan_of,
    reasons,
    sharded,
    states,
    tensors_of,
    vocabulary_plan,
    whole,
)
from tests.models.tiny import ANOTHER_ORDER, BASE, KINDS, MLM
from tests.ranks import on_ranks

STEPPED = {"rtol": 0.0, "atol": 1e-5}  # ranks add up in another order than one process; a step moves parameters by 1e-3
BY_MODULE = {
    "embeddings": "active",
    "encoder.layer.0": "module by module",
    "attention.self": "active",
    "attention.output": "active",
    "intermediate": "active",
    "output": "active",
}


def mesh_of(world):
    return init_device_mesh("cpu", (world,))


def is_sharded(model):
    return isinstance(model.bert.encoder.layer[1].output.dense.weight, DTensor)


def linears_by_columns_and_rows(rank, world, heads):
    for patch_first in (True, False):
        model = sharded(mesh_of(world), patch_first=patch_first, num_attention_heads=heads)
        assert is_sharded(model)
        assert_equal_to_stock(model, whole(num_attention_heads=heads))
        assert states(model).items() >= BY_MODULE.items(), states(model)
        assert "query is a Linear, or has hooks" in reasons(model, "bert.encoder.layer.0")


def gathered(rank, world):
    """Every product returns the whole tensor, so attention has all heads on each rank."""
    column, row = {"output_layouts": Replicate()}, {"input_layouts": Replicate()}
    plan = lambda model: plan_of(model, lambda: ColwiseParallel(**column), lambda: RowwiseParallel(**row))  # noqa: E731
    model = sharded(mesh_of(world), plan)
    assert_equal_to_stock(model, whole())
    assert states(model).items() >= BY_MODULE.items(), states(model)


def distributed_activations(rank, world):
    """A product that returns a DTensor: what follows it stays stock, which knows DTensors."""

    def plan(model):
        return plan_of(model) | {
            f"bert.encoder.layer.{i}.intermediate.dense": ColwiseParallel(use_local_output=False) for i in range(2)
        }

    model = sharded(mesh_of(world), plan)
    assert_equal_to_stock(model, whole())
    expected = BY_MODULE | {"intermediate": "fell back", "output": "fell back"}
    assert states(model).items() >= expected.items(), states(model)
    assert reasons(model, "bert.encoder.layer.0.intermediate") == "a Linear inside it returned a DTensor"

    # Attention calls its Linears again for stock's forward, which takes DTensors where no mask is a plain tensor.
    attention, column = "bert.encoder.layer.0.attention", ColwiseParallel(use_local_output=False)
    plan = {f"{attention}.self.{name}": column for name in ("query", "key", "value")}
    model = sharded(mesh_of(world), plan | {f"{attention}.output.dense": RowwiseParallel()}, attention="eager")
    assert_equal_to_stock(model, whole(attention="eager"), batch=batch_of(mask="none"))
    assert states(model)["attention.self"] == "fell back"


def sharded_vocabulary(rank, world):
    model = sharded(mesh_of(world), lambda model: plan_of(model) | vocabulary_plan())
    assert_equal_to_stock(model, whole())
    expected = BY_MODULE | {"": "fell back", "embeddings": "fell back", "cls.predictions.transform": "active"}
    assert states(model).items() >= expected.items(), states(model)


def gradients_under_way(rank, world):
    """A gradient that is still being reduced, as sharding by sequence leaves it, at the layer op and at another kernel."""
    hidden = torch.randn(2, 9, 40)  # the same on all ranks
    for name, kind in (("", BASE), ("cls.predictions.transform", MLM)):
        model, stock = fastbert.patch(whole(kind)), whole(kind)
        for each, dy in ((model, all_reduce(hidden, "sum", dist.group.WORLD)), (stock, world * hidden)):
            (each.get_submodule(name)(hidden) if name else each(**batch_of(kind)).last_hidden_state).backward(dy)
        for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, **ANOTHER_ORDER, msg=name)
        assert states(model)["cls.predictions.transform" if kind is MLM else "encoder.layer.0"] == "active"


def transformers_plan(rank, world, folder):
    """transformers shards a checkpoint while it is read; its classes and configs have no plan for BERT, so it gets one."""
    plan = BY_NAME | {
        "bert.embeddings.word_embeddings": "embedding_rowwise",
        "cls.predictions.decoder": "colwise_gather_output",
    }
    for given in (BY_NAME, plan):
        model = MLM.cls.from_pretrained(folder, tp_plan=given, attn_implementation="sdpa")
        assert is_sharded(model)
        fastbert.patch(model.eval())
        assert_equal_to_stock(model, whole())
        with torch.no_grad():  # transformers takes a shorter way there
            logits = model(**batch_of()).logits
            torch.testing.assert_close(logits, whole()(**batch_of()).logits, **ANOTHER_ORDER)
        assert states(model).items() >= (BY_MODULE | ({} if given is BY_NAME else {"embeddings": "untouched"})).items()


def dropout(rank, world):
    """With the same seed on all ranks, as stock needs too, what is replicated stays equal to the last bit."""
    for plan in (plan_of, lambda model: plan_of(model) | vocabulary_plan()):
        model = sharded(mesh_of(world), plan, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        torch.manual_seed(3)
        output = model(**batch_of())
        output.loss.backward()
        replicated = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        for tensor in (*tensors_of(output), *replicated, torch.get_rng_state()):
            first = tensor.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(tensor, first)
        assert (output.logits - whole()(**batch_of()).logits).abs().max() > 0.1


def optimizer(rank, world):
    """fastbert.AdamW steps on sharded and whole parameters of one group: stock's parameters, and moments that are sharded."""
    model, stock = sharded(mesh_of(world)).train(), whole().train()
    ours, theirs = (make_optimizer(cls, of) for cls, of in ((fastbert.AdamW, model), (torch.optim.AdamW, stock)))
    for step in range(3):
        for each, own in ((model, ours), (stock, theirs)):
            own.zero_grad()
            each(**batch_of(seed=step)).loss.backward()
            own.step()
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter.grad is not None:
                assert type(ours.state[parameter][moment]) is (DTensor if isinstance(parameter, DTensor) else torch.Tensor)
        if not name.endswith("key.bias"):  # its gradient is rounding alone
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(value, other, **STEPPED, msg=name)


def optimizer_of_both_kinds(rank, world):
    """A step on a sharded parameter beside a whole one, whose gradient is still being reduced, is that on two whole ones.

    bfloat16 has no kernel in the interpreter; a GradScaler's tensors need torch's fused function, which takes no mixed list.
    """
    mesh = mesh_of(world)
    kinds = [(torch.float32, {}), *((torch.bfloat16, {name: True}) for name in ("amsgrad", "master_weights"))]
    for dtype, options in kinds:
        wholes = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 4), (3,))]
        shards = [distribute_tensor(wholes[0].detach().clone(), mesh, [Shard(0)]), wholes[1].detach().clone()]
        shards = list(map(torch.nn.Parameter, shards))
        optimizers = [fastbert.AdamW(params, lr=0.1, **options) for params in (shards, wholes)]
        for step in range(2):
            matrix, vector = ((step + 1) * param.detach().sin() for param in wholes)
            wholes[0].grad, wholes[1].grad = matrix, vector
            shards[0].grad = distribute_tensor(matrix, mesh, [Shard(0)])
            shards[1].grad = all_reduce(vector / world, "sum", dist.group.WORLD)
            for each in optimizers:
                each.grad_scale, each.found_inf = torch.tensor(2.0), torch.tensor(0.0)
                each.step()
        for shard, other in zip(shards, wholes, strict=True):
            assert torch.equal(full(shard), other)


def make_optimizer(cls, model):
    return cls(fastbert.param_groups(model, lr=1e-3, weight_decay=0.1))


def quickly(rank):
    linears_by_columns_and_rows(rank, 2, heads=2)
    for work in (distributed_activations, sharded_vocabulary, gradients_under_way, dropout, optimizer, optimizer_of_both_kinds):
        work(rank, 2)


def test_on_two_ranks():
    """With one head a rank, and with two."""
    on_ranks(2, quickly)


def test_transformers_plan(tmp_path):
    pytest.importorskip(
        "transformers.distributed.tensor_parallel", reason="older ones shard no row-parallel Linear with a bias"
    )
    whole().save_pretrained(tmp_path)
    on_ranks(2, transformers_plan, 2, tmp_path)


def by_sequence(rank, world):
    """Between its products a layer has the positions of its rank. The LayerNorms are sharded modules, and stay stock."""
    mesh, shard = mesh_of(world), {"output_layouts": Shard(1)}

    def plan(model):
        styles = plan_of(model, row=lambda: RowwiseParallel(**shard))
        for i in range(2):
            layer = f"bert.encoder.layer.{i}"
            gather = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
            styles[f"{layer}.attention.self"] = PrepareModuleInput(**gather, use_local_output=True)
            styles[f"{layer}.intermediate.dense"] = ColwiseParallel(input_layouts=Shard(1))
            for name in ("attention.output", "output"):
                styles[f"{layer}.{name}.LayerNorm"] = SequenceParallel(use_local_output=True)
        return styles | {layer: PrepareModuleOutput(**shard, desired_output_layouts=Replicate())}

    def split(module, arguments):
        whole = DTensor.from_local(arguments[0], mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(1)]).to_local(), *arguments[1:]

    for unpad in ("auto", True):
        model = sharded(mesh, plan, unpad=unpad)
        model.bert.encoder.layer[0].register_forward_pre_hook(split)
        assert_equal_to_stock(model, whole(), batch=batch_of(length=8))
        expected = BY_MODULE | {"attention.output": "fell back", "output": "fell back"}
        assert states(model).items() >= expected.items(), states(model)


def with_data_parallelism(rank, world):
    """Two groups of two ranks: FSDP2 over the groups, tensor parallelism within each."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "model"))
    model, stock = sharded(mesh["model"]).train(), whole().train()
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    ours, theirs = make_optimizer(fastbert.AdamW, model), make_optimizer(torch.optim.AdamW, stock)
    group = mesh["data"].get_local_rank()
    for step in range(2):
        ours.zero_grad()
        theirs.zero_grad()
        model(**batch_of(seed=10 * step + group)).loss.backward()
        for half in range(2):
            (stock(**batch_of(seed=10 * step + half)).loss / 2).backward()
        ours.step()
        theirs.step()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert weight.device_mesh.ndim == ours.state[weight]["exp_avg"].device_mesh.ndim == 2
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        if not name.endswith("key.bias"):
            torch.testing.assert_close(parameter.full_tensor(), other, **STEPPED, msg=name)


def every_kind(rank, world):
    for kind in KINDS:
        model = sharded(mesh_of(world), kind=kind, unpad=True)
        assert_equal_to_stock(model, whole(kind), kind)
    for work in (gathered, sharded_vocabulary, dropout, optimizer):
        work(rank, world)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_every_kind(world):
    """On four ranks each has one of four heads."""
    on_ranks(world, every_kind, world)


def two_ways(rank, world):
    by_sequence(rank, world)
    with_data_parallelism(rank, world)


@pytest.mark.long
def test_by_sequence_and_with_data_parallelism():
    on_ranks(4, two_ways, 4)
