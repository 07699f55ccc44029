"""Every call of a layer to the host and the device, so that no change to them goes unnoticed.

Runs on the CPU with kernels that do nothing. They are bound and called by address, as on a device. ATen's calls are those of a
GPU, except for products of 16-bit matrices with 32-bit results, which are one call there (`mm.dtype`) and two here.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.kernels.core import bound, cache
from fastbert.kernels.core.launch import INTERPRETED, counts
from fastbert.kernels.encoder_layer import Settings, plan, products
from fastbert.kernels.encoder_layer.forward import columns, seed_places
from fastbert.testing.encoder_layer import direct, flat, make_inputs, seeds

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels that do nothing stand in for those of a device")
DROPPED = Settings(3, attention_p=0.1, attention_output_p=0.1, output_p=0.1)
STARTS = torch.tensor([0, 4, 10], dtype=torch.int32)
MASKED = {"key_mask": torch.ones(2, 5, dtype=torch.bool), "key_bounds": torch.ones(2, 3, dtype=torch.int32)}
PACKED = {"cu_seqlens": STARTS, "max_seqlen": 6}
READ = PACKED | {"cu_seqlens_q": torch.tensor([0, 2, 3], dtype=torch.int32), "max_seqlen_q": 2}
AUTOCAST = {"product_dtype": torch.float16, "norm_dtype": torch.float32}

FORWARD = {"attention_fwd_kernel": 1, "dropout_add_layernorm_fwd_kernel": 2, "bias_gelu_fwd_kernel": 1}
BACKWARD = {
    "dropout_add_layernorm_bwd_kernel": 2,
    "bias_gelu_bwd_kernel": 1,
    "column_sums_kernel": 1,
    "attention_bwd_q_kernel": 1,
    "attention_bwd_kv_kernel": 1,
}
SHORT = {name: n for name, n in BACKWARD.items() if "attention" not in name} | {"attention_bwd_short_kernel": 1}
# ATen's calls that launch nothing: allocations and views.
OF_THE_HOST = {
    "empty.memory_format", "empty_like", "new_empty", "view", "t", "split.Tensor", "split_with_sizes", "unsafe_split.Tensor",
    "unsafe_split_with_sizes",
    "slice.Tensor", "detach", "unbind.int", "chunk",
}  # fmt: skip


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.name().removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def by_address(monkeypatch):
    """Call kernels by address, as on a device."""
    monkeypatch.setattr(bound, "INTERPRETED", False)
    monkeypatch.setattr(products, "adds_last", lambda a: True)
    monkeypatch.setattr(cache, "compiled", lambda *arguments: cache.LoadedKernel(None, lambda *places: None, (), True))
    plan.clear()
    yield
    plan.clear()


def counted(step):
    """(kernels, ATen's calls that launch something, the number of calls that launch nothing)."""
    before = counts.copy()
    with Calls() as calls:
        result = step()
    launching = {name: n for name, n in calls.found.items() if name not in OF_THE_HOST}
    return dict(counts - before), launching, calls.found.total() - sum(launching.values()), result


CALLS = {
    "plain": ((2, 5, 24), None, Settings(3), {}),
    "dropped": ((2, 5, 24), None, DROPPED, {}),
    "masked": ((2, 5, 24), None, DROPPED, MASKED),
    "packed": ((10, 24), None, DROPPED, PACKED),
    "read": ((10, 24), 3, DROPPED, READ),
    "autocast": ((2, 5, 24), None, DROPPED, AUTOCAST),
}


def made_with_inputs(call):
    shape, queries, settings, options = CALLS[call]
    inputs = {name: None if x is None else x.requires_grad_() for name, x in make_inputs(shape, queries=queries).items()}
    step = partial(flat(direct), **inputs, settings=settings, **options)
    return [x for x in inputs.values() if x is not None], step


def made(call):
    return made_with_inputs(call)[1]


PRODUCTS = {"addmm": 1, "mm": 3}  # the concatenated projections; attention's output and the feed-forward's two products
CONCATENATED = {"cat": 2}  # the projections' weights and biases
SEEDS = {"randint": 1}  # one draw for all dropouts
OF_FORWARD = {  # ATen's calls that launch something, and the number of those that launch nothing
    "plain": (PRODUCTS | CONCATENATED, 10),
    "dropped": (PRODUCTS | CONCATENATED | SEEDS, 10),
    "masked": (PRODUCTS | CONCATENATED | SEEDS, 10),
    "packed": (PRODUCTS | CONCATENATED | SEEDS, 10),
    "read": (PRODUCTS | CONCATENATED | SEEDS | {"addmm": 2}, 16),  # the queries' projection is a product of its own
    # One call casts all weights; x is cast by another, and LayerNorm's result by its kernel.
    "autocast": (PRODUCTS | {"_foreach_copy_": 1, "_to_copy": 1} | SEEDS, 20),
}
# Two gradients for each of four products; two of them are added to a residual's gradient.
GRADIENTS = {"mm": 6, "addmm_": 2}
OF_BACKWARD = {
    "plain": (GRADIENTS, 15),
    "dropped": (GRADIENTS, 16),
    "masked": (GRADIENTS, 16),
    "packed": (GRADIENTS, 16),
    "read": (GRADIENTS | {"mm": 8}, 23),
    # On a GPU four of the products are `mm.dtype` and two `addmm.dtype_out`, and nothing is cast or added.
    "autocast": ({"mm": 8, "_to_copy": 4, "add_.Tensor": 2}, 16),
}


# Without a gradient three products cost less than concatenating their weights, unless a cast copies those anyway.
ONE_BY_ONE = {"addmm": 3, "mm": 3}
OF_INFERENCE = {
    "plain": ONE_BY_ONE,
    **dict.fromkeys(("dropped", "masked", "packed", "read"), ONE_BY_ONE | SEEDS),
    "autocast": OF_FORWARD["autocast"][0],
}


@pytest.mark.parametrize("call", CALLS)
def test_forward_without_a_gradient(call):
    step = made(call)
    with torch.no_grad():
        step()  # binds the kernels
        kernels, launching, others, y = counted(step)
    assert (kernels, launching) == (FORWARD, OF_INFERENCE[call])
    assert others <= OF_FORWARD[call][1] and y.grad_fn is None


@pytest.mark.parametrize("call", CALLS)
def test_forward_and_backward(call):
    inputs, step = made_with_inputs(call)
    step()
    kernels, launching, others, y = counted(step)
    assert (kernels, launching, others) == (FORWARD, *OF_FORWARD[call])
    dy = torch.ones_like(y)
    kernels, launching, others, _ = counted(lambda: torch.autograd.grad(y, inputs, dy))
    assert (kernels, launching, others) == (SHORT if call == "autocast" else BACKWARD, *OF_BACKWARD[call])


@pytest.mark.parametrize("length, backward", [(128, SHORT), (129, BACKWARD)])
def test_a_short_layer_launches_one_kernel_less(length, backward):
    """One kernel computes all gradients of attention."""
    inputs = {
        name: None if x is None else x.requires_grad_() for name, x in make_inputs((1, length, 24), dtype=torch.float16).items()
    }
    y = flat(direct)(**inputs, settings=DROPPED)
    dy = torch.ones_like(y)
    kernels, *_ = counted(lambda: torch.autograd.grad(y, [x for x in inputs.values() if x is not None], dy))
    assert kernels == backward


@pytest.mark.parametrize(
    ("frozen", "launches"),
    [
        ((), 14),
        (("x",), 13),
        (("key_bias", "query_bias", "value_bias"), 14),
        (("query", "key", "value"), 13),
        (("output", "intermediate", "attention_output"), 11),
        # Nothing of attention: neither its two kernels nor what follows them.
        (("x", "query", "key", "value", "query_bias", "key_bias", "value_bias"), 10),
    ],
    ids=str,
)
def test_what_is_frozen_is_not_computed(frozen, launches):
    inputs = make_inputs((2, 5, 24))
    leaves = {name: None if x is None else x.requires_grad_(name not in frozen) for name, x in inputs.items()}
    y = flat(direct)(**leaves, settings=DROPPED)
    needed = [x for x in leaves.values() if x is not None and x.requires_grad]
    dy = torch.ones_like(y)
    kernels, launching, _, _ = counted(lambda: torch.autograd.grad(y, needed, dy))
    assert sum(kernels.values()) + sum(launching.values()) == launches


def test_a_step_binds_nothing_twice(monkeypatch):
    """Layers and steps of one shape share a plan; another length has its own."""
    compiled = []
    monkeypatch.setattr(
        cache,
        "compiled",
        lambda *arguments: (compiled.append(arguments), cache.LoadedKernel(None, lambda *p: None, (), True))[1],
    )
    for _ in range(3):
        made("masked")()
    assert len(compiled) == 10  # four in the forward and six in the backward
    made("plain")()
    assert len(compiled) == 20


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_addresses_are_those_of_the_views_that_the_interpreter_takes(dtype, monkeypatch):
    seed, qkv = seeds(), torch.zeros(5, 72, dtype=dtype)
    addresses = [*seed_places(seed, DROPPED), *columns(qkv, 24)]
    monkeypatch.setattr(bound, "INTERPRETED", True)
    views = [*seed_places(seed, DROPPED), *columns(qkv, 24)]
    assert addresses == [view.data_ptr() for view in views] and len(addresses) == 6
    assert [int(view.flatten()[0]) for view in views[:3]] == seed[::2].tolist()
    for i, name in enumerate(("attention_p", "attention_output_p", "output_p")):
        places = seed_places(seed, DROPPED._replace(**{name: 0.0}))
        assert [place is None for place in places] == [i == j for j in range(3)]
