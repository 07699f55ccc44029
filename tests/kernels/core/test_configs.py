"""The shipped tables, and every tile in them on a few rows: a GPU's tile shapes, also under the interpreter."""

import itertools

import pytest
import torch

from fastbert.kernels.core import launch
from fastbert.kernels.core.checks import MAX_WIDTH
from fastbert.kernels.core.configs import ARCHITECTURES, TABLES
from fastbert.testing.rows import BIAS_GELU, DEVICE, DROPOUT_ADD_LAYERNORM, OPS, check, make_inputs, run, seed_tensor

DTYPES = {2: torch.float16, 4: torch.float32}
MULTIPROCESSORS = 2  # so few that a few rows give every program several blocks


def kernels_of(op):
    forward = "bias_gelu_forward" if op is BIAS_GELU else "layernorm_forward"
    return forward, "layernorm_backward" if op is DROPOUT_ADD_LAYERNORM else f"{op.name}_backward"


def tiles():
    """(op, architecture, element size, width): each pair of configurations once, at the narrowest width it serves."""
    parameters, seen = [], set()
    for op in OPS:
        for architecture in ARCHITECTURES:
            for itemsize, uneven in itertools.product(DTYPES, ("", "_uneven")):
                names = [f"{name}{uneven}" for name in kernels_of(op)]
                if not TABLES.keys() >= set(names):
                    continue  # the op has one table for all widths
                tables = [TABLES[name][architecture][itemsize] for name in names]
                limits = sorted({*tables[0], *tables[1]})
                for below, limit in zip([32, *limits], limits, strict=False):
                    pair = tuple(table[min(w for w in table if w >= limit)] for table in tables)
                    shapes = tuple((c.BLOCK_M, c.BLOCK_N, c.chunk, c.programs_per_multiprocessor) for c in pair)
                    if (op, itemsize, uneven, limit, shapes) not in seen:
                        seen.add((op, itemsize, uneven, limit, shapes))
                        name = f"{op}-{architecture}-{8 * itemsize}bit-{limit}{uneven}"
                        width = below + 1 if uneven or op is BIAS_GELU else below + 16 // itemsize
                        parameters.append(pytest.param(op, architecture, itemsize, width, id=name))
    return parameters


@pytest.fixture
def as_on(monkeypatch):
    """Choose configurations as on an architecture with few SMs."""

    def pretend(architecture):
        monkeypatch.setattr(launch, "architecture", lambda device: architecture)
        monkeypatch.setattr(launch, "_multiprocessors", lambda device: MULTIPROCESSORS)

    return pretend


@pytest.mark.parametrize("op, architecture, itemsize, width", tiles())
def test_shipped_tiles(op, architecture, itemsize, width, as_on, monkeypatch):
    """Several programs, each with a full block and some also with a partial one."""
    as_on(architecture)
    config = launch.choose(kernels_of(op)[1], torch.empty(0, dtype=DTYPES[itemsize]), width)
    rows = config.BLOCK_M * (MULTIPROCESSORS * config.programs_per_multiprocessor + 1) + 1
    programs, launched = [], launch.launch

    def counted(kernel, n, *rest, **arguments):
        if kernel.__name__ != "column_sums_kernel":
            programs.append(n)
        launched(kernel, n, *rest, **arguments)

    monkeypatch.setattr(launch, "launch", counted)  # which Work.launch calls
    monkeypatch.setattr(f"fastbert.kernels.{op.name}.launch", counted, raising=False)
    check(op, make_inputs(op, (min(rows, 40), width), DTYPES[itemsize]))
    assert len(programs) == 2 and min(programs) >= 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_gpus_tiles_give_the_interpreters_results(op, architecture, as_on):
    """A row's results have the same bits in any tile; sums over rows differ only in their order."""
    options = {"p": 0.3, "seed": seed_tensor(1)} if op is OPS[0] else {}
    inputs, dy = make_inputs(op, (9, 48), torch.float32), torch.randn(9, 48, device=DEVICE)
    expected = run(op.call, inputs, dy, **options)
    as_on(architecture)
    for name, result in run(op.call, inputs, dy, **options).items():
        torch.testing.assert_close(result, expected[name])


@pytest.mark.no_launch
@pytest.mark.parametrize("kernel", [name for name in TABLES if not name.startswith(("attention", "feed_forward"))])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "interpreter"])
def test_tables_are_complete(kernel, architecture):
    """Every element size, widths up to the widest a kernel takes, and powers of two where Triton requires them.

    float64 for the interpreter only, where gradcheck needs it.
    """
    tables = TABLES[kernel][architecture]
    assert tables.keys() == DTYPES.keys() | ({8} if architecture == "interpreter" else set())
    for table in tables.values():
        # pool_rows_forward_few is for few programs, which wide rows do not make.
        assert list(table) == sorted(table) and (max(table) >= MAX_WIDTH or kernel == "pool_rows_forward_few")
        for config in table.values():
            sizes = (config.BLOCK_M, config.num_warps, config.BLOCK_N or 1)
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes), config
            assert config.num_warps <= 32
            assert (config.BLOCK_N is None) == ("layernorm" in kernel)
            # Sums over rows, which persistent programs share.
            sums = "backward" in kernel and kernel != "pool_rows_backward"
            assert (config.programs_per_multiprocessor is None) == (not sums)


@pytest.mark.no_launch
def test_architectures_are_in_order():
    numbers = [int(name.removeprefix("sm_")) for name in ARCHITECTURES]
    assert numbers == sorted(numbers) and {"sm_80", "sm_90", "sm_100"} <= set(ARCHITECTURES)
