"""Wrong arguments of encoder_layer: one error that names the argument, what was expected and what came."""

import re

import pytest
import torch

from fastbert.kernels.encoder_layer import Settings, encoder_layer
from fastbert.testing.encoder_layer import NAMES, flat, make_inputs, seeds
from fastbert.testing.rows import DEVICE

PADDED, PACKED, READ = "padded", "packed", "read"
STARTS = torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE)
ROWS = torch.arange(10, dtype=torch.int32, device=DEVICE)
STARTS_Q = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)


def arguments(kind):
    given = make_inputs((2, 5, 24) if kind == PADDED else (10, 24), queries=3 if kind == READ else None)
    given["settings"] = Settings(3)
    if kind != PADDED:
        given |= {"cu_seqlens": STARTS, "max_seqlen": 6}
    if kind == READ:
        given |= {"cu_seqlens_q": STARTS_Q, "max_seqlen_q": 2}
    return given


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


WRONG = [
    (PADDED, {"x": zeros(2, 5, 24, dtype=torch.int32)}, "x: expected float64, float32, float16 or bfloat16, got torch.int32"),
    (PADDED, {"x": zeros(10, 24)}, "x: expected [B, S, H] with H from 1 to 8192, got (10, 24)"),
    (PACKED, {"x": zeros(2, 5, 24)}, "x: expected [T, H] with H from 1 to 8192, got (2, 5, 24)"),
    (PADDED, {"x": zeros(2, 5, 0)}, "x: expected [B, S, H] with H from 1 to 8192, got (2, 5, 0)"),
    (PADDED, {"x": zeros(1, 1, 8193)}, "x: expected [B, S, H] with H from 1 to 8192, got (1, 1, 8193)"),
    (PADDED, {"settings": Settings(5)}, "settings.heads: expected a divisor of H = 24, got 5"),
    (PADDED, {"settings": Settings(0)}, "settings.heads: expected a divisor of H = 24, got 0"),
    (PADDED, {"settings": Settings(3, "swish")}, "activation: expected one of gelu, gelu_tanh, relu, silu, got 'swish'"),
    *(
        (PADDED, {"settings": Settings(3)._replace(**{p: 1.5})}, f"settings.{p}: expected a probability from 0 to 1, got 1.5")
        for p in ("attention_p", "attention_output_p", "output_p")
    ),
    (PADDED, {"settings": Settings(3, scale=float("inf"))}, "scale: expected a finite number, got inf"),
    *(
        (PADDED, {name: zeros(7)}, f"weights.{name}: expected torch.float32 {shape}, got torch.float32 (7,)")
        for name, shape in zip(
            NAMES,
            [(24, 24), (24,)] * 4 + [(24,)] * 2 + [None, (40,), (24, 40), (24,), (24,), (24,)],
            strict=True,
        )
        if shape is not None
    ),
    (PADDED, {"intermediate": zeros(7)}, "weights.intermediate: expected torch.float32 (7, 24), got torch.float32 (7,)"),
    (PADDED, {"intermediate": zeros()}, "weights.intermediate: expected torch.float32 (0, 24), got torch.float32 ()"),
    (
        PADDED,
        {"output": zeros(24, 40, dtype=torch.float16)},
        "weights.output: expected torch.float32 (24, 40), got torch.float16 (24, 40)",
    ),
    (
        PADDED,
        {"key": zeros(24, 24, dtype=torch.int64)},
        "weights.key: expected float64, float32, float16 or bfloat16, got torch.int64",
    ),
    (
        PADDED,
        {"value_bias": zeros(24, device="meta")},
        f"weights.value_bias: expected a tensor on {zeros().device}, got one on meta",
    ),
    (PADDED, {"product_dtype": torch.int8}, "product_dtype: expected float64, float32, float16 or bfloat16, got torch.int8"),
    (PADDED, {"norm_dtype": torch.int8}, "norm_dtype: expected float64, float32, float16 or bfloat16, got torch.int8"),
    *(
        (PADDED, {name: torch.float64}, f"{name}: expected all dtypes to be float64, or none, got {got}")
        for name, got in (
            ("product_dtype", "torch.float32, torch.float32, torch.float64"),
            ("norm_dtype", "torch.float32, torch.float32, torch.float64"),
        )
    ),
    (
        PADDED,
        {"x": zeros(2, 5, 24, dtype=torch.float64)},
        "x: expected all dtypes to be float64, or none, got torch.float64, torch.float32",
    ),
    (PACKED, {"queries": zeros(3, 24)}, "queries: expected together with cu_seqlens_q, got only one of them"),
    (READ, {"queries": None}, "queries: expected together with cu_seqlens_q, got only one of them"),
    (
        PADDED,
        {"queries": zeros(3, 24), "cu_seqlens_q": STARTS_Q, "max_seqlen_q": 2},
        "queries: expected None without cu_seqlens, got a tensor",
    ),
    *[
        (kind, change, "index: expected together with inverse and cu_seqlens and without queries, got another combination")
        for kind, change in [
            (PACKED, {"index": ROWS}),
            (PACKED, {"inverse": ROWS}),
            (READ, {"index": ROWS, "inverse": ROWS}),
            (PADDED, {"index": ROWS, "inverse": ROWS}),
        ]
    ],
    (PACKED, {"index": ROWS.long(), "inverse": ROWS}, "index: expected int32 [N], got torch.int64 (10,)"),
    (PACKED, {"index": ROWS, "inverse": ROWS[1:]}, "inverse: expected int32 [10], got torch.int32 (9,)"),
    (READ, {"queries": zeros(3, 23)}, "queries: expected torch.float32 [N, 24], got torch.float32 (3, 23)"),
    (READ, {"queries": zeros(24)}, "queries: expected torch.float32 [N, 24], got torch.float32 (24,)"),
    (
        READ,
        {"queries": zeros(3, 24, dtype=torch.float64)},
        "queries: expected torch.float32 [N, 24], got torch.float64 (3, 24)",
    ),
    (READ, {"queries": zeros(3, 24, device="meta")}, f"queries: expected a tensor on {zeros().device}, got one on meta"),
    (PACKED, {"max_seqlen": None}, "max_seqlen: expected a length, got None"),
    (READ, {"max_seqlen_q": None}, "max_seqlen_q: expected a length, got None"),
    (PADDED, {"max_seqlen": 5}, "max_seqlen: expected None without cu_seqlens, got 5"),
    (PACKED, {"cu_seqlens": STARTS.long()}, "cu_seqlens: expected int32 [sequences + 1], got torch.int64 (3,)"),
    (READ, {"cu_seqlens_q": STARTS_Q[:2]}, "cu_seqlens_q: expected cu_seqlens' shape, (3,), got (2,)"),
    (PACKED, {"key_mask": zeros(2, 5, dtype=torch.bool)}, "cu_seqlens: packed rows take no key_mask, key_bounds or mask"),
    (PADDED, {"key_mask": zeros(2, 5)}, "key_mask: expected torch.bool (2, 5), got torch.float32 (2, 5)"),
    (PADDED, {"key_mask": zeros(2, 4, dtype=torch.bool)}, "key_mask: expected torch.bool (2, 5), got torch.bool (2, 4)"),
    (
        PADDED,
        {"key_bounds": zeros(2, 3, dtype=torch.int32)},
        "key_bounds: expected None without a key_mask, got a tensor",
    ),
    (
        PADDED,
        {"key_mask": zeros(2, 5, dtype=torch.bool), "key_bounds": zeros(2, 3)},
        "key_bounds: expected torch.int32 (2, 3), got torch.float32 (2, 3)",
    ),
    (PADDED, {"seed": torch.zeros((), dtype=torch.int64, device=DEVICE)}, "seed: expected int64 [6], got torch.int64 []"),
    (PADDED, {"seed": zeros(6)}, "seed: expected int64 [6], got torch.float32 [6]"),
    (PADDED, {"seed": seeds().to("meta")}, f"seed: expected a tensor on {zeros().device}, got one on meta"),
]


@pytest.mark.no_launch
@pytest.mark.parametrize(("kind", "wrong", "message"), WRONG, ids=[message[:70] for *_, message in WRONG])
def test_wrong_arguments(kind, wrong, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        flat(encoder_layer)(**arguments(kind) | wrong)


@pytest.mark.parametrize("kind", [PADDED, PACKED, READ])
def test_right_arguments(kind):
    y = flat(encoder_layer)(**arguments(kind))
    assert y.shape == ((2, 5, 24) if kind == PADDED else (3 if kind == READ else 10, 24)) and y.is_contiguous()


@pytest.mark.no_launch
def test_no_sequence_at_all():
    inputs = make_inputs((0, 24))
    y = flat(encoder_layer)(**inputs, settings=Settings(3), cu_seqlens=STARTS[:1], max_seqlen=0)
    assert y.shape == (0, 24)
