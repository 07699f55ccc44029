"""Frozen launch configurations, by kernel, architecture, element size in bytes and row width.

An entry serves widths up to its key and above the previous key; the last one also serves wider rows. A table whose name ends in
a length serves sequences of at most that many rows, in place of the table without a length. Nothing is tuned at run time.
Entries of sm_90 for BERT's widths and head size in 16-bit and mixed types were timed on an H200 under triton 3.6
(bench/LOG.md). The others are chosen by what the compiler makes of them (no spills, 16-byte loads and stores, bytes in flight),
see bench/FINDINGS.md.

Kernels are written so that every supported Triton merges, folds and lays out well what one of them does by luck: torch 2.9 to
2.11 bring Triton 3.5 and 3.6. A configuration depends on RELEASE only where register counts do. `python -m tests.releases audit`
compiles what BERT-base runs under each release.
"""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """One launch: tile height, warps per program, tile width (None: the whole row), programs per SM.

    num_stages: loop iterations in flight; None leaves it to Triton.
    chunk: columns of a row that the program's warps load at once; None: all of them.
    at_once: rows that a sum over rows reads at once.
    BLOCK_K: a product's tile size along the summed dimension.
    maxnreg: register limit per thread, where that raises occupancy without spills.
    """

    BLOCK_M: int
    num_warps: int
    BLOCK_N: int | None = None
    programs_per_multiprocessor: int | None = None
    chunk: int | None = None
    num_stages: int | None = None
    at_once: int | None = None
    BLOCK_K: int | None = None
    maxnreg: int | None = None

    def chunks(self, width: int) -> tuple[int, int]:
        """How a row of `width` columns is cut into chunks: (number of chunks, columns per chunk), both powers of two."""
        columns = _power_of_two(min(self.chunk or width, width))
        return _power_of_two(-(-width // columns)), columns


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))  # Triton's, whose compilers differ in a few places
Table = dict[int, dict[int, Config]]

