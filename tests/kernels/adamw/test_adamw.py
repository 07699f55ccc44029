"""The AdamW kernel alone: values against the reference and float64, memory layouts, what it reads and writes."""

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.adamw import adamw
from fastbert.kernels.adamw.tables import Hyperparameters, Parameter, Tables
from fastbert.kernels.core.launch import counts
from fastbert.testing.rows import DEVICE

from ..layouts import guarded

SHAPES = [(3000,), (7,), (), (0, 5), (16, 33)]
GROUPS = [Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.1), Hyperparameters(3e-2, 0.8, 0.99, 1e-6, 0.0, maximize=True)]
NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")


def make(shapes=SHAPES, dtype=torch.float32, *, amsgrad=False, master=False, steps=3, place=lambda x: x):
    """Parameters in mid-training; `place` lays out each tensor in memory."""
    state = torch.float32 if master else dtype

    def tensor(values, kind):
        return place(values.to(DEVICE, kind))

    made = []
    for index, shape in enumerate(shapes):
        param = torch.randn(shape, dtype=torch.float64)
        exp_avg_sq = torch.rand(shape, dtype=torch.float64) + 0.01
        made.append(
            Parameter(
                tensor(param, dtype),
                tensor(torch.randn(shape, dtype=torch.float64), dtype),
                tensor(torch.randn(shape, dtype=torch.float64), state),
                tensor(exp_avg_sq, state),
                torch.tensor(float(steps + index), device=DEVICE),
                tensor(exp_avg_sq * (0.5 + torch.rand(shape, dtype=torch.float64)), state) if amsgrad else None,
                tensor(param, torch.float32) if master else None,
                index % 2,
            )
        )
    return made


def copies(parameters):
    def copy(tensor):
        return tensor.clone() if isinstance(tensor, torch.Tensor) else tensor

    return [Parameter(*map(copy, parameter)) for parameter in parameters]


def assert_same(parameters, others):
    """Equal up to rounding of the result and, in float32 (16-bit types: before that rounding), a few eps from the
    computation."""
    for parameter, other in zip(parameters, others, strict=True):
        for name in NAMES:
            got, wanted = getattr(parameter, name), getattr(other, name)
            if got is None:
                assert wanted is None
                continue
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, wanted, rtol=4 * eps, atol=4 * eps, msg=lambda text, n=name: f"{n}: {text}")


def launched(call):
    before = counts.copy()
    call()
    return dict(counts - before)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        (torch.float32, False),
        (torch.float64, False),
        (torch.float16, False),
        (torch.float16, True),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_one_step(dtype, amsgrad, master):
    """One launch for whole vectors, a rest of fewer than 16 elements, 0-dim and empty tensors, two groups and maximize."""
    parameters = make(dtype=dtype, amsgrad=amsgrad, master=master)
    expected = copies(parameters)
    assert launched(lambda: adamw(parameters, GROUPS)) == {"adamw_kernel": 1}
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)


def test_more_programs_than_one_a_tensor(monkeypatch):
    from fastbert.kernels.core import configs

    small = {size: {8192: configs.Config(2, 1, 64)} for size in (2, 4, 8)}
    monkeypatch.setitem(configs.TABLES, "adamw", dict.fromkeys(configs.TABLES["adamw"], small))
    parameters = make([(128,), (129,), (300,), (1,)])
    expected = copies(parameters)
    adamw(parameters, GROUPS)
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)
    assert [p.step.item() for p in parameters] == [4.0, 5.0, 6.0, 7.0]


def test_steps_of_many_tensors_are_counted():
    """One program increments them all, 128 at a time."""
    parameters = make([(1,)] * 129)
    adamw(parameters, GROUPS)
    assert [p.step.item() for p in parameters] == [4.0 + i for i in range(129)]


