"""Every shipped configuration within the bound: each entry of the tables in kernels/core/configs.py, on this GPU.

Entries for an older architecture run here as they would run there; those for a newer one may exceed this GPU's shared memory
and are skipped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch

from fastbert.kernels.attention import Geometry
from fastbert.kernels.core import configs, launch
from fastbert.kernels.core.configs import ARCHITECTURES, TABLES
from fastbert.kernels.core.launch import INTERPRETED, recording
from fastbert.testing import attention, checking, encoder_layer, feed_forward, linear_cross_entropy
from fastbert.testing.calls import CALLS, Call
from fastbert.testing.row_op import RowOp
from fastbert.testing.rows import BIAS_GELU, DEVICE, DROPOUT_ADD_LAYERNORM, GELU_LAYERNORM, check, make_inputs
from fastbert.testing.specs import SPECS

from .adamw import test_adamw
from .cases import dtype_name
from .embedding_layernorm import test_embedding_layernorm

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# By the name of the call: the tables that its forward and backward read.
TABLES_OF = {
    **{f"{spec} {form}".strip(): tables for spec in SPECS.values() for form, tables in spec.tables.items()},
}


@dataclass(frozen=True)
class Entry:
    call: Call
    architecture: str
    dtype: torch.dtype
    width: int

    def __str__(self) -> str:
        return f"{self.call}-{self.architecture}-{dtype_name(self.dtype)}-{self.width}"


def entries() -> Iterator[Entry]:
    """One width per combination of configurations: the widest that gets it, and one less.

    One less is a row whose bytes 16 does not divide, which has tables of its own. If two architectures share a configuration,
    the older one stands for both.
    """
    seen = set()
    calls = {str(call): call for call in CALLS}
    for name, tables in TABLES_OF.items():
        for architecture in ARCHITECTURES:
            for itemsize, dtype in DTYPES.items():
                limits = {limit for table in tables for limit in TABLES[table][architecture].get(itemsize, ())}
                for width in sorted(limits | {limit - 1 for limit in limits}):
                    chosen = chosen_for(tables, architecture, dtype, width)
                    if (name, dtype, *map(id, chosen)) not in seen:
                        seen.add((name, dtype, *map(id, chosen)))
                        yield Entry(calls[name], architecture, dtype, width)


def chosen_for(tables: tuple[str, ...], architecture: str, dtype: torch.dtype, width: int) -> list[configs.Config]:
    like = torch.empty((), dtype=dtype, device="meta")
    with recording(architecture, lambda *_: None):
        return [launch.choose(table, like, width) for table in tables]


def recorded(entry: Entry) -> set[int]:
    """The ids of the configurations that the call launches with; for attention also those for other lengths. Nothing runs."""
    inputs, step = entry.call.make(True, entry.dtype, entry.width)
    found: set[int] = set()
    with recording(entry.architecture, lambda kernel, programs, config, arguments: found.add(id(config))):
        for length in (*configs.LENGTHS, configs.LENGTHS[-1] + 1) if entry.call.spec.name == "attention" else (0,):
            with patch.object(Geometry, "longest", length), patch.object(launch, "_multiprocessors", lambda device: 132):
                step(inputs)
    return found


ENTRIES = list(entries())
# ptxas 12.8, which triton 3.6 and 3.7 bring, compiles this tile of 64 x 32 for sm_90 to a product whose address no
# instruction has written (bench/audit/unwritten.py). sm_90 has other tiles, and sm_80 other products.
WRONG_ON_HOPPER = "attention short, dropped-sm_80-bfloat16-63"


@pytest.mark.no_launch
def test_every_configuration_has_an_entry():
    """Every configuration of the tables that a tensor can select is selected by one of the calls."""
    found = set().union(*map(recorded, ENTRIES))
    missing = [
        (table, architecture, itemsize, width)
        for table, by_architecture in TABLES.items()
        for architecture in ARCHITECTURES
        for itemsize, rows in by_architecture[architecture].items()
        for width, config in rows.items()
        if id(config) not in found
    ]
    assert not missing, missing
    assert {entry.call.spec.name for entry in ENTRIES} == SPECS.keys()
    assert WRONG_ON_HOPPER in map(str, ENTRIES)


def check_rows(op: RowOp, p: float = 0.0) -> Callable[[int, torch.dtype], object]:
    """More blocks of rows than programs: 1,031 rows."""
    return lambda width, dtype: check(op, make_inputs(op, (ROWS, width), dtype), **({"p": p} if p else {}))


def check_embedding_layernorm(width: int, dtype: torch.dtype) -> None:
    inputs, options = test_embedding_layernorm.make((8, ROWS // 8), width, dtype, vocabulary=1000, positions="of each sequence")
    options["ids"][:, ::2] = 7
    test_embedding_layernorm.check(inputs, options | {"p": 0.1})


def check_feed_forward(inner: int, dtype: torch.dtype) -> None:
    """A full tile and a partial one, with epilogues if there are any: in 16 bits, at widths that tiles divide."""
    on = dtype.itemsize == 2
    inner = -(-inner // 256) * 256 if on else inner
    feed_forward.check(feed_forward.make_inputs(ROWS, 128, inner, 128, dtype), (on, on))


def check_attention(
    masked: bool = False, kv_heads: int = 2, lengths: tuple[int, ...] = ()
) -> Callable[[int, torch.dtype], None]:
    def check_at(head_size: int, dtype: torch.dtype) -> None:
        for length in lengths or LENGTHS:
            seen = torch.rand(2, 1, length, length, device=DEVICE) > 0.1
            seen[..., 0] = True
            options = {"mask": seen} if masked else {"key_mask": seen[:, 0, 0]}
            inputs = attention.make_inputs(2, length, 2, head_size, dtype)
            inputs |= {name: inputs[name][:, :, :kv_heads].contiguous() for name in "kv"}
            attention.check(inputs, p=0.1, **options)

    return check_at


def check_encoder_layer(inner: int, dtype: torch.dtype) -> None:
    settings = encoder_layer.Settings(2, attention_p=0.1, attention_output_p=0.1, output_p=0.1)
    for length in LENGTHS:
        seen = torch.arange(length, device=DEVICE) < torch.tensor([[length], [length // 2 + 1]], device=DEVICE)
        encoder_layer.check(encoder_layer.make_inputs((2, length, 64), inner, dtype), settings, key_mask=seen)


def check_linear_cross_entropy(reduction: str) -> Callable[[int, torch.dtype], object]:
    def check_at(n_cols: int, dtype: torch.dtype) -> object:
        inputs, labels = linear_cross_entropy.make_inputs(ROWS // 4, n_cols, 64, dtype)
        return linear_cross_entropy.check(inputs, labels, reduction=reduction)

    return check_at


def check_adamw(width: int, dtype: torch.dtype) -> None:
    parameters = test_adamw.make([(ROWS, 67), (7,), ()], dtype, amsgrad=True)
    expected = test_adamw.copies(parameters)
    test_adamw.adamw(parameters, test_adamw.GROUPS)
    test_adamw.reference.adamw(expected, test_adamw.GROUPS)
    test_adamw.assert_same(parameters, expected)


def check_of(call: Call) -> Callable[[int, torch.dtype], object]:
    """The check that the call's spec derives."""

    def check_at(width: int, dtype: torch.dtype) -> None:
        size = call.spec.small if INTERPRETED else call.spec.large
        checking.check(call.spec, replace(size, **{call.spec.width: width}), dtype, **call.spec.forms[call.form])

    return check_at


