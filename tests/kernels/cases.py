"""The case matrix: widths, rows and dtypes in full; other choices are drawn per case, deterministically."""

import random
from typing import Any

import pytest
import torch

from fastbert.kernels.core.checks import ACTIVATIONS
from fastbert.testing.row_op import RowOp
from fastbert.testing.rows import BIAS_GELU, DROPOUT_ADD_LAYERNORM

WIDTHS = (1, 37, 312, 768, 1023, 1024, 1500, 8192)
ROWS = (0, 1, 2, 5, 17, 63, 64, 65, 127, 128, 129, 257)
DTYPES = (torch.float64, torch.float32, torch.float16)
ALWAYS = ((257, 768), (129, 1024), (65, 1500), (33, 8192))  # several tiles of rows at real widths, in one dtype each
SMALL = 20_000  # elements; a larger case runs in the long run only


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def drawn_options(op: RowOp, draw: random.Random, width: int) -> dict[str, Any]:
    """With or without dropout, or an activation: relu only where a row of zeros (no variance) is impossible."""
    if op is DROPOUT_ADD_LAYERNORM:
        return {"p": draw.choice((0.0, 0.0, 0.1))}
    return {"activation": draw.choice([a for a in ACTIVATIONS if a != "relu" or width >= 37 or op is BIAS_GELU])}


def matrix(op: RowOp) -> list[Any]:
    """(rows, width, dtype, whether the optional bias exists, options), as pytest parameters."""
    draw = random.Random(op.name)
    parameters = []
    for width in WIDTHS:
        for rows in ROWS:
            for dtype in DTYPES:
                optional, options = draw.random() < 0.5, drawn_options(op, draw, width)
                if width == 1 and op is not BIAS_GELU:
                    continue  # those gradients are rounding only, in eager too: see test_one_column
                chosen = (rows, width) in ALWAYS and DTYPES.index(dtype) == 1 + ALWAYS.index((rows, width)) % 2
                name = f"{rows}x{width}-{dtype_name(dtype)}-{'-'.join(map(str, options.values()))}"
                parameters.append(
                    pytest.param(
                        *(rows, width, dtype, optional, options),
                        id=name + ("-biased" if optional else ""),
                        marks=[
                            *([pytest.mark.no_launch] if rows == 0 else []),
                            *([] if rows * width <= SMALL or chosen else [pytest.mark.long]),
                        ],
                    )
                )
    return parameters


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every subset except the full one."""
    return [tuple(n for i, n in enumerate(names) if bits >> i & 1) for bits in range(2 ** len(names) - 1)]
