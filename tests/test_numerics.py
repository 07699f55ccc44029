"""The rule of fastbert.numerics must fail for a wrong kernel, otherwise no other test proves anything."""

import math

import pytest
import torch

from fastbert.numerics import Comparison, compare
from fastbert.testing.numerics import assert_close

NAN, INF = math.nan, math.inf


def tensors(dtype: torch.dtype = torch.float32, n: int = 1000):
    """A reference, and a result and an eager result, both rounded from it."""
    reference = torch.randn(n, dtype=torch.float64)
    return reference.to(dtype, copy=True), reference.to(dtype, copy=True), reference


def judge(result, eager, reference, **bounds) -> Comparison:
    return compare("y", result, eager, reference, **bounds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_rounded_reference_is_right(dtype):
    comparison = judge(*tensors(dtype))
    assert comparison.ok and comparison.reason is None and comparison.name == "y"
    assert comparison.error == comparison.eager_error <= comparison.bound


def test_numbers_of_the_answer():
    reference = torch.tensor([1.0, -4.0], dtype=torch.float64)
    result, eager = torch.tensor([1.5, -4.0]), torch.tensor([1.0, -4.25])
    comparison = judge(result, eager, reference, atol=0.125)
    assert (comparison.error, comparison.eager_error) == (0.5, 0.25)
    assert comparison.bound == 2 * 0.25 + torch.finfo(torch.float32).eps * 4.0 + 0.125
    assert comparison.ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", [0, 500, -1])
def test_one_bad_element_fails(dtype, where):
    result, eager, reference = tensors(dtype)
    result[where] += 0.5
    comparison = judge(result, eager, reference)
    assert not comparison.ok and "over the bound" in comparison.reason


def test_twice_eagers_error_passes_and_more_fails():
    reference = torch.zeros(2, dtype=torch.float64)
    eager = torch.tensor([1e-3, 0.0])
    assert judge(torch.tensor([0.0, 2e-3]), eager, reference).ok
    assert not judge(torch.tensor([0.0, 2.1e-3]), eager, reference).ok
    assert judge(torch.tensor([0.0, 2.1e-3]), eager, reference, atol=2e-4).ok


def test_one_rounding_is_allowed_where_eager_is_exact():
    reference = torch.tensor([1.0, 8.0], dtype=torch.float64)
    eager, eps = reference.float(), torch.finfo(torch.float32).eps
    assert judge(torch.tensor([1.0 + 8 * eps, 8.0]), eager, reference).ok
    assert not judge(torch.tensor([1.0 + 9 * eps, 8.0]), eager, reference).ok


def test_relative_bound_holds_in_float32_only():
    reference = torch.tensor([1.0], dtype=torch.float64)
    assert not judge(torch.tensor([1.1]), torch.tensor([1.1]), reference, relative_fp32=1e-5).ok
    assert judge(torch.tensor([1.1]), torch.tensor([1.1]), reference).ok
    half = torch.tensor([1.1], dtype=torch.float16)
    assert judge(half, half, reference, relative_fp32=1e-5).ok


def test_wrong_dtype_fails():
    result, eager, reference = tensors()
    comparison = judge(result.half(), eager, reference)
    assert not comparison.ok and "dtype" in comparison.reason and comparison.error == INF


@pytest.mark.parametrize("shape", [(10, 100), (1000, 1), (999,), (0,), ()])
def test_wrong_shape_fails(shape):
    result, eager, reference = tensors()
    wrong = torch.zeros(shape)
    assert "shape" in judge(wrong, eager, reference).reason
    assert "shape" in judge(result, wrong, reference).reason
    assert "shape" in judge(result, eager, wrong.double()).reason


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_element_of_the_kernels_own_fails(bad):
    result, eager, reference = tensors()
    result[3] = bad
    comparison = judge(result, eager, reference)
    assert not comparison.ok and "at (3,)" in comparison.reason


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_elements_stand_where_eager_has_them(bad):
    result, eager, reference = tensors()
    result[3] = eager[3] = reference[3] = bad
    assert judge(result, eager, reference).ok
    result[3] = 1.0
    assert not judge(result, eager, reference).ok


@pytest.mark.parametrize("one, other", [(NAN, INF), (INF, -INF), (-INF, NAN)])
def test_the_kind_of_non_finite_element_counts(one, other):
    result, eager, reference = tensors()
    result[3], eager[3], reference[3] = one, other, other
    assert not judge(result, eager, reference).ok


def test_an_overflow_may_be_the_references():
    # float16 ends at 65504; eager went through inf - inf on the way, the kernel did not.
    reference = torch.tensor([1.0, 1e6], dtype=torch.float64)
    eager = torch.tensor([1.0, NAN], dtype=torch.float16)
    assert judge(torch.tensor([1.0, INF], dtype=torch.float16), eager, reference).ok
    assert judge(torch.tensor([1.0, NAN], dtype=torch.float16), eager, reference).ok
    assert not judge(torch.tensor([1.0, -INF], dtype=torch.float16), eager, reference).ok
    assert not judge(torch.tensor([1.0, 5.0], dtype=torch.float16), eager, reference).ok


def test_never_passes_vacuously():
    result, eager, reference = tensors()
    nothing = torch.full_like(result, NAN)
    assert not judge(result, nothing, reference).ok
    assert not judge(nothing, eager, reference).ok
    assert not judge(result, eager, torch.full_like(reference, NAN)).ok
    assert not judge(nothing, nothing, reference).ok
    # A loss over no labels is NaN in all three; that is agreement.
    assert judge(nothing, nothing, torch.full_like(reference, NAN)).ok


def test_one_infinite_eager_element_does_not_open_the_bound():
    result, eager, reference = tensors()
    result[3] = eager[3] = INF
    assert judge(result, eager, reference).bound < 1e-5
    result[4] += 0.5
    assert not judge(result, eager, reference).ok


def test_empty_tensors_pass_when_shapes_and_dtypes_agree():
    empty = torch.empty(0, 3)
    assert judge(empty, empty, empty.double()).ok
    assert not judge(empty.half(), empty, empty.double()).ok
    assert not judge(torch.empty(3, 0), empty, empty.double()).ok


def test_tensors_that_are_not_floating_point_must_be_equal():
    result = torch.tensor([1, 2, 3])
    assert judge(result, result.clone(), result).ok
    assert not judge(result, result + 1, result).ok


@pytest.mark.parametrize("bounds", [{"atol": NAN}, {"atol": INF}, {"atol": -1.0}, {"relative_fp32": NAN}])
def test_a_bound_that_is_no_number_raises(bounds):
    with pytest.raises(ValueError, match=next(iter(bounds))):
        judge(*tensors(), **bounds)


def test_scalars_and_tensors_that_require_gradients():
    scalar = torch.tensor(2.0, requires_grad=True)
    assert judge(scalar, scalar, scalar.double()).ok
    assert "at ()" in judge(torch.tensor(NAN), scalar, scalar.double()).reason


def test_assert_close_names_what_differs():
    result, eager, reference = tensors()
    names = ("y", "dx")
    assert_close(dict.fromkeys(names, result), dict.fromkeys(names, eager), dict.fromkeys(names, reference))
    with pytest.raises(AssertionError, match="dx: error"):
        assert_close({"y": result, "dx": result + 1}, dict.fromkeys(names, eager), dict.fromkeys(names, reference))


def test_assert_close_wants_gradients_where_eager_has_them():
    result, eager, reference = tensors()
    assert_close({"y": result, "dx": None}, {"y": eager, "dx": None}, {"y": reference, "dx": None})
    for here, there in ((None, eager), (result, None)):
        with pytest.raises(AssertionError, match="dx"):
            assert_close({"y": result, "dx": here}, {"y": eager, "dx": there}, {"y": reference, "dx": reference})


def test_assert_close_does_not_pass_on_nothing():
    result, eager, reference = tensors()
    with pytest.raises(AssertionError):
        assert_close({}, {}, {})
    with pytest.raises(AssertionError, match="no tensor"):
        assert_close({"dx": None}, {"dx": None}, {"dx": None})
    with pytest.raises(AssertionError):
        assert_close({"y": result}, {"y": eager, "dx": eager}, {"y": reference, "dx": reference})


def test_assert_close_holds_single_ops_to_1e_minus_5_in_float32():
    reference = torch.randn(1000, dtype=torch.float64)
    poor = {"y": (reference * (1 + 1e-4)).float()}
    with pytest.raises(AssertionError):
        assert_close(poor, poor, {"y": reference})
    assert_close(poor, poor, {"y": reference}, relative_fp32=None)