def test_grad_scale_divides_and_stores_the_gradient():
    parameters = make()
    expected = copies(parameters)
    scale, found = torch.tensor(8.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    adamw(parameters, GROUPS, grad_scale=scale, found_inf=found)
    reference.adamw(expected, GROUPS, grad_scale=scale, found_inf=found)
    assert_same(parameters, expected)


@pytest.mark.parametrize("found", [1.0, 2.0])  # 2: two devices found one each, and GradScaler adds them up
def test_found_inf_changes_nothing(found):
    parameters = make(amsgrad=True)
    before = copies(parameters)
    tables = Tables()
    adamw(parameters, GROUPS, found_inf=torch.tensor(found, device=DEVICE), tables=tables)
    for parameter, other in zip(parameters, before, strict=True):
        for name in NAMES[:5]:
            assert torch.equal(getattr(parameter, name), getattr(other, name)), name
        assert parameter.step == other.step
    adamw(parameters, GROUPS, found_inf=torch.tensor(0.0, device=DEVICE), tables=tables)
    assert parameters[0].step == before[0].step + 1


def transposed(x):
    return x.t().contiguous().t() if x.dim() == 2 else x


def every_second(x):
    """A view with gaps between the elements."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def unaligned(x):
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@pytest.mark.parametrize("place", [transposed, every_second, unaligned])
def test_memory_of_any_form(place):
    parameters = make([(16, 33), (5,), (), (0, 3)], place=place)
    expected = copies(parameters)
    adamw(parameters, GROUPS)
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)


@pytest.mark.parametrize("name", ["grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param"])
def test_one_tensor_laid_out_unlike_the_others(name):
    parameters = make([(16, 33)], amsgrad=True)
    parameters = [p._replace(**{name: transposed(getattr(p, name))}) for p in parameters]
    expected = copies(parameters)
    scale = torch.tensor(2.0, device=DEVICE)
    adamw(parameters, GROUPS, grad_scale=scale)
    reference.adamw(expected, GROUPS, grad_scale=scale)
    assert_same(parameters, expected)


def test_unaligned_tensors_have_a_launch_of_their_own():
    parameters = make([(40,)]) + make([(40,)], place=unaligned)
    expected = copies(parameters)
    assert launched(lambda: adamw(parameters, GROUPS)) == {"adamw_kernel": 2}
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)


def test_nothing_beside_the_tensors_is_touched():
    """Bands of NaN surround every tensor: a read would spread them, a write would overwrite them."""
    parameters = make([(33,), (17, 3), (1024,)], place=guarded)
    expected = copies(parameters)
    adamw(parameters, GROUPS)
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)
    for parameter in parameters:
        for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
            tensor = getattr(parameter, name)
            whole = tensor.new_empty(0).set_(tensor.untyped_storage())
            assert int(whole.isnan().sum()) == whole.numel() - tensor.numel(), name


def test_gradients_stay_as_they_are():
    parameters = make()
    before = [p.grad.clone() for p in parameters]
    adamw(parameters, GROUPS)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))


def test_tables_are_kept_while_nothing_moves():
    parameters, tables = make(), Tables()
    for lr in (0.1, 0.2, 0.3):
        adamw(parameters, [group._replace(lr=lr) for group in GROUPS], tables=tables)
    assert (tables.built, tables.uploaded) == (1, 1)
    moved = [parameters[0]._replace(grad=parameters[0].grad.clone()), *parameters[1:]]
    adamw(moved, GROUPS, tables=tables)
    assert (tables.built, tables.uploaded) == (1, 2)
    adamw(moved[1:], GROUPS, tables=tables)
    assert (tables.built, tables.uploaded) == (2, 3)


def test_a_gradient_that_moves_off_its_boundary_and_back():
    parameters, tables = make([(40,), (40,)]), Tables()
    aligned = parameters[0].grad
    expected = copies(parameters)
    for grad, launches in ((aligned, 1), (unaligned(aligned), 2), (aligned, 1), (transposed(aligned), 1)):
        parameters[0] = parameters[0]._replace(grad=grad)
        assert launched(lambda: adamw(parameters, GROUPS, tables=tables)) == {"adamw_kernel": launches}
        reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)
    assert tables.built == 3


def test_a_gradient_that_changes_its_strides():
    parameters, tables = make([(16, 20)]), Tables()
    expected = copies(parameters)
    for place in (transposed, torch.clone, every_second):
        parameters[0] = parameters[0]._replace(grad=place(expected[0].grad))
        adamw(parameters, GROUPS, tables=tables)
        reference.adamw(expected, GROUPS)
    parameters[0].grad.mul_(-1.0)
    expected[0].grad.mul_(-1.0)
    adamw(parameters, GROUPS, tables=tables)
    reference.adamw(expected, GROUPS)
    torch.testing.assert_close(parameters[0].param, expected[0].param, rtol=1e-6, atol=1e-6)


def reread_as(tensor, dtype, shape=None, strides=None):
    """The tensor's values, up to rounding, in another type at the same address, or with other `strides`, or cut to `shape`."""
    shape, values = shape or tensor.shape, tensor.to(dtype, copy=True)
    strides = strides or tensor.stride()
    found = tensor.new_empty(0, dtype=dtype).set_(tensor.untyped_storage(), 0, shape, strides)
    return found.copy_(values[tuple(slice(size) for size in shape)])


@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"])
@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "data"])
def test_a_tensor_that_changes_its_dtype_at_the_same_address(name, in_place):
    """As when the allocator reuses memory: the next gradient is float16."""
    parameters, tables = make([(40,), (16, 4)], amsgrad=True, master=True, dtype=torch.float32), Tables()
    adamw(parameters, GROUPS, tables=tables)
    old = getattr(parameters[1], name)
    pointer, new = old.data_ptr(), reread_as(old, torch.float16)
    if in_place:
        old.data = new
    else:
        parameters[1] = parameters[1]._replace(**{name: new})
    assert getattr(parameters[1], name).data_ptr() == pointer
    expected = copies(parameters)
    adamw(parameters, GROUPS, tables=tables)
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)
    assert tables.built == 2