# A row held by one warp needs no shared memory and no barrier for its sums, and at 768 columns no lane is idle.
_LAYERNORM_FORWARD: Table = {
    2: {512: Config(2, 1), 1024: Config(1, 1), 2048: Config(1, 2), 4096: Config(1, 4), 8192: Config(1, 8)},
    4: {512: Config(1, 1), 1024: Config(1, 1), 2048: Config(1, 2), 4096: Config(1, 8), 8192: Config(1, 16)},
}
# One warp per row again up to 1024 columns. A thread keeps three float32 sums per column, so registers hold at most 32 columns
# per thread. Persistent programs, no more than are resident at once: they share the rows evenly, so a program that had to wait
# for another would double the time.
_LAYERNORM_BACKWARD: Table = {
    2: {
        384: Config(8, 4, None, 2, chunk=128),
        512: Config(4, 4, None, 3, chunk=256),
        1024: Config(4, 4, None, 2, chunk=256),
        2048: Config(1, 4, None, 2, chunk=1024),
        4096: Config(1, 8, None, 1, chunk=2048),
        8192: Config(1, 8, None, 1, chunk=2048),
    },
    4: {
        512: Config(4, 4, None, 3, chunk=128),
        768: Config(4, 4, None, 2, chunk=128),
        1024: Config(4, 4, None, 2, chunk=128),
        2048: Config(1, 4, None, 2, chunk=512),
        4096: Config(1, 8, None, 1, chunk=1024),
        8192: Config(1, 8, None, 1, chunk=1024),
    },
}
# At BERT-base's width three programs per SM, which puts 1.5 times as many bytes in flight, where the compiler fits a third of
# the registers without a spill.
_LAYERNORM_BACKWARD_THREE: Table = _LAYERNORM_BACKWARD | {
    2: dict(sorted({**_LAYERNORM_BACKWARD[2], 768: Config(4, 4, None, 3, chunk=256, maxnreg=168)}.items()))
}
# Measured on an H200, triton 3.6: with few registers per thread more programs are resident, which hides latency better than
# one warp per row saves instructions. Four warps share a row of 2-byte columns (768: 71 -> 38 us for 16,384 rows), two one of 4
# bytes, with the next row on its way to shared memory (76 -> 54 us).
_HOPPER_LAYERNORM_BACKWARD: Table = {
    2: _LAYERNORM_BACKWARD[2] | {1024: Config(1, 4, None, 7, chunk=1024)},
    4: _LAYERNORM_BACKWARD[4]
    | {768: Config(1, 2, None, 8, chunk=256, num_stages=2), 1024: Config(1, 2, None, 6, chunk=256, num_stages=2)},
}
# The compiler for sm_100 needs more registers: two warps share a row of 1024 4-byte columns. BERT-base's 768 fit one warp.
_BLACKWELL_LAYERNORM_BACKWARD: Table = _LAYERNORM_BACKWARD | {
    2: _LAYERNORM_BACKWARD[2] | {512: Config(8, 4, None, 2, chunk=256)},
    4: _LAYERNORM_BACKWARD[4] | {1024: Config(1, 2, None, 6, chunk=256), 8192: Config(1, 8, None, 1, chunk=2048)},
}
# gelu_layernorm's activation and its slope need registers too: two warps share a row of 1024 4-byte columns on every
# architecture. 8192 columns fit as one chunk.
_GELU_LAYERNORM_BACKWARD: Table = _LAYERNORM_BACKWARD | {
    2: _LAYERNORM_BACKWARD[2] | {8192: Config(1, 8, None, 1)},
    4: _LAYERNORM_BACKWARD[4] | {1024: Config(1, 2, None, 6, chunk=256), 8192: Config(1, 8, None, 1)},
}
# Measured on an H200, triton 3.6, at 1,024 columns: 71 -> 45 us for 16,384 rows, with six programs per SM; later releases need
# registers that leave room for five.
_HOPPER_GELU_LAYERNORM_BACKWARD: Table = _GELU_LAYERNORM_BACKWARD | {
    2: _GELU_LAYERNORM_BACKWARD[2] | {1024: Config(1, 4, None, 5, chunk=1024, num_stages=2)}
}
_BLACKWELL_GELU_LAYERNORM_BACKWARD: Table = _GELU_LAYERNORM_BACKWARD | {
    4: _GELU_LAYERNORM_BACKWARD[4] | {8192: Config(1, 8, None, 1, chunk=4096)}
}
# For rows whose bytes 16 does not divide. They are loaded element by element, and a thread's columns then share no Philox call,
# so more warps share a row.
_LAYERNORM_FORWARD_UNEVEN: Table = {
    size: {512: Config(1, 1), 1024: Config(1, 2), 2048: Config(1, 4), 4096: Config(1, 8), 8192: Config(1, 16)}
    for size in (2, 4)
}
_LAYERNORM_BACKWARD_UNEVEN: Table = {
    size: {
        512: Config(1, 2, None, 8),
        1024: Config(1, 4, None, 4),
        2048: Config(1, 8, None, 2),
        4096: Config(1, 16, None, 1),
        8192: Config(1, 8, None, 1),
    }
    for size in (2, 4)
}
# Without maxnreg the compiler for sm_100 aims at 80 registers here and spills.
_BLACKWELL_LAYERNORM_BACKWARD_UNEVEN: Table = _LAYERNORM_BACKWARD_UNEVEN | {
    4: _LAYERNORM_BACKWARD_UNEVEN[4] | {1024: Config(1, 4, None, 4, maxnreg=128)}
}
_BIAS_GELU_FORWARD: Table = {
    2: {8192: Config(4, 2, 512)},
    4: {8192: Config(4, 4, 512)},
}
# Measured on an H200, triton 3.6, for 16,384 rows: 53.5 -> 50.4 us at 3,072 columns.
_HOPPER_BIAS_GELU_FORWARD: Table = _BIAS_GELU_FORWARD | {2: {8192: Config(4, 1, 256)}}
_GATHER_ROWS: Table = {
    2: {8192: Config(4, 4, 1024)},
    4: {8192: Config(4, 4, 512)},
}
# A program has all rows of a sequence, BLOCK_M at once, in BLOCK_N columns: 64 bytes of each row, or with few sequences one
# sector of 32 bytes. Each thread has several loads in flight. Short sequences take fewer rows and more columns at once.
_POOL_ROWS: Table = {2: {8192: Config(512, 16, 32)}, 4: {8192: Config(512, 16, 16)}}
_POOL_ROWS_FEW: Table = {2: {768: Config(1024, 16, 16)}, 4: {768: Config(1024, 16, 8)}}
_POOL_ROWS_128: Table = {2: {8192: Config(64, 4, 64)}, 4: {8192: Config(64, 4, 32)}}
_POOL_ROWS_BACKWARD: Table = {
    2: {512: Config(8, 4, 512), 8192: Config(4, 4, 1024)},
    4: {8192: Config(4, 4, 512)},
}
# BLOCK_M sorted positions per program (most of them idle); of a row's columns each lane loads 16 bytes.
_EMBEDDING_RUNS: Table = {
    2: {256: Config(1, 1, 256, at_once=8), 512: Config(1, 2, 512, at_once=8), 8192: Config(1, 4, 1024, at_once=8)},
    4: {256: Config(1, 2, 256, at_once=8), 8192: Config(1, 4, 512, at_once=8)},
}
# Measured on an H200, triton 3.6, for 16,384 ids: 77 -> 58 us.
_HOPPER_EMBEDDING_RUNS: Table = _EMBEDDING_RUNS | {2: _EMBEDDING_RUNS[2] | {8192: Config(1, 2, 1024, at_once=8)}}
_EMBEDDING_SUMS: Table = {
    2: {8192: Config(1, 4, 256, 8, at_once=8)},
    4: {8192: Config(1, 4, 128, 8, at_once=8)},
}
# BLOCK_M positions are compared with BLOCK_N others at once. The element size is that of the int32 output; the table is read
# with other sizes too. Measured on an H200, triton 3.6: 31 us for 16,384 ids, with 128 others at once 55.
_EMBEDDING_ORDER: Table = dict.fromkeys((2, 4), {8192: Config(16, 4, 256)})
# The element size is that of the float32 sums; BLOCK_M of them are read at once.
_EMBEDDING_FINISH: Table = dict.fromkeys((2, 4), {8192: Config(32, 4, 128)})
# A thread has the same columns in each row of a tile, so that it sums them by itself: 16 bytes per lane, BLOCK_N columns in all.
# At 3,072 and 4,096 columns measured on an H200, triton 3.6: 126 -> 103 us and 171 -> 135 us for 16,384 rows, against 4 x 512
# elements with a warp per row.
_BIAS_GELU_BACKWARD: Table = {
    2: {512: Config(2, 2, 512, 12), 8192: Config(2, 4, 1024, 6)},
    4: {8192: Config(2, 4, 512, 6)},
}
# In mixed types and with gelu_tanh the compiler for sm_100 needs registers that leave room for five.
_BLACKWELL_BIAS_GELU_BACKWARD: Table = _BIAS_GELU_BACKWARD | {2: _BIAS_GELU_BACKWARD[2] | {8192: Config(2, 4, 1024, 5)}}
# Adjacent columns share a program, which reads as many rows at once as keep its loads in flight. Sums have 4 bytes, never 2.
_COLUMN_SUMS: Table = dict.fromkeys((2, 4), {8192: Config(32, 4, 64)})
# Latency decides: with narrow tiles programs are many and their steps few. A layer's sums take 14.4 us on an H200 with the
# above, 5.8 us with this (triton 3.6).
_HOPPER_COLUMN_SUMS: Table = dict.fromkeys((2, 4), {8192: Config(256, 8, 16)})
# A program updates BLOCK_M blocks of BLOCK_N elements of one tensor, one after the other. The element size is the
# parameter's; the width is ignored.
_ADAMW: Table = {
    2: {8192: Config(16, 4, 1024)},
    4: {8192: Config(16, 4, 1024)},
}
# The compiler for sm_100 stops at 72 registers by itself, and spills with amsgrad.
_BLACKWELL_ADAMW: Table = _ADAMW | {4: {8192: Config(16, 4, 1024, maxnreg=80)}}
# One row of logits per program, BLOCK_N columns at once. Wide programs at low occupancy, although more would hide latency
# better: the second pass over the rows in flight should find them in the cache (38 of an H200's 50 MiB).
_LINEAR_CROSS_ENTROPY: Table = {
    2: {8192: Config(1, 8, 4096, chunk=2048)},  # measured on an H200, triton 3.6: 5 % less time than 8192 columns at once
    4: {8192: Config(1, 8, 4096, chunk=1024)},
}
_LINEAR_CROSS_ENTROPY_REDUCE: Table = {size: {8192: Config(2048, 8, 1)} for size in (2, 4)}
_LINEAR_CROSS_ENTROPY_SCALE: Table = {
    2: {8192: Config(8, 4, 256)},
    4: {8192: Config(8, 4, 256)},
}