ROWS, LENGTHS = 1031, (70, 257)
CHECKS: dict[str, Callable[[int, torch.dtype], object]] = {
    **{str(call): check_of(call) for call in CALLS if call.form in call.spec.tables},
    # With dropout reproduced, launches counted, or more kinds of rows than a spec has.
    "dropout_add_layernorm dropped": check_rows(DROPOUT_ADD_LAYERNORM, 0.1),
    "bias_gelu": check_rows(BIAS_GELU),
    "gelu_layernorm": check_rows(GELU_LAYERNORM),
    "feed_forward": check_feed_forward,
    "embedding_layernorm dropped": check_embedding_layernorm,
    "attention padded, dropped": check_attention(),
    "attention short, dropped": check_attention(lengths=(20, 50, 100)),
    "attention general mask": check_attention(masked=True),
    "attention grouped, dropped": check_attention(kv_heads=1),
    "encoder_layer padded, dropped": check_encoder_layer,
    "linear_cross_entropy kept": check_linear_cross_entropy("mean"),
    "linear_cross_entropy none": check_linear_cross_entropy("none"),
    "adamw": check_adamw,
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_run_anywhere(name, monkeypatch):
    """Checks the checks themselves, without a GPU."""
    monkeypatch.setitem(globals(), "ROWS", 17)
    monkeypatch.setitem(globals(), "LENGTHS", (5,))
    CHECKS[name](8, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_bound_of_every_configuration(entry, monkeypatch):
    mine = launch.architecture(DEVICE)
    if ARCHITECTURES.index(entry.architecture) > ARCHITECTURES.index(mine):
        pytest.skip(f"this GPU takes the tables of {mine}")
    if str(entry) == WRONG_ON_HOPPER and mine == "sm_90":
        pytest.skip("ptxas compiles this tile of sm_80 wrongly for sm_90")
    monkeypatch.setattr(launch, "architecture", lambda device: entry.architecture)
    CHECKS[str(entry.call)](entry.width, entry.dtype)