@pytest.mark.parametrize("name", ["grad", "exp_avg", "exp_avg_sq"])
def test_a_tensor_that_changes_its_strides_at_the_same_address(name):
    parameters, tables = make([(16, 20)]), Tables()
    adamw(parameters, GROUPS, tables=tables)
    old = getattr(parameters[0], name)
    parameters[0] = parameters[0]._replace(**{name: reread_as(old, old.dtype, strides=(1, 16))})
    expected = copies(parameters)
    adamw(parameters, GROUPS, tables=tables)
    reference.adamw(expected, GROUPS)
    assert_same(parameters, expected)


@pytest.mark.no_launch
@pytest.mark.parametrize(("name", "message"), [("grad", r"\(16, 20\), got \(8, 20\)"), ("param", r"\(8, 20\), got \(16, 20\)")])
def test_a_tensor_that_is_cut_down_at_the_same_address(name, message):
    """Strides and address are unchanged, but the kernel would read past the end."""
    parameters, tables = make([(16, 20)]), Tables()
    tables.refresh(parameters, GROUPS)
    tensor = getattr(parameters[0], name)
    tensor.data = reread_as(tensor, tensor.dtype, shape=(8, 20))
    with pytest.raises(ValueError, match=message):
        tables.refresh(parameters, GROUPS)


def test_new_numbers_reach_the_kernel():
    parameters, tables = make(), Tables()
    expected = copies(parameters)
    for step in range(3):
        groups = [Hyperparameters(0.1 / (step + 1), 0.9 - step / 10, 0.99, 10.0**-step, step / 10, bool(step % 2))] * 2
        adamw(parameters, groups, tables=tables)
        reference.adamw(expected, groups)
    assert_same(parameters, expected)


def test_a_parameter_listed_twice_is_updated_twice():
    parameters = make([(20,)])
    expected = copies(parameters)
    adamw([*parameters, parameters[0]], GROUPS)
    reference.adamw([*expected, expected[0]], GROUPS)
    assert_same(parameters, expected)


@pytest.mark.parametrize("eps", [0.0, 1e-30])
def test_second_moments_that_are_denormal(eps):
    parameters = make([(64,)])
    for p in parameters:
        p.grad.fill_(1e-21)
        p.exp_avg.fill_(1e-21)
        p.exp_avg_sq.fill_(1e-42)
    expected = copies(parameters)
    groups = [GROUPS[0]._replace(eps=eps)]
    adamw(parameters, groups)
    reference.adamw(expected, groups)
    assert parameters[0].param.isfinite().all()
    torch.testing.assert_close(parameters[0].param, expected[0].param, rtol=1e-6, atol=1e-6)


def test_nan_gradients_show():
    parameters = make([(40,)], amsgrad=True)
    parameters[0].grad[3] = torch.nan
    adamw(parameters, GROUPS)
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert getattr(parameters[0], name).isnan().nonzero().tolist() == [[3]], name


@pytest.mark.no_launch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.zeros(3, dtype=torch.int32)}, "param: expected float64, float32, float16 or bfloat16"),
        ({"exp_avg": torch.zeros(4)}, r"exp_avg: expected shape \(3,\), got \(4,\)"),
        ({"step": torch.zeros(1)}, r"step: expected shape \(\), got \(1,\)"),
        ({"step": torch.zeros((), dtype=torch.float64)}, "step: expected torch.float32"),
        ({"grad": torch.zeros(3, device="meta")}, "grad: expected a tensor on"),
        ({"grad": torch.zeros(3, dtype=torch.int64)}, "grad: expected float64, float32, float16 or bfloat16"),
        ({"exp_avg": torch.zeros(3, dtype=torch.complex64)}, "exp_avg: expected float64, float32"),
    ],
)
def test_wrong_arguments(change, message):
    change = {name: t if t.device.type == "meta" else t.to(DEVICE) for name, t in change.items()}
    with pytest.raises(ValueError, match=message):
        adamw([make([(3,)])[0]._replace(**change)], GROUPS)