# Tiles of the feed-forward's products, in 16 bits only; FUSED says where they are used. Without programs per SM each tile is a
# program of its own. Two programs fit an SM, except on sm_80.
_FEED_FORWARD: Table = {2: {8192: Config(128, 8, 128, num_stages=3, BLOCK_K=64, maxnreg=128)}}
_AMPERE_FEED_FORWARD: Table = {2: {8192: Config(128, 8, 128, num_stages=3, BLOCK_K=64)}}
_BLACKWELL_FEED_FORWARD: Table = {2: {8192: Config(128, 4, 128, num_stages=3, BLOCK_K=64)}}


# One row of a mask per program, BLOCK_N of its bytes at once. The element size is that of the int32 output; the table is read
# with other sizes too.
_MASK_ROWS: Table = dict.fromkeys((2, 4), {8192: Config(1, 4, 512)})
# Positions of a row's tokens: twice as many at once would spill.
_PACKED_ROWS: Table = dict.fromkeys((2, 4), {8192: Config(1, 4, 256)})


# By head size instead of row width; BLOCK_M queries, BLOCK_N keys. At head sizes 64 and 128 two programs of the forward fit an
# SM, so that the softmax of one overlaps the products of the other. Head sizes that are no power of two mask their columns,
# which takes registers, and have entries of their own.
_WIDE_32_BIT = {128: Config(32, 8, 16, num_stages=1), 256: Config(16, 8, 16, num_stages=1)}
_WIDE_ATTENTION: dict[str, Table] = {
    "forward": {4: {64: Config(32, 4, 32, num_stages=2)} | _WIDE_32_BIT},
    "backward_kv": {4: {64: Config(16, 4, 32, num_stages=2)} | _WIDE_32_BIT},
    # Two passes over the keys, whose tiles are in shared memory: with one stage Triton loads them into registers.
    "backward_q": {4: {64: Config(32, 4, 16, num_stages=2), 256: Config(16, 4, 16, num_stages=2)}},
}
_HOPPER_ATTENTION: dict[str, Table] = {
    "forward": {
        2: {
            32: Config(128, 4, 64, num_stages=3),
            63: Config(64, 4, 64, num_stages=2),
            64: Config(128, 4, 64, num_stages=3),
            128: Config(64, 4, 64, num_stages=3),
            256: Config(64, 8, 32, num_stages=2),
        }
    },
    "forward_masked": {
        2: {64: Config(64, 4, 64, num_stages=2), 128: Config(64, 4, 32, num_stages=2), 256: Config(64, 8, 32, num_stages=2)}
    },
    # At head size 64 measured on an H200, triton 3.6: dK and dV 235 -> 193 us at S = 512 with dropout, dQ 169 -> 146 us.
    "backward_kv": {
        2: {
            64: Config(32, 4, 64, num_stages=3),
            127: Config(32, 4, 64, num_stages=1),
            128: Config(32, 4, 64, num_stages=2),
            256: Config(32, 8, 32, num_stages=1),
        }
    },
    "backward_kv_masked": {
        2: {
            64: Config(32, 4, 64, num_stages=2),
            127: Config(32, 4, 64, num_stages=1),
            128: Config(32, 4, 64, num_stages=2),
            256: Config(32, 8, 32, num_stages=1),
        }
    },
    "backward_kv_grouped": {
        2: {64: Config(32, 4, 64, num_stages=2), 128: Config(16, 4, 64, num_stages=2), 256: Config(32, 8, 32, num_stages=1)}
    },
    "backward_q": {
        2: {64: Config(64, 4, 32, num_stages=3), 128: Config(64, 4, 32, num_stages=2), 256: Config(32, 8, 32, num_stages=1)}
    },
    "backward_q_masked": {
        2: {64: Config(64, 4, 64, num_stages=2), 128: Config(64, 4, 32, num_stages=2), 256: Config(32, 8, 32, num_stages=1)}
    },
}
_BLACKWELL_ATTENTION: dict[str, Table] = _HOPPER_ATTENTION | {
    "forward": {2: _HOPPER_ATTENTION["forward"][2] | {128: Config(64, 4, 64, num_stages=2)}},
    "forward_masked": {
        2: {
            64: Config(64, 4, 64, num_stages=2, maxnreg=184),  # without it the compiler stops at 168, and spills
            128: Config(64, 4, 32, num_stages=1),
            256: Config(64, 8, 32, num_stages=2),
        }
    },
    "backward_q": {2: _HOPPER_ATTENTION["backward_q"][2] | dict.fromkeys((64, 128), Config(64, 4, 64, num_stages=2))},
    "backward_kv": {2: {128: Config(32, 4, 64, num_stages=2), 256: Config(32, 8, 32, num_stages=1)}},
    "backward_kv_masked": {2: {128: Config(32, 4, 64, num_stages=2), 256: Config(32, 8, 32, num_stages=1)}},
    "backward_kv_grouped": {
        2: {64: Config(64, 8, 64, num_stages=2), 128: Config(32, 8, 64, num_stages=1), 256: Config(32, 8, 32, num_stages=1)}
    },
}
_AMPERE_ATTENTION: dict[str, Table] = {
    "forward": {
        2: {64: Config(64, 4, 64, num_stages=3), 128: Config(64, 4, 32, num_stages=3), 256: Config(32, 8, 32, num_stages=2)}
    },
    "backward_kv": {
        2: {64: Config(32, 4, 64, num_stages=2), 128: Config(32, 4, 32, num_stages=2), 256: Config(16, 8, 32, num_stages=1)}
    },
    "backward_kv_masked": {
        2: {64: Config(32, 4, 32, num_stages=2), 128: Config(32, 4, 32, num_stages=1), 256: Config(16, 8, 32, num_stages=1)}
    },
    "backward_q": {
        2: {
            64: Config(64, 4, 32, num_stages=2, maxnreg=255),  # without it the compiler stops at 168, and spills
            128: Config(32, 4, 32, num_stages=1),
            256: Config(16, 8, 32, num_stages=1),
        }
    },
}
# Head sizes up to 64, where one program holds all queries of its sequence; by the longest sequence that a table serves.
LENGTHS = (32, 64, 128)
_HOPPER_SHORT = {
    32: Config(32, 4, 32, num_stages=1),
    64: Config(64, 4, 64, num_stages=1),
    128: Config(128, 8, 64, num_stages=1),
}
_SHORT_ATTENTION = {
    "sm_80": _HOPPER_SHORT | {64: Config(64, 4, 32, num_stages=1), 128: Config(128, 8, 32, num_stages=1)},
    "sm_90": _HOPPER_SHORT,
    # Without maxnreg the compiler for sm_100 spills to raise occupancy by one program.
    "sm_100": _HOPPER_SHORT
    | {64: Config(64, 4, 64, num_stages=1, maxnreg=255), 128: Config(128, 8, 32, num_stages=1, maxnreg=255)},
    "interpreter": {32: Config(32, 1, 32), 64: Config(64, 1, 32), 128: Config(128, 1, 64)},
}


