"""Every tile in the tables of the ops that test_configs.py leaves out, under the interpreter, with several programs."""

from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import pytest
import torch

from fastbert.kernels import reference
from fastbert.kernels.adamw import adamw
from fastbert.kernels.core import launch
from fastbert.kernels.core.configs import ARCHITECTURES, TABLES
from fastbert.kernels.linear_cross_entropy.rows import Targets, launch_reduce, scaled
from fastbert.testing import linear_cross_entropy
from fastbert.testing.checking import check
from fastbert.testing.rows import DEVICE
from fastbert.testing.spec import Draw
from fastbert.testing.specs import SPECS

from .. import test_gather_rows, test_key_bounds, test_packed_rows, test_pool_rows, test_row_counts
from ..adamw import test_adamw
from ..embedding_layernorm import test_embedding_layernorm
from . import test_bound
from .test_configs import DTYPES, as_on  # noqa: F401

pool_rows = import_module("fastbert.kernels.pool_rows")  # the module, which the package hides behind its function
EMBEDDING = SPECS["embedding_layernorm"].tables["dropped"]
# Ops whose tables are run tile by tile below, in test_configs.py or in test_feed_forward.py.
BY_HAND = {
    *("dropout_add_layernorm", "bias_gelu", "gelu_layernorm", "attention", "encoder_layer", "feed_forward"),
    *("embedding_layernorm", "gather_rows", "linear_cross_entropy", "adamw", "key_bounds", "row_counts", "packed_rows"),
    "pool_rows",
}


