"""Fuzzes AdamW's tensors, layouts and numbers with hypothesis, within the one bound; then invariances."""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastbert.kernels import reference
from fastbert.kernels.adamw import adamw
from fastbert.kernels.adamw.tables import Hyperparameters, Parameter, Tables
from fastbert.kernels.core.launch import counts
from fastbert.testing.numerics import assert_close
from fastbert.testing.rows import DEVICE

from ..layouts import guarded
from .test_adamw import GROUPS, NAMES, copies, every_second, make, transposed, unaligned

PLACES = [torch.clone, transposed, every_second, unaligned, guarded]
STATE = ("grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.float16]))
    sizes = st.integers(0, 40)
    shapes = st.tuples() | st.tuples(sizes) | st.tuples(sizes, sizes) | st.just((3000,))
    share = st.floats(0.0, 0.999)
    # In float16 eager rounds a smaller eps to zero, and divides by it where a square is zero too.
    eps = [1e-3, 1e-2] if dtype == torch.float16 else [1e-12, 1e-8, 1e-3]
    return {
        "shapes": draw(st.lists(shapes, min_size=1, max_size=4)),
        "dtype": dtype,
        "amsgrad": draw(st.booleans()),
        "master": dtype == torch.float16 and draw(st.booleans()),
        "steps": draw(st.integers(0, 10**6)),
        "places": [draw(st.sampled_from(PLACES)) for _ in range(6)],
        # Moments are squares, so float16's own range would overflow.
        "scale": 10.0 ** draw(st.floats(-1.0, 1.0) if dtype == torch.float16 else st.floats(-4.0, 4.0)),
        "groups": [
            Hyperparameters(
                draw(st.sampled_from([0.0, 1e-5, 1e-2, 1.0])),
                draw(share),
                draw(share),
                draw(st.sampled_from(eps)),
                draw(st.sampled_from([0.0, 0.01, 0.5])),
                draw(st.booleans()),
            )
            for _ in range(2)
        ],
        "grad_scale": draw(st.sampled_from([None, None, 1.0, 3.0, 65536.0])),
        "found_inf": draw(st.sampled_from([None, 0.0, 0.0, 1.0])),
        "values": draw(st.integers(0, 2**31)),
    }


def in_place(parameters, places):
    """Each kind of tensor in its own memory layout."""
    kinds = dict(zip(("param", *STATE), places, strict=True))
    return [
        p._replace(**{name: place(t) for name, place in kinds.items() if (t := getattr(p, name)) is not None})
        for p in parameters
    ]


def scaled_by(parameters, factor):
    """Gradients and moments of a loss that is `factor` times as large."""
    factors = {"grad": factor, "exp_avg": factor, "exp_avg_sq": factor**2, "max_exp_avg_sq": factor**2}
    return [
        p._replace(**{name: t * f for name, f in factors.items() if (t := getattr(p, name)) is not None}) for p in parameters
    ]


def double(parameters):
    copied = copies(parameters)
    wide = [p._replace(**{n: t.double() for n in ("param", *STATE) if (t := getattr(p, n)) is not None}) for p in copied]
    return wide


def named(parameters):
    return {f"{name} of {i}": getattr(p, name) for i, p in enumerate(parameters) for name in NAMES}


@settings(derandomize=True)
@given(call=calls())
def test_any_legal_call(call):
    check_call(call)


@pytest.mark.long
@settings(max_examples=2000)
@given(call=calls())
def test_other_calls_each_time(call):
    check_call(call)


def check_call(call):
    note(str(call))
    torch.manual_seed(call["values"])
    form = {name: call[name] for name in ("dtype", "amsgrad", "master", "steps")}
    parameters = in_place(scaled_by(make(call["shapes"], **form), call["scale"]), call["places"])
    eager, exact = copies(parameters), double(parameters)
    scalars = {name: torch.tensor(call[name], device=DEVICE) for name in ("grad_scale", "found_inf") if call[name] is not None}
    before = counts.copy()
    adamw(parameters, call["groups"], **scalars)
    assert (counts - before).keys() == {"adamw_kernel"}
    for others in (eager, exact):
        reference.adamw(others, call["groups"], **scalars)
    assert_close(named(parameters), named(eager), named(exact), relative_fp32=1e-5 if call["dtype"] != torch.float16 else None)


def stepped(parameters, groups=GROUPS, **options):
    parameters = copies(parameters)
    adamw(parameters, groups, **options)
    return parameters


def assert_equal(parameters, others):
    for parameter, other in zip(parameters, others, strict=True):
        for name in NAMES:
            one, two = getattr(parameter, name), getattr(other, name)
            assert one is two or torch.equal(one, two), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_order_and_company_do_not_matter(dtype):
    """A parameter alone, among others or in another order has the same bits, every time."""
    parameters = make(dtype=dtype, amsgrad=True)
    together = stepped(parameters)
    assert_equal(stepped(parameters), together)
    assert_equal(stepped(parameters[::-1])[::-1], together)
    assert_equal([stepped([p])[0] for p in parameters], together)


def test_elements_do_not_see_each_other():
    """Permuting a tensor permutes its results; lengthening it leaves those of its former elements unchanged."""
    (parameter,) = make([(70,)])
    (expected,) = stepped([parameter])
    order = torch.randperm(70).to(DEVICE)
    changes = {
        "permuted": lambda t: t[order],
        "longer": lambda t: torch.cat([t, torch.full_like(t, torch.nan)]),
    }
    for how, change in changes.items():
        (other,) = stepped([Parameter(*map(change, parameter[:4]), parameter.step)])
        for name in NAMES[:4]:
            one, two = getattr(expected, name), getattr(other, name)
            assert torch.equal(two[:70], one[order] if how == "permuted" else one), (how, name)


@pytest.mark.parametrize("factor", [2.0**-8, 4.0])
def test_the_scale_of_a_loss_does_not_matter(factor):
    """With eps = 0, to the bit for a power of two; nor does it matter whether the kernel or the caller divides by it."""
    parameters, groups = make(amsgrad=True), [group._replace(eps=0.0) for group in GROUPS]
    one, other = stepped(parameters, groups), stepped(scaled_by(parameters, factor), groups)
    assert_equal(scaled_by(one, factor), other)
    larger = [p._replace(grad=p.grad * factor) for p in parameters]
    assert_equal(stepped(larger, GROUPS, grad_scale=torch.tensor(factor, device=DEVICE)), stepped(parameters))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_the_count_of_programs_that_are_done_starts_again(found):
    """The last program recognises itself by that count, also in a step that changes nothing."""
    parameters, tables = make(), Tables()
    for _ in range(2):
        adamw(parameters, GROUPS, found_inf=torch.tensor(found, device=DEVICE), tables=tables)
        assert all(not table.done for table in tables.launches)


def test_tables_share_no_memory_with_parameters():
    parameters, tables = make([(40,), (16, 3)], amsgrad=True), Tables()
    adamw(parameters, GROUPS, tables=tables)
    read = [t for p in parameters for name in NAMES if (t := getattr(p, name)) is not None]
    storages = [t.untyped_storage().data_ptr() for t in read]
    assert len(set(storages)) == len(storages)
    held = {t.untyped_storage().data_ptr() for table in tables.launches for t in (table.rows.tensor, table.done)}
    assert not held & set(storages)