def _interpreted(config: Config) -> dict[str, Table]:
    # float64 too, which gradcheck needs. On a GPU plain PyTorch computes it.
    return {"interpreter": {itemsize: {8192: config} for itemsize in (2, 4, 8)}}


def _everywhere(table: Table) -> dict[str, Table]:
    return {architecture: table for architecture in ARCHITECTURES}


def _attention(part: str) -> dict[str, Table]:
    """The tables of a part, whose name may end in _masked or _grouped. Where a table has no such entry, general masks take that
    of the plain part, and grouped heads that of general masks."""
    plain = part.removesuffix("_masked").removesuffix("_grouped")
    others = (plain,) if part == plain else (f"{plain}_masked", plain)
    tables = {"sm_80": _AMPERE_ATTENTION, "sm_90": _HOPPER_ATTENTION, "sm_100": _BLACKWELL_ATTENTION}
    return {
        architecture: next(table[name] for name in (part, *others) if name in table) | _WIDE_ATTENTION[plain]
        for architecture, table in tables.items()
    } | _interpreted(Config(64, 1, 32))


def _attention_forward_128() -> dict[str, Table]:
    """Measured on an H200, triton 3.6: 15.5 -> 13.9 us for 32 sequences of 128."""
    tables = _attention("forward")
    hopper = tables["sm_90"]
    return tables | {"sm_90": hopper | {2: hopper[2] | {64: Config(64, 4, 64, num_stages=3)}}}