def configured(*names):
    """(architecture, element size, width): each set of configurations once, at the narrowest width it serves."""
    parameters, seen = [], set()
    for architecture in ARCHITECTURES:
        for itemsize in DTYPES:
            tables = [TABLES[name][architecture][itemsize] for name in names]
            limits = sorted({limit for table in tables for limit in table})
            for below, limit in zip([32, *limits], limits, strict=False):
                chosen = tuple(table[min(w for w in table if w >= limit)] for table in tables)
                shapes = tuple((c.BLOCK_M, c.BLOCK_N, c.chunk, c.programs_per_multiprocessor, c.at_once) for c in chosen)
                if (itemsize, limit, shapes) not in seen:
                    seen.add((itemsize, limit, shapes))
                    name = f"{architecture}-{8 * itemsize}bit-{limit}"
                    parameters.append(pytest.param(architecture, itemsize, below + 16 // itemsize, id=name))
    return parameters


def config_of(name, architecture, itemsize):
    """The configuration of a table that has one for all widths."""
    (config,) = TABLES[name][architecture][itemsize].values()
    return config


@pytest.mark.parametrize("architecture, itemsize, width", configured(*EMBEDDING))
@pytest.mark.one_in(4)
def test_tiles_of_embedding_layernorm(architecture, itemsize, width, as_on):  # noqa: F811
    """Words by id and words' rows themselves; runs within a piece and across two."""
    as_on(architecture)
    for positions, types in (("counted", 2), ("of each sequence", 6)):
        make = {"positions": positions, "types": types, "vocabulary": 3}
        inputs, options = test_embedding_layernorm.make((1, 3), width, DTYPES[itemsize], **make)
        test_embedding_layernorm.check(inputs, options)


@pytest.mark.parametrize("architecture, itemsize, width", configured("embedding_runs"))
@pytest.mark.one_in(2)
def test_runs_across_pieces(architecture, itemsize, width, as_on):  # noqa: F811
    as_on(architecture)
    inputs, options = test_embedding_layernorm.make((1, 33), width, DTYPES[itemsize], vocabulary=2)
    test_embedding_layernorm.check(inputs, options)


@pytest.mark.parametrize("architecture, itemsize, _", configured("gather_rows"))
def test_tiles_of_gather_rows(architecture, itemsize, _, as_on, launches):  # noqa: F811
    as_on(architecture)
    config = config_of("gather_rows", architecture, itemsize)
    n_rows, width = config.BLOCK_M + 1, config.BLOCK_N + 1
    test_gather_rows.check(torch.randn(n_rows, width).to(DEVICE, DTYPES[itemsize]), *test_gather_rows.indices(n_rows, n_rows))
    assert launches() == {"gather_rows_kernel": 2}


@pytest.mark.parametrize("mode", ["weighted", "max"])
@pytest.mark.parametrize("shape", ["long", "few", "short"])
@pytest.mark.parametrize("architecture, itemsize, _", configured("pool_rows_forward"))
def test_tiles_of_pool_rows(architecture, itemsize, _, shape, mode, as_on, launches):  # noqa: F811
    """A whole tile of rows and columns and a partial one; few are as many programs as SMs."""
    as_on(architecture)
    name = "pool_rows_forward" + {"long": "", "few": "_few", "short": "_128"}[shape]
    config = config_of(name, architecture, itemsize)
    lengths = [config.BLOCK_M + 1] if shape == "few" else [config.BLOCK_M + 1, 1, 3]
    options = test_pool_rows.places(test_pool_rows.of_lengths(lengths, lengths[0]), spare=1)
    x = torch.randn(sum(lengths) + 1, config.BLOCK_N + 1).to(DEVICE, DTYPES[itemsize])
    with patch.object(pool_rows, "launch", wraps=launch.launch) as launched:
        test_pool_rows.check(x, mode, options)
    assert launched.call_args_list[0].args[2] is config
    assert launches() == test_pool_rows.KERNELS


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("architecture, itemsize, _", configured("linear_cross_entropy"))
def test_rows_of_logits(architecture, itemsize, _, smoothing, as_on):  # noqa: F811
    """A whole tile of columns and a partial one, with bias and smoothing."""
    as_on(architecture)
    config = config_of("linear_cross_entropy", architecture, itemsize)
    inputs, labels = linear_cross_entropy.make_inputs(2, config.BLOCK_N + 37, 16, DTYPES[itemsize], ignored=0.0)
    out_dtype = torch.float32 if itemsize == 2 else None
    linear_cross_entropy.check(inputs, labels, label_smoothing=smoothing, out_dtype=out_dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sum_of_losses(architecture, as_on):  # noqa: F811
    as_on(architecture)
    n = config_of("linear_cross_entropy_reduce", architecture, 4).BLOCK_M + 5
    losses, labels = torch.rand(n, device=DEVICE), torch.randint(0, 9, (n,), device=DEVICE)
    labels[::3] = -100
    loss, scale = torch.empty((), device=DEVICE), torch.empty((), device=DEVICE)
    launch_reduce(losses, Targets(labels, None, None, -100, 0.0), 9, "mean", loss, scale)
    counted = (labels != -100).sum()
    torch.testing.assert_close(loss, losses.sum() / counted)
    torch.testing.assert_close(scale, 1.0 / counted)


@pytest.mark.parametrize("architecture, itemsize, _", configured("linear_cross_entropy_scale"))
def test_scaled_gradients(architecture, itemsize, _, as_on):  # noqa: F811
    as_on(architecture)
    config = config_of("linear_cross_entropy_scale", architecture, itemsize)
    x = torch.randn(config.BLOCK_M + 1, config.BLOCK_N + 1).to(DEVICE, DTYPES[itemsize])
    two = torch.full((), 2.0, device=DEVICE)
    assert torch.equal(scaled(x, two, two, x.dtype), 4 * x)


@pytest.mark.parametrize("architecture, itemsize, _", configured("adamw"))
def test_tiles_of_adamw(architecture, itemsize, _, as_on, monkeypatch):  # noqa: F811
    """A tensor that fills a program, a partial program, and a rest of fewer than 16 elements."""
    as_on(architecture)
    config = config_of("adamw", architecture, itemsize)
    share = config.BLOCK_M * config.BLOCK_N
    parameters = test_adamw.make([(share + config.BLOCK_N + 7,), (5,)], DTYPES[itemsize], amsgrad=True)
    expected, programs = test_adamw.copies(parameters), []

    def counted(kernel, n, *rest, **arguments):
        programs.append(n)
        launch.launch(kernel, n, *rest, **arguments)

    monkeypatch.setattr("fastbert.kernels.adamw.launch", counted)
    adamw(parameters, test_adamw.GROUPS)
    reference.adamw(expected, test_adamw.GROUPS)
    test_adamw.assert_same(parameters, expected)
    assert programs == [3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_of_masks(architecture, as_on):  # noqa: F811
    """Rows longer than a program's block."""
    as_on(architecture)
    test_key_bounds.same(torch.rand(3, 1500, device=DEVICE) < 0.9)
    masks = test_row_counts.masks(3, 1500)
    test_row_counts.same(*masks)
    test_packed_rows.same(*test_packed_rows.arguments_of("tokens and read", *masks, 7, 7))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_of_column_sums(architecture, as_on):  # noqa: F811
    """More rows and columns than a tile has."""
    as_on(architecture)
    test_bound.test_column_sums(torch.float32)


def of_any_op():
    """(spec, form, architecture, element size, width): all tables of the ops that are not run by hand, and one of each
    other."""
    for spec in SPECS.values():
        for form, tables in spec.tables.items():
            if spec.name in BY_HAND:
                small = getattr(spec.small, spec.width)
                yield from (pytest.param(spec, form, architecture, 4, small) for architecture in ARCHITECTURES)
            else:
                yield from (pytest.param(spec, form, *parameter.values, id=parameter.id) for parameter in configured(*tables))


@pytest.mark.parametrize("spec, form, architecture, itemsize, width", list(of_any_op()), ids=str)
def test_tiles_of_any_op(spec, form, architecture, itemsize, width, as_on):  # noqa: F811
    as_on(architecture)
    if spec.name in ("adamw", "encoder_layer"):  # see test_specs.py
        spec.run(spec.inputs(spec.small, Draw(DEVICE), DTYPES[itemsize], **spec.forms[form]))
    else:
        check(spec, replace(spec.small, **{spec.width: width}), DTYPES[itemsize], **spec.forms[form])


@pytest.mark.no_launch
def test_every_table_is_run():
    """Each belongs to an op whose tables are run by hand or by the test above."""
    named = {name for spec in SPECS.values() for tables in spec.tables.values() for name in tables}
    assert TABLES.keys() == named | {f"{name}_uneven" for name in named if f"{name}_uneven" in TABLES}
    assert SPECS.keys() >= BY_HAND