def _short_attention(length: int) -> dict[str, Table]:
    tables = {architecture: {2: {64: configs[length]}} for architecture, configs in _SHORT_ATTENTION.items()}
    if length == 128:
        # Measured on an H200, triton 3.6, with one pass over the keys: 28.6 -> 26.3 us. At head size 32 some accesses would not
        # be 16 bytes wide.
        tables["sm_90"] = {2: {32: _HOPPER_SHORT[128], 64: Config(128, 8, 32, num_stages=1)}}
    return tables


# The interpreter's time depends on programs and steps, not on elements: tall tiles.
TABLES: dict[str, dict[str, Table]] = (
    {
        "mask_rows": _everywhere(_MASK_ROWS) | _interpreted(Config(1, 1, 1024)),
        "packed_rows": _everywhere(_PACKED_ROWS) | _interpreted(Config(1, 1, 1024)),
        "gather_rows": _everywhere(_GATHER_ROWS) | _interpreted(Config(32, 1, 1024)),
        "pool_rows_forward": _everywhere(_POOL_ROWS) | _interpreted(Config(64, 1, 256)),
        "pool_rows_forward_few": _everywhere(_POOL_ROWS_FEW) | _interpreted(Config(32, 1, 1024)),
        "pool_rows_forward_128": _everywhere(_POOL_ROWS_128) | _interpreted(Config(32, 1, 1024)),
        "pool_rows_backward": _everywhere(_POOL_ROWS_BACKWARD) | _interpreted(Config(32, 1, 1024)),
        "layernorm_forward": _everywhere(_LAYERNORM_FORWARD) | _interpreted(Config(32, 1)),
        "layernorm_forward_uneven": _everywhere(_LAYERNORM_FORWARD_UNEVEN) | _interpreted(Config(32, 1)),
        "layernorm_backward": _everywhere(_LAYERNORM_BACKWARD_THREE if RELEASE < (3, 8) else _LAYERNORM_BACKWARD)
        | {"sm_90": _HOPPER_LAYERNORM_BACKWARD, "sm_100": _BLACKWELL_LAYERNORM_BACKWARD}
        | _interpreted(Config(32, 1, None, 1)),
        "gelu_layernorm_backward": _everywhere(_GELU_LAYERNORM_BACKWARD)
        | {"sm_90": _HOPPER_GELU_LAYERNORM_BACKWARD, "sm_100": _BLACKWELL_GELU_LAYERNORM_BACKWARD}
        | _interpreted(Config(32, 1, None, 1)),
        "layernorm_backward_uneven": _everywhere(_LAYERNORM_BACKWARD_UNEVEN)
        | {"sm_100": _BLACKWELL_LAYERNORM_BACKWARD_UNEVEN}
        | _interpreted(Config(32, 1, None, 1)),
        "gelu_layernorm_backward_uneven": _everywhere(_LAYERNORM_BACKWARD_UNEVEN) | _interpreted(Config(32, 1, None, 1)),
        "embedding_runs": _everywhere(_EMBEDDING_RUNS)
        | {"sm_90": _HOPPER_EMBEDDING_RUNS}
        | _interpreted(Config(32, 1, 1024, at_once=8)),
        "embedding_runs_uneven": _everywhere(_EMBEDDING_RUNS) | _interpreted(Config(32, 1, 1024, at_once=8)),
        "embedding_sums_backward": _everywhere(_EMBEDDING_SUMS) | _interpreted(Config(32, 1, 1024, 1, at_once=2)),
        "embedding_order": _everywhere(_EMBEDDING_ORDER) | _interpreted(Config(256, 1, 1024)),
        "embedding_finish": _everywhere(_EMBEDDING_FINISH) | _interpreted(Config(32, 1, 1024)),
        "bias_gelu_forward": _everywhere(_BIAS_GELU_FORWARD)
        | {"sm_90": _HOPPER_BIAS_GELU_FORWARD}
        | _interpreted(Config(32, 1, 1024)),
        "bias_gelu_backward": _everywhere(_BIAS_GELU_BACKWARD)
        | {"sm_100": _BLACKWELL_BIAS_GELU_BACKWARD}
        | _interpreted(Config(32, 1, 1024, 1)),
        "feed_forward_product": _everywhere(_FEED_FORWARD)
        | {"sm_80": _AMPERE_FEED_FORWARD, "sm_100": _BLACKWELL_FEED_FORWARD}
        | _interpreted(Config(64, 1, 32, BLOCK_K=32)),
        "feed_forward_gradient": _everywhere(_FEED_FORWARD)
        | {"sm_80": _AMPERE_FEED_FORWARD, "sm_100": _BLACKWELL_FEED_FORWARD}
        | _interpreted(Config(64, 1, 32, BLOCK_K=32)),
        "column_sums": _everywhere(_COLUMN_SUMS) | {"sm_90": _HOPPER_COLUMN_SUMS} | _interpreted(Config(32, 1, 1024)),
        "adamw": _everywhere(_ADAMW) | {"sm_100": _BLACKWELL_ADAMW} | _interpreted(Config(64, 1, 2048)),
        "linear_cross_entropy": _everywhere(_LINEAR_CROSS_ENTROPY) | _interpreted(Config(32, 1, 1024, chunk=256)),
        "linear_cross_entropy_reduce": _everywhere(_LINEAR_CROSS_ENTROPY_REDUCE) | _interpreted(Config(1024, 1, 1)),
        "linear_cross_entropy_scale": _everywhere(_LINEAR_CROSS_ENTROPY_SCALE) | _interpreted(Config(128, 1, 1024)),
    }
    | {
        f"attention_{part}": _attention(part)
        for part in (
            *("forward", "forward_masked", "backward_kv", "backward_kv_masked", "backward_kv_grouped"),
            *("backward_q", "backward_q_masked"),
        )
    }
    | {"attention_forward_128": _attention_forward_128()}
    | {f"attention_backward_short_{length}": _short_attention(length) for length in LENGTHS}
)

# Where a product of the feed-forward is a Triton kernel with an epilogue instead of cuBLAS and a kernel: by product,
# architecture, element size and (H, F), the number of rows from which on. Empty until a GPU run has shown that it is no slower;
# `python -m bench ops --op feed_forward` prints the entries that its run has earned.
FUSED: dict[str, dict[str, dict[int, dict[tuple[int, int], int]]]] = {
    "feed_forward_product": {},
    "feed_forward_gradient": {},
}
